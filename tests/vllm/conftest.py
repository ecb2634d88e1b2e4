"""The real vLLM, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ROOT

VARIABLE = "SLIMPLUS_VLLM_PYTHON"
WORKER = ROOT / "tests" / "vllm" / "worker.py"
Answers = list[dict[str, Any]]


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The Python that has vLLM."""
    if VARIABLE not in os.environ:
        pytest.skip("the tests of tests/vllm need vLLM, and run by `make test-vllm`")
    return (ROOT / os.environ[VARIABLE]).absolute()


@pytest.fixture(scope="session")
def environment(vllm_python: Path) -> dict[str, str]:
    """Variables for vLLM's processes."""
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    path = f"{vllm_python.parent}{os.pathsep}{os.environ['PATH']}"  # where ninja lies, by which its compiler builds
    return os.environ | own | {"PATH": path, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "NO_PROXY": "127.0.0.1"}


@pytest.fixture(scope="session")
def serve(
    vllm_python: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Answers]:
    """`serve(jobs, ranks=1)`: what vLLM answers to each job, see worker.py; each rank is a process."""

    def run(jobs: Sequence[dict[str, Any]], ranks: int = 1, **variables: str) -> Answers:
        lines = "".join(json.dumps({"adapter": None, "new_tokens": 12, "engine": {}} | job) + "\n" for job in jobs)
        shared = (
            environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571", "WORLD_SIZE": str(ranks)} | variables
        )
        log = tmp_path_factory.mktemp("vllm") / "log.txt"
        processes = [
            subprocess.Popen(
                [vllm_python, WORKER],
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log.open("a"),
                text=True,
            )
            for rank in range(ranks)
        ]
        for process in processes[1:]:
            assert process.stdin is not None
            process.stdin.write(lines)
            process.stdin.close()
            process.stdin = None
        answers, _ = processes[0].communicate(lines)
        for process in processes[1:]:
            process.wait()
        found = [json.loads(line) for line in answers.splitlines()]
        assert len(found) == len(jobs), f"vLLM ended after {len(found)} of {len(jobs)} jobs: {log.read_text()[-2000:]}"
        return found

    return run
