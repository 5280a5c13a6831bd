"""Pictures of runs: plain numbers in, PNG files out; nothing here knows of models or ranks."""
