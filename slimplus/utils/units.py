"""Sizes written for people to read."""

from __future__ import annotations


def format_bytes(size: float) -> str:
    """Return a number of bytes in decimal units, such as `13.48 GB`, `275.5 MB` or `4.1 kB`."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
