"""Checkpoints: found, checked, loaded, written whole or not at all, and cut anew for other ranks."""
