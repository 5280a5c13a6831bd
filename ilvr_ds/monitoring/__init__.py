"""What watches a run: hangs, memory, load, the time of each phase, the speed."""
