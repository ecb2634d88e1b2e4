"""Damaged checkpoints, one after the other: a clear error or a model, within bounds of memory and time."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slimplus.hub.contents import read_contents
from slimplus.utils.errors import InputError
from tests.support.damage import DAMAGE, LOADS
from tests.support.fuzzing import refusal
from tests.support.processes import ROOT


@pytest.mark.slow
def test_a_campaign_of_damaged_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    """Whole loads, in a process that may take no more memory than a load takes, and no more time."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.damage", str(checkpoint), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes["refused"] > LOADS // 2
    assert outcomes["loaded"] > LOADS // 10


def test_what_lists_a_damaged_checkpoint_refuses_it_or_gives_figures(checkpoint: Path, tmp_path: Path) -> None:
    generator = random.Random(1)
    for number in range(600):
        copy = shutil.copytree(checkpoint, tmp_path / "copy")
        DAMAGE[number % len(DAMAGE)](copy, generator)
        said = refusal(lambda: read_contents(str(tmp_path / "copy")), InputError)
        if said is None:
            contents = read_contents(str(copy))
            assert contents.compression > 0
            assert 1 <= contents.average_bits <= 8
        shutil.rmtree(copy)
