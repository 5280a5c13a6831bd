"""From the finished samples to numbers, verdict, page and pictures."""
