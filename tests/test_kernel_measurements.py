"""What tuning and the kernel benchmark do without a GPU; the rest is in interpreted_packed_matmul.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernels as benchmark
from slimplus.kernels.fused import FusedShape
from slimplus.kernels.launch import BUCKETS, read_table
from slimplus.kernels.tune import candidates, parse_shape, write_table

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.mark.parametrize("command", [["-m", "slimplus.kernels.tune", "--shapes", "16x16"], ["benchmarks/kernels.py"]])
def test_without_a_gpu_commands_say_so(command: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no GPU" in done.stderr.splitlines()[-1]


def test_the_benchmark_tells_speed_up_and_bandwidth() -> None:
    seconds = {"slimplus": 2e-6, "cublas": 9e-6, "gemlite": None}
    row = {"model": "llama-7b", "layer": "o", "bits": "2", "tokens": 1, "bytes": 4_000_000, "seconds": seconds}
    line = benchmark.table({"copy_bandwidth": 4e12, "rows": [row]}).splitlines()[-1]
    assert line == "| llama-7b | o | 2 | 1 | 2.0 | 9.0 |  | 4.50 | 50% |"


def test_copy_bandwidth_counts_reads_and_writes() -> None:
    assert benchmark.copy_bandwidth(torch.device("cpu"), timer=lambda calls: 0.5, size=1000) == 4000


def test_results_name_machine_versions_and_commit() -> None:
    machine = benchmark.provenance()["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["commit"]
    assert {"gpus", "triton", "gemlite"} <= machine.keys()
