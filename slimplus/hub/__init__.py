"""Packed checkpoints: writing them, and loading them through transformers."""
