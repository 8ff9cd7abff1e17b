"""Attention back-ends, packing and fused gradients: nothing here changes what is computed; skip it at first."""
