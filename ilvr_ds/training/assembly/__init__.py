"""From a recipe to the components of a run; `start_up.assemble` lists the order in which they are made."""

from ilvr_ds.training.assembly.data import planned_numbers
from ilvr_ds.training.assembly.start_up import assemble
from ilvr_ds.training.assembly.step import build_step

__all__ = ["assemble", "build_step", "planned_numbers"]
