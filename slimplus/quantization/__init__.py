"""Quantizers of linear weights, on tensors alone: salience, bit allocation, calibration, error-compensated rounding."""
