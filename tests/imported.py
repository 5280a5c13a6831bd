"""What processes of tests/forks.py find imported."""

import gc

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import torch

import ilvr_ds.cli
import ilvr_ds.evaluation.evaluate
import ilvr_ds.training.run  # noqa: F401

torch.set_num_threads(1)
gc.freeze()  # a million objects that stay: each process would look through its copy of them
