"""What is read out of a model and its latents: targets, retrieval, similarity, attention, log-probability."""
