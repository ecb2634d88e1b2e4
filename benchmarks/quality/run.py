"""Every method side by side on one model: perplexity, bits, sizes, time, memory.

    python benchmarks/quality/run.py --calibration FILE --evaluation wikitext2=FILE python=offline [--methods NAME ...]

1. Each method quantizes with the command that users run, in a process of its own, on the same windows of the same text,
   and with the same number of optimizer steps a block if it trains.
2. Every result is measured in the same way on every evaluation text.
3. A result goes into the JSON as soon as it is measured, beside the results of earlier calls. Finished runs are reused
   and killed ones go on, so that the table can be filled piece by piece.
4. The table is printed. `benchmarks/quality/report.py` draws the figure of the README from the JSON.

`--keys` go to every method, as to train.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from methods import AUTOROUND, AUTOROUND_KEYS, FULL, METHODS, Budget, identity
from report import table

from slimplus.data.text import load_text
from slimplus.recipe.parsing import load_recipe
from slimplus.utils.errors import PREEMPTED, InputError
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import commit, describe_machine

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
RECIPE = "smollm2_135m_2bit_best"
FIGURES = (
    *("average_bits", "bits_per_weight", "seconds", "peak_memory_bytes", "peak_device_memory_bytes"),
    *("allocation_gap", "end_to_end"),
)

Row = dict[str, Any]
Texts = Mapping[str, str]


def main() -> None:
    """Parse the arguments, run and measure the methods, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--calibration", required=True, help="text to calibrate on: a file, or a name train.py knows")
    parser.add_argument(
        "--evaluation", nargs="+", required=True, metavar="NAME=TEXT", help="texts to measure perplexity on"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="methods to compare"
    )
    parser.add_argument("--bits", type=int, default=2, help="average bits of a weight")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens in a calibration window")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the windows for each block")
    parser.add_argument("--end-to-end-epochs", type=int, default=4, help="passes over the windows for the whole model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the windows and of training")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality", help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON")
    parser.add_argument("--keys", nargs="+", default=[], metavar="KEY=VALUE", help="keys of every method's recipe")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))  # which ends the process at work as well
    if unnamed := [text for text in given.evaluation if "=" not in text]:
        parser.error(f"--evaluation: {unnamed[0]!r} is not of the form NAME=TEXT, such as wikitext2={unnamed[0]}")
    texts = dict(text.split("=", 1) for text in given.evaluation)
    steps = (given.samples, given.sequence_length, given.epochs, given.end_to_end_epochs)
    budgets = [Budget(given.bits, *steps, seed, tuple(given.keys)) for seed in given.seeds]
    try:
        check_keys(given.methods, budgets[0])
        digest = sha256(load_text(given.calibration, "calibration").encode()).hexdigest()[:8]
    except InputError as error:
        parser.error(str(error))
    try:
        for budget in budgets:
            for method in given.methods:
                keep(measured(method, budget, given.calibration, texts, given.runs / digest), given.results)
    except subprocess.CalledProcessError as error:
        parser.exit(1, f"{method}: its run ended with status {error.returncode}; its message above says why\n")
    sys.stdout.write(table(json.loads(given.results.read_text())["rows"]) + "\n")


def check_keys(methods: Sequence[str], budget: Budget) -> None:
    """Check that all methods take the keys, before any long work.

    Raises:
        InputError: if one does not; the message names the method.
    """
    for method in methods:
        try:
            load_recipe([f"recipe={RECIPE}", *budget.keys(method)])
            if method == AUTOROUND and (
                unread := [key for key in budget.overrides if not key.startswith(AUTOROUND_KEYS)]
            ):
                raise InputError(f"{unread[0]} does not apply")
        except InputError as error:
            raise InputError(f"{method}: {error}; leave {method} out of --methods, or give other --keys") from error


def measured(method: str, budget: Budget, calibration: str, texts: Texts, runs: Path) -> Row:
    """Run a method unless its run is finished, measure its result, and return its row.

    Args:
        method: a name in `METHODS`.
        budget: what all methods have in common.
        calibration: the calibration text.
        texts: name → evaluation text.
        runs: folder for the runs.
    """
    folder = runs / budget.folder_name(method)
    evaluated = f"data.evaluation.path={next(iter(texts.values()))}"
    common = [f"recipe={RECIPE}", f"data.calibration.path={calibration}", evaluated]
    row = budget.row(method, Path(calibration).name)
    if method == FULL:
        row["machine"] = describe_machine()
    else:
        _quantize(method, budget, common, runs)
        metrics = json.loads((folder / "metrics.json").read_text())
        row |= {key: metrics[key] for key in (*FIGURES, "version") if key in metrics}
        row["machine"] = describe_machine() | {"commit": (folder / "commit").read_text()}
    row["perplexity"] = _measure_apart(method, [*common, *budget.keys(method)], dict(texts), folder)
    return row


def _measure_apart(*arguments: Any) -> dict[str, float]:
    """Return `perplexities` of the same arguments, measured in a process of its own.

    Otherwise the next run, a new process, would start with the peak memory of the measurement. A process of a pool
    would wait for ever once this process is killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_perplexities, args=(sender, *arguments))
    process.start()
    sender.close()
    try:
        measured: dict[str, float] = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{arguments[0]} could not be measured; the message above says why") from None
    finally:
        process.kill()  # it has sent its result, or must not go on
        process.join()
    return measured


def _send_perplexities(sender: Connection, *arguments: Any) -> None:
    """Measure in this process, and send the result."""
    sender.send(perplexities(*arguments))


def _quantize(method: str, budget: Budget, common: list[str], runs: Path) -> None:
    """Finish the run of a method; a method that follows another one starts from a copy of the other's finished run."""
    folder, after = runs / budget.folder_name(method), METHODS[method].after
    arguments = [*common, *budget.keys(method)]
    if method == AUTOROUND:
        command = [ROOT / "benchmarks" / "quality" / "autoround.py", folder, *arguments]
        if (folder / "metrics.json").exists():
            return
    else:
        command = [ROOT / "train.py", *arguments, "data.evaluation.windows=1", f"run_dir={folder}"]
    if after is not None and not folder.exists():
        _quantize(after, budget, common, runs)
        copy = folder.with_suffix(".copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(runs / budget.folder_name(after), copy, ignore=shutil.ignore_patterns("commit"))
        copy.rename(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "commit").exists():  # the commit at which the run begins
        write_atomic(folder / "commit", str(commit()))
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def perplexities(method: str, arguments: list[str], texts: Texts, folder: Path) -> dict[str, float]:
    """Return the perplexity of a method's model on each text, by the text's name.

    Args:
        method: a name in `METHODS`.
        arguments: the recipe of the method, as on the command line.
        texts: name → evaluation text.
        folder: folder of the method's run.
    """
    import torch  # not at the top, so that the process that starts the runs stays small
    from safetensors.torch import load_file

    from slimplus.data.windows import evaluation_windows
    from slimplus.distributed.strategies import launch
    from slimplus.evaluation.perplexity import perplexity
    from slimplus.hub.checkpoint import load
    from slimplus.models.precision import resolve_precision
    from slimplus.models.streaming import BlockRunner, StreamedModel
    from slimplus.pipeline.prepare import model_source

    recipe = load_recipe(arguments)
    source, evaluation = model_source(recipe), recipe.data.evaluation
    device = launch(recipe.trainer.accelerator, 1, 1, "auto").device
    runner = BlockRunner(device, resolve_precision(recipe.trainer.precision, device))
    if method in (FULL, AUTOROUND):
        model = source.model()
        if method == AUTOROUND:
            model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    else:
        model = load(
            folder / "packed", dtype=torch.float32
        )  # for what is not packed; autocast lowers it as the precision says
    streamed, measured = StreamedModel(model, runner), {}
    for name, path in texts.items():
        text = load_text(path, "evaluation")
        windows = evaluation_windows(text, source.tokenizer(), evaluation.windows, evaluation.sequence_length)
        measured[name] = perplexity(streamed, windows.tokens, f"{method} on {name}")
    return measured


def keep(row: Row, file: Path) -> None:
    """Put a row into the results, in the place of a row of the same identity.

    If both are of the same run, perplexities of other texts in the earlier row are kept.
    """
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    kept = {identity(before): before for before in rows}
    before = kept.get(identity(row), row)
    if before["machine"] == row["machine"] and before.get("seconds") == row.get("seconds"):
        row = row | {"perplexity": before["perplexity"] | row["perplexity"]}
    kept[identity(row)] = row
    write_atomic(file, json.dumps({"rows": list(kept.values())}, indent=2) + "\n")


if __name__ == "__main__":
    main()
