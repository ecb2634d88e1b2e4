"""Every method side by side on one model: perplexity, bits, sizes, time, memory.

    python benchmarks/methods.py --calibration FILE --evaluation FILE [--runs runs] [key=value ...]

Runs the real command once for each method (finished runs are reused) and writes one JSON with the machine, the versions
and the commit into benchmarks/results/. Full precision is measured once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from slimplus.machine import describe_machine

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "smollm2_135m_2bit"
TOKENS = ("data.samples=64", "data.sequence_length=512")
# Training sees windows half as long, 8 times: 512 steps a block.
TRAINING = ("data.samples=64", "data.sequence_length=256", "training.epochs=8", "training.learning_rate=0.01")
UNUSED = ("data.samples=1", "data.sequence_length=512")  # rounding to nearest looks at no text
METHODS = {"rtn": UNUSED, "gptq": TOKENS, "slimllm": TOKENS, "slimllm_plus": TRAINING}


def main() -> None:
    """Parse the arguments, run the methods, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--evaluation", required=True, help="text to measure perplexity on")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder for the runs, one a method")
    arguments, overrides = parser.parse_known_args()
    rows = {}
    for method, keys in METHODS.items():
        folder = arguments.runs / method
        texts = (f"data.calibration.path={arguments.calibration}", f"data.evaluation.path={arguments.evaluation}")
        command = [f"recipe={RECIPE}", *texts, "data.evaluation.windows=16", *keys, f"quantization.method={method}"]
        _reuse_full_precision(folder, arguments.runs)
        commit = _note_commit(folder)
        subprocess.run(
            [sys.executable, ROOT / "train.py", *command, f"run_dir={folder}", *overrides], check=True, cwd=ROOT
        )
        metrics = json.loads((folder / "metrics.json").read_text())
        rows[method] = {"settings": [*keys, *overrides], "commit": commit, **metrics}
    result = {"recipe": RECIPE, "machine": describe_machine(), "methods": rows}
    file = ROOT / "benchmarks" / "results" / "smollm2_135m_methods.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(table(rows) + "\n")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    full = next(iter(rows.values()))["perplexity"]["full"]
    lines = [
        "| method | calibration | perplexity | average bits | bits per weight stored | minutes | peak memory |",
        "|---|---|---|---|---|---|---|",
        f"| full precision | | {full:.2f} | 16 | 16 | | |",
    ]
    for method, row in rows.items():
        settings = dict(setting.split("=") for setting in row["settings"])
        windows = "none" if method == "rtn" else f"{settings['data.samples']} × {settings['data.sequence_length']}"
        steps = ", 512 steps a block" if "training.epochs" in settings else ""
        lines.append(
            f"| `{method}` | {windows}{steps} | {row['perplexity']['quantized']:.1f} | {row['average_bits']:.3f} | "
            f"{row['bits_per_weight']:.3f} | {row['seconds']['blocks'] / 60:.0f} | "
            f"{row['peak_memory_bytes'] / 1e9:.1f} GB |"
        )
    return "\n".join(lines)


def _reuse_full_precision(folder: Path, runs: Path) -> None:
    """Hand the full-precision perplexity of a finished run to a new one; it counts only on the same windows."""
    finished = [file for method in METHODS if (file := runs / method / "metrics.json").is_file()]
    if finished and not (folder / "metrics.json").exists():
        metrics = json.loads(finished[0].read_text())
        folder.mkdir(parents=True, exist_ok=True)
        kept = {"evaluation": metrics["evaluation"], "perplexity": {"full": metrics["perplexity"]["full"]}}
        (folder / "metrics.json").write_text(json.dumps(kept | {"seconds": {}}))


def _note_commit(folder: Path) -> str:
    """The commit a run was begun with, kept beside it: a finished run may be collected by a later one."""
    note = folder / "commit"
    if not note.exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(head.stdout.strip())
    return note.read_text()


if __name__ == "__main__":
    main()
