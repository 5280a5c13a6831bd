"""Pictures of runs: plain numbers in, PNG files out. Knows nothing of models or ranks."""
