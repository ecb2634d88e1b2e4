"""Packed checkpoints: writing, checking, listing, and loading them through transformers or vLLM."""
