"""Backends that multiply packed weights, one for each kind of hardware; they take weights, never layers."""
