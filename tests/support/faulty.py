"""The command with faults: run as a script it does what train.py does, after breaking something.

`python tests/support/faulty.py FAULTS key=value ...` runs once, FAULTS being JSON. Without arguments it imports
everything and then takes jobs from its standard input, each in a process forked from there: a start costs no imports.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Faults:
    """What is to go wrong. Events are fsyncs, renames, removals, training steps and blocks run, counted from 1.

    Attributes:
        signal_at: `[event, signal]`, sent to the process itself just before the event.
        signal_batch: `[batch, signal]`, sent to the process itself in that training batch.
        environment: variables to set first.
        full_at: the event, an fsync, at which the disk is full, and stays so.
        nan_steps: training batches, from 1, whose loss is not a number; each process counts its own.
        explode_step: training batch whose loss is a million times too large.
        rank: the local rank that these happen on; others are sound. All, if it is None.
        largest_batch: windows beyond which a training batch does not fit the device.
        singular: the Hessian of layers with that many inputs has one direction only.
        overflow: and that is infinite.
        worsen: training ends above the calibrated loss.
    """

    def __init__(self, faults: dict[str, Any]) -> None:
        self.faults, self.events, self.batches = faults, 0, 0

    def install(self) -> None:
        import torch

        from slimplus.models.streaming import BlockRunner
        from slimplus.quantization.salience import HessianAccumulator
        from slimplus.training import reconstruction
        from slimplus.training.step_guard import StepGuard

        if self.faults.get("rank", None) not in (None, int(os.environ.get("LOCAL_RANK", "0"))):
            return
        for owner, name in (
            *((os, name) for name in ("fsync", "unlink", "rename", "replace")),
            (StepGuard, "admits"),
            (BlockRunner, "run"),
        ):
            setattr(owner, name, self._counted(getattr(owner, name), name))
        exact = reconstruction.reconstruction_loss

        def loss(output: torch.Tensor, target: torch.Tensor, *others: Any) -> torch.Tensor:
            result = exact(output, target, *others)
            if not torch.is_grad_enabled():
                return result
            self.batches += 1
            at, number = self.faults.get("signal_batch", (0, 0))
            if self.batches == at:
                os.kill(os.getpid(), number)
            if len(output) > self.faults.get("largest_batch", 1000):
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            if self.batches in self.faults.get("nan_steps", []):
                return result * torch.nan
            if self.faults.get("worsen"):
                return 2 * result.detach() - result  # the same loss with its gradient reversed
            return result * 1e6 if self.batches == self.faults.get("explode_step") else result

        reconstruction.reconstruction_loss = loss  # type: ignore[assignment]
        add = HessianAccumulator.add

        def add_one_direction(self_: HessianAccumulator, inputs: torch.Tensor) -> None:
            size = torch.inf if self.faults.get("overflow") else 1e3
            one = torch.ones_like(inputs) * size if inputs.shape[-1] == self.faults["singular"] else inputs
            add(self_, one)

        if "singular" in self.faults:
            HessianAccumulator.add = add_one_direction  # type: ignore[method-assign, assignment]

    def _counted(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.events += 1
            at, number = self.faults.get("signal_at", (0, 0))
            if self.events == at:
                os.kill(os.getpid(), number)
            if name == "fsync" and self.events >= self.faults.get("full_at", 1e9):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return counted


def run(faults: dict[str, Any], arguments: list[str]) -> int:
    from slimplus.cli.train import train

    os.environ.update(faults.get("environment", {}))
    faulty = Faults(faults)
    faulty.install()
    status = train(arguments)
    if "count" in faults:
        Path(faults["count"]).write_text(str(faulty.events))
    return status


def serve() -> None:
    import slimplus.pipeline.run  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            with open(job["log"], "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            status = 1
            try:
                status = run(job["faults"], job["arguments"])
            except:  # noqa: E722  whatever it is, this process must not go on as the server
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, ended = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(ended)}\n")
        sys.stdout.flush()


class Server:
    """Runs jobs in processes forked from one that has everything imported."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "job.log"
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def __call__(self, arguments: list[str], **faults: Any) -> tuple[int, str]:
        """Exit status (negative: the signal that killed it) and what it said."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"arguments": arguments, "faults": faults, "log": str(self.log)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return status, self.log.read_text()

    def close(self) -> None:
        self.process.communicate(timeout=60)


def environment() -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    for key in ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE"):
        inherited.pop(key, None)
    return inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if len(sys.argv) > 1:
        sys.exit(run(json.loads(sys.argv[1]), sys.argv[2:]))
    serve()
