"""The demo task: a procedural stand-in for CoMT that can be answered only by looking."""

from ilvr_ds.demo.task.generate import Split, draw_sample, draw_samples
from ilvr_ds.demo.task.spec import OPERATIONS, TaskSpec
from ilvr_ds.demo.task.writing import write_task

__all__ = ["OPERATIONS", "Split", "TaskSpec", "draw_sample", "draw_samples", "write_task"]
