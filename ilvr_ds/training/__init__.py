"""The training run: engines, steps, the loop, checkpoints, tracking."""
