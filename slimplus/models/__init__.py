"""Loading transformers and finding their blocks and linear layers."""
