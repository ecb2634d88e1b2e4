"""Every method side by side on one model: perplexity, bits, sizes, time, memory.

    python benchmarks/quality/run.py --calibration FILE --evaluation wikitext2=FILE python=offline [--methods NAME ...]

Each method quantizes with the real command, in a process of its own, on the same windows of the same text, with the
same number of optimizer steps a block if it trains; every result is then measured in the same way on every evaluation
text. A result goes into the JSON as soon as it is there, beside those of earlier calls; finished runs are reused and
killed ones go on, so the table can be filled in pieces. The plot, which needs matplotlib, shows perplexity against
stored bits. `--keys` go to every method, as to train.py.
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

from methods import FULL, METHODS, PEER, PEER_KEYS, Budget, identity
from report import plot, table

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
    parser.add_argument("--evaluation", nargs="+", required=True, metavar="NAME=TEXT", help="texts to measure on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="rows")
    parser.add_argument("--bits", type=int, default=2, help="average bits of a weight")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens in a calibration window")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the windows for each block")
    parser.add_argument("--end-to-end-epochs", type=int, default=4, help="passes over them for the whole model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality", help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON; the plot stands beside it")
    parser.add_argument("--keys", nargs="+", default=[], metavar="KEY=VALUE", help="of the recipe, for every method")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))  # as Ctrl-C, it ends the process at work too
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
        parser.exit(1, f"{method}: its run ended with status {error.returncode}, and says above why\n")
    rows = json.loads(given.results.read_text())["rows"]
    sys.stdout.write(table(rows) + "\n")
    plot(rows, next(iter(texts)), given.results.with_suffix(".png"))


def check_keys(methods: Sequence[str], budget: Budget) -> None:
    """Raises `InputError` where one of the methods does not take the keys, before any long work."""
    for method in methods:
        try:
            load_recipe([f"recipe={RECIPE}", *budget.keys(method)])
            if method == PEER and (unread := [key for key in budget.overrides if not key.startswith(PEER_KEYS)]):
                raise InputError(f"{unread[0]} means nothing to it")
        except InputError as error:
            raise InputError(f"{method}: {error}; give --methods without it, or other --keys") from error


def measured(method: str, budget: Budget, calibration: str, texts: Texts, runs: Path) -> Row:
    """Run a method unless its run is finished, and measure what came of it."""
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
    """`perplexities` in a process of its own: the next run, a new process, begins with the peak memory of this one.

    Not in a pool, whose process waits for more for ever once this one is killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_perplexities, args=(sender, *arguments))
    process.start()
    sender.close()
    try:
        measured: dict[str, float] = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{arguments[0]} could not be measured; why is said above") from None
    finally:
        process.kill()  # it has sent what it measured, or is not to go on
        process.join()
    return measured


def _send_perplexities(sender: Connection, *arguments: Any) -> None:
    sender.send(perplexities(*arguments))


def _quantize(method: str, budget: Budget, common: list[str], runs: Path) -> None:
    """Have the run of a method finished; a run after another's has that one finished, and begins as a copy of it."""
    folder, after = runs / budget.folder_name(method), METHODS[method].after
    arguments = [*common, *budget.keys(method)]
    if method == PEER:
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
    if not (folder / "commit").exists():  # of a run, or of what follows another's, as it began
        write_atomic(folder / "commit", str(commit()))
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def perplexities(method: str, arguments: list[str], texts: Texts, folder: Path) -> dict[str, float]:
    """Perplexity of a method's model on each text, by the text's name."""
    import torch  # here, since the process that starts the runs stays small
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
    if method in (FULL, PEER):
        model = source.model()
        if method == PEER:
            model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    else:
        model = load(folder / "packed", dtype=torch.float32)  # what is not packed; autocast makes the rest
    streamed, measured = StreamedModel(model, runner), {}
    for name, path in texts.items():
        text = load_text(path, "evaluation")
        windows = evaluation_windows(text, source.tokenizer(), evaluation.windows, evaluation.sequence_length)
        measured[name] = perplexity(streamed, windows.tokens, f"{method} on {name}")
    return measured


def keep(row: Row, file: Path) -> None:
    """Put a row into the results, in the place of an earlier one of the same; of the same run, its texts stay."""
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    kept = {identity(before): before for before in rows}
    before = kept.get(identity(row), row)
    if before["machine"] == row["machine"] and before.get("seconds") == row.get("seconds"):
        row = row | {"perplexity": before["perplexity"] | row["perplexity"]}
    kept[identity(row)] = row
    write_atomic(file, json.dumps({"rows": list(kept.values())}, indent=2) + "\n")


if __name__ == "__main__":
    main()
