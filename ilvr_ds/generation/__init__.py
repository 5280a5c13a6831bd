"""A model that answers: what it is loaded from, what it reads, and how it decodes text and feeds latents back."""
