#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64 # all processes of a machine and their loaders: set to what it has
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#
# sbatch examples/slurm.sh pretrain recipes.vision:base_in1k data.root=imagenet train.strategy=hsdp
#
# Five minutes before its time is over the job stops with a checkpoint and stands in line again; so does one whose
# machine was taken away. The same command goes on from the newest checkpoint.

later() {
    scancel --signal=TERM "$SLURM_JOB_ID" # to torchrun on every machine, which hands it on
    wait "$work"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap later USR1

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or a restart may find the addresses of processes that are dead
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m recipes "$@" &
work=$!
wait "$work"
