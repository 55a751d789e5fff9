"""The training loop, with its optimiser, checkpoints, teams of workers, CUDA graphs and several fits trained as one."""
