"""DeepSpeed's door: the engines of student and teacher, their settings, their shards."""
