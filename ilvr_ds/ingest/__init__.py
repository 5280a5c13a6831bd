"""Records on disk become shards: formats read, mistakes named by line, samples packed."""
