"""Causal language models of transformers: finding, loading and taking them apart, and running them block by block."""
