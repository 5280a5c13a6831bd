"""From records on disk to shards: reads formats, names mistakes by line, packs samples."""
