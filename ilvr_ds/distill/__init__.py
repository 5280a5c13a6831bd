"""The method: which features are selected, what the student learns from it, the teacher's EMA update."""
