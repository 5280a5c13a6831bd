"""The demo's material: a task drawn at any size, and tiny random models."""
