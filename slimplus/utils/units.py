"""TODO."""

from __future__ import annotations


def gigabytes(size: int) -> str:
    """`13.5 GB`; smaller sizes in MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
