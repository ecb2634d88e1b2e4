"""The checkout, and commands run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSOLE = ["-c", "import sys; from slimplus.cli.main import main; sys.exit(main())"]
"""Arguments of Python that do what the console script does."""


def run_console(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`slimplus` with these arguments."""
    return subprocess.run(
        [sys.executable, *CONSOLE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def run_code(code: str, **environment: str) -> None:
    """Python code that must not fail, where variables such as TRITON_INTERPRET are read by an import."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
