"""What stands in for parts of the stock layers: attention, adapters, fused kernels, 4-bit weights, the loss head."""
