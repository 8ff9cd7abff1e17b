"""What is measured on a GPU, by one command: `python -m benchmarks.gpu`. In the repository alone, not in the wheel."""
