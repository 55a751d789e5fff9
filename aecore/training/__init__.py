"""The training loop, with its optimiser, checkpoints, teams of workers, CUDA graphs and fits trained as one."""
