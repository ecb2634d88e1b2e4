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

pytest.importorskip("triton")

from slimplus.kernels import launch
from slimplus.kernels import packed_matmul as product
from slimplus.kernels.fused import FusedShape
from slimplus.kernels.launch import LaunchConfig, blocks, default_launch, split_groups, table_file

CUDA = torch.device("cuda", 0)
PRODUCT = (torch.bfloat16, torch.float16, False)  # dtypes of inputs and scales, no bias


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU of 132 multiprocessors that is not there, on which 6 programs run at a time; the folder of its table."""
    properties = SimpleNamespace(name="NVIDIA Test-1", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    monkeypatch.setattr(product, "count_slots", lambda *arguments: 132 * 6)
    product.choose_launch.cache_clear()
    return tmp_path


def choose(out_features: tuple[int, ...], in_features: int, group_size: int, tokens: int) -> LaunchConfig:
    shape = FusedShape(in_features, group_size, out_features, (1, 2, 3))
    return product.choose_launch(CUDA, shape, *PRODUCT, launch.bucket(tokens))


@given(
    st.sampled_from((75, 80, 89, 90, 120)),
    st.lists(st.integers(1, 30_000), min_size=1, max_size=3),
    st.integers(1, 30_000),
    st.sampled_from((32, 64, 128)),
    st.integers(1, 256),
    st.integers(1, 2000),
)
def test_defaults_fit_every_shape(
    capability: int, out_features: list[int], in_features: int, group_size: int, tokens: int, slots: int
) -> None:
    tile = default_launch(capability, group_size, tokens)
    chosen = split_groups(tile, out_features, in_features, group_size, tokens, slots)
    groups = -(-in_features // group_size)
    assert 1 <= chosen.split_k <= max(1, groups // 2)
    assert tokens <= chosen.block_m or chosen.block_m in (64, 128)
    found = blocks(chosen, out_features, tokens)
    assert found <= FusedShape(in_features, group_size, tuple(out_features), (2,)).counters
    assert chosen.split_k == 1 or found * chosen.split_k <= slots  # no program waits for another one to end
    assert found * (chosen.split_k + 1) > slots or chosen.split_k == max(1, groups // 2)  # and none more would fit


def test_small_layers_are_split_to_fill_the_gpu(gpu: Path) -> None:
    assert choose((4096,), 4096, 128, 1) == LaunchConfig(128, 8, 16, 2, 3)
    assert choose((4096, 4096, 4096), 4096, 128, 1) == LaunchConfig(128, 8, 8, 2, 3)
    assert choose((11008, 11008), 4096, 128, 1) == LaunchConfig(128, 8, 4, 2, 3)
    assert choose((4096,), 11008, 128, 1) == LaunchConfig(128, 8, 24, 2, 3)
    assert choose((4096,), 4096, 128, 64) == LaunchConfig(64, 64, 12, 4, 3)
    assert choose((4096,), 4096, 128, 256) == LaunchConfig(128, 128, 12, 8, 3)


def test_a_tuned_launch_comes_before_the_default(gpu: Path) -> None:
    tuned = LaunchConfig(64, 16, 7, 4, 2)
    launches = {"4096+1024x4096 g128": {"16": asdict(tuned)}}
    file = table_file(gpu, "NVIDIA Test-1")
    assert file.name == "nvidia_test_1.json"
    file.write_text(json.dumps({"launches": launches}))
    assert choose((4096, 1024), 4096, 128, 9) == tuned
    assert choose((4096, 1024), 4096, 128, 16) == tuned
    assert choose((4096, 1024), 4096, 128, 8) != tuned
    assert choose((4096, 1024), 4096, 64, 16) != tuned
    assert choose((5120,), 4096, 128, 16) != tuned
