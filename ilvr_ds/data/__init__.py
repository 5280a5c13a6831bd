"""From records on disk to batches: samples, shards, the sample plan, templates, collation."""
