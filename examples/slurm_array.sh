#!/bin/bash
#SBATCH --array=0-3
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8 # the process and its loaders: set to a GPU's share of the machine
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#
# sbatch examples/slurm_array.sh objectives recipes.vision:digits seeds=0,1,2 out=compared
#
# Every job of the array gives the same command, and takes what no other has done or is at. The folder must be on a file
# system that all of them share. Five minutes before its time is over a job stops with a checkpoint and stands in line
# again; what a job leaves whose machine is lost, another takes up after a minute.

later() {
    kill -TERM "$work"
    wait "$work"
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    exit 0
}
trap later USR1

python -m recipes "$@" &
work=$!
wait "$work"
