"""The numerical heart: selection, the selective-feature loss, counter-based noise."""
