"""What processes of tests/forks.py find imported."""

import gc

import torch

torch.set_num_threads(1)
gc.freeze()  # a million objects that stay: each process would look through its copy of them
