"""Benchmarks that others published, from copies of their data sets: layouts, prompts, rules, figures."""
