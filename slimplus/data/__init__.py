"""Calibration and evaluation text, and the token windows that are cut from it.

Importing this package imports nothing: `slimplus.data.text` must load without PyTorch, so that a wrong text source is
reported before anything heavy is loaded.
"""
