"""The stock models, taken apart and put together for training: loading, tower, injection."""
