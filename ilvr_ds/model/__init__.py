"""The stock Qwen2.5-VL, taken apart and put together for training: loading, tower, injection."""
