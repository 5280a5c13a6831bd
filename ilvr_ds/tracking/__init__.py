"""A run's record, its copy in MLflow, comparisons and scores. Nothing else imports MLflow."""
