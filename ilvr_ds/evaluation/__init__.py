"""A trained model at work: generation with latents, scoring, ablation, cost, and export."""
