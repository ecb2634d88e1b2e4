"""Recipes: the keys of a run, their reading from a command line, and checks that need no PyTorch."""
