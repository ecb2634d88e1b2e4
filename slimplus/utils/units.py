"""Sizes and durations written for people to read."""

from __future__ import annotations

GIGABYTE = 10**9  # bytes


def format_bytes(size: float) -> str:
    """Return a number of bytes in decimal units, such as `13.48 GB`, `275.5 MB` or `4.1 kB`."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def format_seconds(seconds: float) -> str:
    """Return a duration, such as `45 s`, `12 min` or `3.2 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
