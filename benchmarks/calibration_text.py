"""Which calibration text makes a quantized model lose least on texts of other kinds, at equal tokens and steps.

    python benchmarks/calibration_text.py --texts FOLDER [--held-out KIND ...] [--wikitext2 CALIBRATION EVALUATION]

FOLDER holds `KIND.calibration.txt` and `KIND.evaluation.txt`, of each kind one of them or both. Models are calibrated
on the former and WikiText-2, and measured on the latter, WikiText-2's test split, and Python's documentation, whose
two parts share no paragraph (`offline`). Kinds that are held out are measured on, and in no mix.

1. Each variant of the calibration text quantizes with the command that users run, blocks only, in a process of its own.
2. `slimplus evaluate` measures the full-precision model once, and then each result, on every evaluation text.
3. A row goes into the JSON as soon as it is measured. A row that is there is not made again, and a killed run goes on,
   so that the table can be filled piece by piece.
4. The table is printed: perplexity over that of full precision for each text, and the geometric mean of these ratios
   over all texts and over those held out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from slimplus.data.text import load_text
from slimplus.recipe.parsing import load_recipe
from slimplus.utils.errors import InputError
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import commit, describe_machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "calibration_text.json"
RECIPE = "smollm2_135m_2bit"
FULL, WIKITEXT, PYTHON = "full precision", "WikiText-2", "Python docs"
MIX = "mix"  # the folder of the calibration texts of all kinds

Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A calibration text.

    Attributes:
        weights: text → its weight: `WIKITEXT`, `PYTHON`, `MIX` (each kind of the folder gets an equal part of its
            weight), or `self`.
        prompts: what the model continues in the text that it writes itself: `WIKITEXT` or `MIX`.
        generation: further keys of `data.generation`.
    """

    weights: Mapping[str, float]
    prompts: str | None = None
    generation: tuple[str, ...] = ()


PREFIX = ("prefix_tokens=16",)
VARIANTS = {
    WIKITEXT: Variant({WIKITEXT: 1}),
    PYTHON: Variant({PYTHON: 1}),
    "mix": Variant({MIX: 1}),
    "self": Variant({"self": 1}),
    "self, chats": Variant({"self": 1}, generation=("chat=true",)),
    "self, after WikiText-2": Variant({"self": 1}, WIKITEXT, PREFIX),
    "self, after the mix": Variant({"self": 1}, MIX, PREFIX),
    "WikiText-2 and mix": Variant({WIKITEXT: 1, MIX: 1}),
    "WikiText-2 and self": Variant({WIKITEXT: 1, "self": 1}),
    "mix and self": Variant({MIX: 1, "self": 1}),
    "mix and self, after the mix": Variant({MIX: 1, "self": 1}, MIX, PREFIX),
    "Python docs and self": Variant({PYTHON: 1, "self": 1}),
    "WikiText-2, mix and self": Variant({WIKITEXT: 1, MIX: 1, "self": 1}),
}


@dataclass(frozen=True)
class Texts:
    """The texts of a call.

    Attributes:
        calibration: kind → file of the texts to calibrate on.
        wikitext: WikiText-2's text to calibrate on.
        evaluation: kind → text to measure on.
    """

    calibration: Mapping[str, Path]
    wikitext: str
    evaluation: Mapping[str, str]

    def keys(self, variant: Variant, folder: Path) -> list[str]:
        """Return the keys of the recipe for a variant; `folder` gets the texts of the mix, to take prompts from."""
        paths = {WIKITEXT: self.wikitext, PYTHON: "offline", "self": "self"}
        sources = [{"path": paths[name], "weight": weight} for name, weight in variant.weights.items() if name != MIX]
        part = variant.weights.get(MIX, 0) / len(self.calibration)
        sources += [{"path": str(file), "weight": part} for file in self.calibration.values() if part]
        keys = [f"data.calibration={json.dumps(sources)}", *(f"data.generation.{key}" for key in variant.generation)]
        if variant.prompts == MIX:
            folder.mkdir(parents=True, exist_ok=True)
            for kind, file in self.calibration.items():
                shutil.copyfile(file, folder / f"{kind}.txt")
        if variant.prompts is not None:
            keys.append(f"data.generation.prompts={folder if variant.prompts == MIX else self.wikitext}")
        return keys

    def digest(self) -> str:
        """Return a hash of all texts: figures on other texts do not compare."""
        hashed = sha256()
        for path in (self.wikitext, *map(str, self.calibration.values())):
            hashed.update(load_text(path, "calibration").encode())
        for kind, path in self.evaluation.items():
            hashed.update(kind.encode() + load_text(path, "evaluation").encode())
        return hashed.hexdigest()[:8]


def main() -> None:
    """Parse the arguments, run and measure the variants, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--texts", type=Path, required=True, metavar="FOLDER", help="texts of several kinds")
    parser.add_argument("--held-out", nargs="+", default=[], metavar="KIND", help="kinds to leave out of the mix")
    parser.add_argument(
        "--wikitext2",
        nargs=2,
        default=("wikitext2", "wikitext2"),
        metavar=("CALIBRATION", "EVALUATION"),
        help="two files where the hub is out of reach; default: its training and its test split from the hub",
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens in a calibration window")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the windows for each block")
    parser.add_argument("--evaluation-windows", type=int, default=16, help="windows of each evaluation text")
    parser.add_argument("--evaluation-length", type=int, default=512, help="tokens in an evaluation window")
    parser.add_argument("--seed", type=int, default=0, help="seed of windows, draws and training")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "calibration_text", help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON")
    parser.add_argument("--keys", nargs="+", default=[], metavar="KEY=VALUE", help="further keys of every recipe")
    given = parser.parse_args()
    try:
        texts = find_texts(given.texts, given.held_out, *given.wikitext2)
        budget = make_budget(given, texts.digest())
        keys = {name: texts.keys(VARIANTS[name], given.runs / budget["texts"] / "mix") for name in given.variants}
        for name in given.variants:
            load_recipe([f"recipe={RECIPE}", *keys[name], *recipe_keys(budget)])
    except InputError as error:
        parser.error(str(error))
    runs = given.runs / sha256(json.dumps(budget).encode()).hexdigest()[:8]
    try:
        full = known_row(FULL, budget, given.results) or measure_full(budget, texts, given.results)
        for name in given.variants:
            if known_row(name, budget, given.results) is None:
                folder = runs / name.replace(", ", "-").replace(" ", "_")
                keep(measure(name, keys[name], budget, texts, folder), given.results)
    except subprocess.CalledProcessError as error:
        parser.exit(1, f"a command ended with status {error.returncode}; its message above says why\n")
    rows = [row for row in json.loads(given.results.read_text())["rows"] if row["budget"] == budget]
    sys.stdout.write(table(rows, full["perplexity"], given.held_out) + "\n")


def find_texts(folder: Path, held_out: Sequence[str], wikitext_calibration: str, wikitext_evaluation: str) -> Texts:
    """Return the texts in a folder, WikiText-2, and Python's documentation.

    Raises:
        InputError: if the folder holds no text to calibrate on, or none of a kind that is to be held out.
    """
    parts = {
        name: {file.name.partition(".")[0]: file for file in sorted(folder.glob(f"*.{name}.txt"))}
        for name in ("calibration", "evaluation")
    }
    calibration = {kind: file for kind, file in parts["calibration"].items() if kind not in held_out}
    both = parts["calibration"] | parts["evaluation"]
    if unknown := [kind for kind in held_out if kind not in both]:
        raise InputError(f"--held-out: {folder} holds no text called {unknown[0]}; give some of {', '.join(both)}")
    if not calibration:
        raise InputError(f"--texts: {folder} holds no KIND.calibration.txt for a mix; give a folder with some")
    evaluation = {kind: str(file) for kind, file in parts["evaluation"].items()} | {
        kind: str(both[kind]) for kind in held_out
    }
    evaluation |= {WIKITEXT: wikitext_evaluation, PYTHON: "offline"}
    return Texts(calibration, wikitext_calibration, evaluation)


def make_budget(given: argparse.Namespace, texts: str) -> dict[str, Any]:
    """Return what all variants have in common, and what tells their rows from those of other calls."""
    names = ("samples", "sequence_length", "epochs", "evaluation_windows", "evaluation_length", "seed", "keys")
    return {name: getattr(given, name) for name in names} | {"texts": texts}


def recipe_keys(budget: Mapping[str, Any]) -> list[str]:
    """Return the keys that all variants have in common."""
    return [
        "end_to_end.epochs=0",
        "training.batch_size=1",
        "data.evaluation.windows=1",
        f"data.evaluation.sequence_length={budget['evaluation_length']}",
        *(f"data.{name}={budget[name]}" for name in ("samples", "sequence_length")),
        f"training.epochs={budget['epochs']}",
        f"seed={budget['seed']}",
        *budget["keys"],
    ]


def measure_full(budget: Mapping[str, Any], texts: Texts, results: Path) -> Row:
    """Measure the full-precision model, and return its row, which goes into the results."""
    model = load_recipe([f"recipe={RECIPE}", *budget["keys"]]).model
    path = f"{model.path}/{model.gguf_file}" if model.gguf_file else model.path
    row = {"calibration": FULL, "budget": dict(budget), "machine": describe_machine()}
    row["perplexity"] = perplexities(path, budget, texts)
    keep(row, results)
    return row


def measure(name: str, keys: Sequence[str], budget: Mapping[str, Any], texts: Texts, folder: Path) -> Row:
    """Finish the run of a variant, measure its result, and return its row."""
    arguments = [f"recipe={RECIPE}", *keys, *recipe_keys(budget)]
    if "self" in VARIANTS[name].weights:
        arguments.append(f"data.generation.seed={budget['seed']}")
    if not (folder / "commit").exists():  # the commit at which the run begins
        write_atomic(folder / "commit", str(commit()))
    subprocess.run([sys.executable, ROOT / "train.py", *arguments, f"run_dir={folder}"], check=True, cwd=ROOT)
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "calibration": name,
        "budget": dict(budget),
        "data": [key for key in keys if key.startswith("data.generation.")],
        "machine": describe_machine() | {"commit": (folder / "commit").read_text()},
        "average_bits": metrics["average_bits"],
        "seconds": metrics["seconds"],
        "perplexity": perplexities(str(folder / "packed"), budget, texts),
    }


def perplexities(path: str, budget: Mapping[str, Any], texts: Texts) -> dict[str, float]:
    """Return the perplexity of a model on each evaluation text by its kind, measured in a process of its own."""
    options = [f"--windows={budget['evaluation_windows']}", f"--sequence-length={budget['evaluation_length']}"]
    options += ["--dtype=float32", *(f"--text={text}" for text in texts.evaluation.values())]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        console = "import sys; from slimplus.cli.main import main; sys.exit(main())"
        command = [sys.executable, "-c", console, "evaluate", path, *options, f"--json={file}"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        rows = json.loads(file.read_text())["texts"]
    return {kind: row["perplexity"]["checkpoint"] for kind, row in zip(texts.evaluation, rows, strict=True)}


def known_row(name: str, budget: Mapping[str, Any], file: Path) -> Row | None:
    """Return the row of a variant and a budget from the results, or None if there is none."""
    rows: list[Row] = json.loads(file.read_text())["rows"] if file.exists() else []
    return next((row for row in rows if row["calibration"] == name and row["budget"] == budget), None)


def keep(row: Row, file: Path) -> None:
    """Add a row to the results."""
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    write_atomic(file, json.dumps({"rows": [*rows, row]}, indent=2) + "\n")


def table(rows: Sequence[Row], full: Mapping[str, float], held_out: Sequence[str]) -> str:
    """Return perplexity over that of full precision as a Markdown table, the best geometric mean first.

    Args:
        rows: the rows of one budget.
        full: perplexity at full precision by kind of text.
        held_out: kinds that no variant is calibrated on.
    """
    lines = ["calibration text", *full, "geometric mean", *(["of those held out"] if held_out else [])]
    found = []
    for row in rows:
        if row["calibration"] != FULL:
            ratios = {kind: row["perplexity"][kind] / value for kind, value in full.items()}
            means = [geometric_mean(ratios.values())]
            means += [geometric_mean(ratios[kind] for kind in held_out)] if held_out else []
            found.append((means[0], [row["calibration"], *(f"{value:.2f}" for value in [*ratios.values(), *means])]))
    cells = [lines, ["---"] * len(lines), *(line for _, line in sorted(found))]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


if __name__ == "__main__":
    main()
