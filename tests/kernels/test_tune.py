"""Tuning without a GPU: its candidates and its tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimplus.kernels.fused import FusedShape
from slimplus.kernels.launch import BUCKETS, read_table
from slimplus.kernels.tune import candidates, parse_shape, write_table

pytest.importorskip("triton")


def test_candidates_fit_the_counters_and_the_weight() -> None:
    for tokens in BUCKETS:
        for groups in (1, 2, 32):
            found = list(candidates(tokens, groups))
            assert found
            assert len(found) == len(set(found))
            assert all(launch.split_k <= max(1, groups // 2) for launch in found)
            for launch in found:
                blocks = -(-11008 // launch.block_n) * -(-tokens // launch.block_m)
                assert blocks <= FusedShape(4096, 128, (11008,), (2,)).counters


def test_a_table_keeps_its_other_shapes(tmp_path: Path) -> None:
    first = {"4096x4096 g128": {"8": {"block_n": 64}}}
    second = {"4096x11008 g128": {"8": {"block_n": 128}}}
    file = write_table(tmp_path, "NVIDIA H100 80GB HBM3", first)
    assert file.name == "nvidia_h100_80gb_hbm3.json"
    assert write_table(tmp_path, "NVIDIA H100 80GB HBM3", second) == file
    assert read_table(file) == first | second


def test_shapes_are_read_as_they_are_written() -> None:
    assert parse_shape("4096+1024+1024x4096") == ((4096, 1024, 1024), 4096)
