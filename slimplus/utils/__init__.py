"""Errors, files, the manifest, the machine, progress bars and units: helpers that know nothing of models."""
