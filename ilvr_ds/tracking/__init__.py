"""MLflow's door: the record of a run, its copy in MLflow, comparisons and scores."""
