"""The method: what the momentum teacher selects, what the student learns from it, how the teacher follows."""
