"""Which launch a product gets: from a GPU's table, or a default that fills the GPU."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimplus.kernels import launch
from slimplus.kernels.fused import FusedShape
from slimplus.kernels.launch import LaunchConfig, choose_launch, default_launch, table_file

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU of 132 multiprocessors that is not there; returns the folder of its table."""
    properties = SimpleNamespace(name="NVIDIA Test-1", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    launch._choose.cache_clear()
    return tmp_path


@given(
    st.sampled_from((75, 80, 89, 90, 120)),
    st.lists(st.integers(1, 30_000), min_size=1, max_size=3),
    st.integers(1, 30_000),
    st.sampled_from((32, 64, 128)),
    st.integers(1, 256),
    st.integers(1, 200),
)
def test_defaults_fit_every_shape(
    capability: int, out_features: list[int], in_features: int, group_size: int, tokens: int, multiprocessors: int
) -> None:
    chosen = default_launch(capability, out_features, in_features, group_size, tokens, multiprocessors)
    groups = -(-in_features // group_size)
    assert 1 <= chosen.split_k <= max(1, groups // 2)
    assert tokens <= chosen.block_m or chosen.block_m == 64
    row_blocks = sum(-(-rows // chosen.block_n) for rows in out_features)
    blocks = row_blocks * -(-tokens // chosen.block_m)
    assert blocks <= FusedShape(in_features, group_size, tuple(out_features), (2,)).counters
    warps = blocks * chosen.num_warps
    assert warps * (chosen.split_k - 1) < launch.WARPS_PER_MULTIPROCESSOR * multiprocessors


def test_small_layers_are_split_to_fill_the_gpu(gpu: Path) -> None:
    assert choose_launch(CUDA, (4096,), 4096, 128, 1) == LaunchConfig(128, 8, 16, 2, 3)
    assert choose_launch(CUDA, (22016,), 4096, 128, 1) == LaunchConfig(128, 8, 5, 2, 3)
    assert choose_launch(CUDA, (4096,), 4096, 128, 256) == LaunchConfig(64, 64, 2, 4, 3)


def test_a_tuned_launch_comes_before_the_default(gpu: Path) -> None:
    tuned = LaunchConfig(64, 16, 7, 4, 2)
    launches = {"4096+1024x4096 g128": {"16": asdict(tuned)}}
    file = table_file(gpu, "NVIDIA Test-1")
    assert file.name == "nvidia_test_1.json"
    file.write_text(json.dumps({"launches": launches}))
    assert choose_launch(CUDA, (4096, 1024), 4096, 128, 9) == tuned
    assert choose_launch(CUDA, (4096, 1024), 4096, 128, 16) == tuned
    assert choose_launch(CUDA, (4096, 1024), 4096, 128, 8) != tuned
    assert choose_launch(CUDA, (4096, 1024), 4096, 64, 16) != tuned
    assert choose_launch(CUDA, (5120,), 4096, 128, 16) != tuned
