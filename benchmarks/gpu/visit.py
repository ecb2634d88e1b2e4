"""One visit to a GPU: everything that only hardware can tell, in four calls of at most ten minutes.

    python -m benchmarks.gpu.visit --call 1
    python -m benchmarks.gpu.visit --cpu-rehearsal

Run it from the checkout, on a GPU that does nothing else. Every phase runs in a process of its own, which ends at the
phase's deadline, so that neither a crash nor a hang takes the other phases with it. Results go into
`benchmarks/results/gpu/<gpu>/`, a JSON file a phase, written after every row; the same call goes on with the rows that
are missing. Rows that other kernels gave are measured again.

| call | phases |
|---|---|
| 1 | ceilings, compile (into Triton's cache, in parallel), correctness, splits (the cost model put to the test) |
| 2 | tune (writes the table of launches beside the results: copy it to kernels/configs), products |
| 3 | whole_model, operators |
| 4 | calibration, blocks, deepspeed: these need what a run of a recipe needs |
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
CALLS = {
    1: {"ceilings": 40, "compile": 180, "correctness": 140, "splits": 150},
    2: {"tune": 270, "products": 270},
    3: {"whole_model": 420, "operators": 90},
    4: {"blocks": 120, "deepspeed": 150, "calibration": 260},
}
"""Call → phase → seconds."""
FUNCTIONS = {
    "ceilings": "ceilings:run",
    "compile": "compiling:run",
    "correctness": "correctness:run",
    "splits": "splits:run",
    "tune": "tuning:run",
    "products": "products:run",
    "whole_model": "whole_model:run",
    "operators": "operators:run",
    "blocks": "runs:blocks",
    "deepspeed": "runs:deepspeed",
    "calibration": "runs:calibration",
}
"""Phase → module and function."""
GRACE = 15  # seconds that a phase may take beyond its deadline to end by itself


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, and run the phases one after another.

    Returns:
        The exit status: 0, or 1 if a phase failed or was ended.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.visit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--call", type=int, choices=CALLS, help="which call; a rehearsal without it runs all")
    parser.add_argument("--skip", action="append", default=[], choices=FUNCTIONS, metavar="PHASE", help="repeatable")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results, by GPU")
    parser.add_argument(
        "--cpu-rehearsal", action="store_true", help="run every phase at tiny sizes without a GPU; nothing is measured"
    )
    given = parser.parse_args(arguments)
    if given.call is None and not given.cpu_rehearsal:
        parser.error("which call? give --call 1, 2, 3 or 4, or --cpu-rehearsal")
    if given.cpu_rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    else:
        import torch

        if not torch.cuda.is_available():
            parser.error("PyTorch finds no GPU; --cpu-rehearsal runs without one")
    context = multiprocessing.get_context("forkserver")  # what all phases import is imported once, without CUDA
    context.set_forkserver_preload(sorted({f"benchmarks.gpu.{each.split(':')[0]}" for each in FUNCTIONS.values()}))
    failed = []
    for phase, seconds in phases(given.call).items():
        process = context.Process(target=run_phase, args=(phase, seconds, given.output, given.cpu_rehearsal))
        if phase not in given.skip and not _run(phase, process, seconds + GRACE):
            failed.append(phase)
    sys.stdout.write(f"Phases that failed or were ended: {', '.join(failed)}\n" if failed else "All phases are done.\n")
    return 1 if failed else 0


def phases(call: int | None) -> dict[str, int]:
    """Return the phases of a call and their seconds; those of all calls without one."""
    chosen = CALLS.values() if call is None else [CALLS[call]]
    return {phase: seconds for each in chosen for phase, seconds in each.items()}


def _run(phase: str, process: BaseProcess, seconds: int) -> bool:
    """Run the process of a phase, end it after some seconds, and return whether it went well."""
    start = time.monotonic()
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.terminate()
        process.join(GRACE)
        process.kill()
        process.join()
    sys.stdout.write(f"{phase}: {time.monotonic() - start:.0f} s, exit status {process.exitcode}\n")
    sys.stdout.flush()
    return process.exitcode == 0


def run_phase(phase: str, seconds: int, output: Path, rehearsal: bool) -> None:
    """Run a phase in this process.

    Args:
        phase: name of the phase.
        seconds: seconds until its deadline.
        output: folder of the results of all GPUs.
        rehearsal: whether it runs without a GPU; a failure then ends it, instead of becoming a row.
    """
    deadline = time.monotonic() + seconds
    from benchmarks.gpu.machine import open_visit
    from benchmarks.gpu.rows import DeadlinePassed, Rows

    visit = open_visit(output, rehearsal)
    rows = Rows(visit.folder / f"{phase}.json", visit.describe(), deadline, strict=rehearsal)
    module, function = FUNCTIONS[phase].split(":")
    try:
        getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(visit, rows)
    except DeadlinePassed as passed:
        sys.stdout.write(f"{phase}: {passed}\n")
    else:
        rows.write(complete=True)


if __name__ == "__main__":
    sys.exit(main())
