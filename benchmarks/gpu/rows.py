"""Rows of measurements in a JSON file that is whole after every row, so that a later call goes on where one stopped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from triton.errors import TritonError

from slimplus.utils.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError),
    *(TypeError, ValueError, TritonError),
)
"""What a measurement may raise without ending its phase."""


class DeadlinePassed(Exception):
    """Raised in the place of a measurement for which no time is left."""


class Rows:
    """The rows of one phase.

    Rows of the file are kept if they were measured with the same kernels and did not fail.

    Args:
        file: the JSON file.
        machine: description of the machine, which goes into the file.
        deadline: time on the clock `time.monotonic` from which nothing is measured.
        strict: whether a failure ends the phase instead of becoming a row.
    """

    def __init__(self, file: Path, machine: Mapping[str, Any], deadline: float, strict: bool) -> None:
        self.file, self.machine, self.deadline, self.strict = file, dict(machine), deadline, strict
        self.kernels = kernels_fingerprint()
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        kept = found.get("rows", []) if found.get("kernels") == self.kernels else []
        self.rows: list[dict[str, Any]] = [row for row in kept if "failure" not in row]

    def measure(self, case: Mapping[str, Any], measurement: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the row of a case, measured unless the file holds it.

        Args:
            case: what is measured; no two cases of a phase are equal.
            measurement: function that returns the further entries of the row.

        Raises:
            DeadlinePassed: if no time is left.
        """
        case = json.loads(json.dumps(case))  # as it comes back from the file
        for row in self.rows:
            if all(row.get(key) == value for key, value in case.items()):
                return row
        if time.monotonic() > self.deadline:
            raise DeadlinePassed(f"no time was left for {case}")
        start = time.monotonic()
        try:
            found = dict(measurement())
        except FAILURES as failure:
            if self.strict:
                raise
            found = {"failure": f"{type(failure).__name__}: {failure}"[:2000]}
        row = {**case, **found, "wall_seconds": round(time.monotonic() - start, 3)}
        self.rows.append(row)
        self.write(complete=False)
        sys.stdout.write(f"{self.file.stem}: {_brief(row)}\n")
        sys.stdout.flush()
        return row

    def write(self, complete: bool) -> None:
        """Write the file; `complete` says that no case of the phase is left."""
        content = {"machine": self.machine, "kernels": self.kernels, "complete": complete, "rows": self.rows}
        write_atomic(self.file, json.dumps(content, indent=1) + "\n")


def kernels_fingerprint() -> str:
    """Return a hash of the kernels' source code, which says whether two rows were measured with the same ones."""
    sources = sorted((ROOT / "kernels").glob("*.py"))
    return sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def _brief(row: Mapping[str, Any]) -> str:
    """Return a row on one line, without its nested entries."""
    return ", ".join(f"{key} {value}" for key, value in row.items() if not isinstance(value, dict | list))
