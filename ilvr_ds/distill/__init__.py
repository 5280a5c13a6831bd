"""The method: what the momentum teacher selects, what the student learns from it, the teacher's EMA update."""
