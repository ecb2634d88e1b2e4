"""benchmarks/kernels.py without a GPU; the rest is in support/interpreted_packed_matmul.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from benchmarks import kernels as benchmark
from tests.support.processes import ROOT

pytest.importorskip("triton")


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
