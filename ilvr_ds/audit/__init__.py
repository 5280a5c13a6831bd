"""Does a model use its latents? The field's tests: replacement, donor swap, what is inside, barred sight."""
