"""The packed format: the affine grid of a quantized weight, its layout in bits, and the checks of stored tensors."""
