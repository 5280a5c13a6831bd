"""What a run costs before it runs: sizes of a model, floating-point operations, memory, a bound on the time."""
