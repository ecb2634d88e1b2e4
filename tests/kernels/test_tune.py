"""Tuning without a GPU: its candidates and its tables."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from slimplus.kernels.fused import FusedShape
from slimplus.kernels.launch import BUCKETS, LaunchConfig, blocks, default_launch, read_table
from slimplus.kernels.tune import candidates, parse_shape, tiles, write_table


def test_candidates_are_few_and_fit_the_gpu_and_the_counters() -> None:
    for tokens in BUCKETS:
        for groups in (1, 2, 32):
            shape = FusedShape(groups * 128, 128, (11008,), (2,))
            found = candidates(tokens, shape, lambda launch: 1056 // launch.num_warps)
            assert 1 <= len(found) <= 12
            assert len(found) == len(set(found))
            for launch in found:
                assert launch.split_k <= max(1, groups // 2)
                programs = blocks(launch, shape.out_features, tokens)
                assert programs <= shape.counters
                assert launch.split_k == 1 or programs * launch.split_k <= 1056 // launch.num_warps


def test_a_tile_that_does_not_fit_is_no_candidate() -> None:
    def slots(launch: LaunchConfig) -> int:
        if launch.block_n == 128:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 132

    found = candidates(256, FusedShape(4096, 128, (4096,), (2,)), slots)
    assert found
    assert {launch.block_n for launch in found} == {64}


def test_the_default_is_a_candidate() -> None:
    for tokens in BUCKETS:
        assert default_launch(90, 128, tokens) in tiles(tokens)


def test_a_table_keeps_its_other_shapes(tmp_path: Path) -> None:
    first = {"4096x4096 g128": {"8": {"block_n": 64}}}
    second = {"4096x11008 g128": {"8": {"block_n": 128}}}
    file = write_table(tmp_path, "NVIDIA H100 80GB HBM3", first)
    assert file.name == "nvidia_h100_80gb_hbm3.json"
    assert write_table(tmp_path, "NVIDIA H100 80GB HBM3", second) == file
    assert read_table(file) == first | second


def test_shapes_are_read_as_they_are_written() -> None:
    assert parse_shape("4096+1024+1024x4096") == ((4096, 1024, 1024), 4096)
