"""A trained model at work: scoring, ablation, cost, and export."""
