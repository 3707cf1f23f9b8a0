"""What the learned quantizers are made of: k-means, residual and product quantization, training."""
