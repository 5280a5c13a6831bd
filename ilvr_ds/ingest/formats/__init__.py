"""What the keys of a record mean: one file a format of the field."""
