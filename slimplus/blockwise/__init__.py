"""Quantization of one transformer block at a time: inputs, bit widths, integers, training."""
