"""Try every language model of transformers by the self-check: benchmarks/results/architectures.json, and the table.

    python -m benchmarks.architectures [MODEL_TYPE ...]

Configurations are the defaults of each `model_type`, those that read images among them. All of them take an hour on two
cores; with model types, only their rows are made again. `--table` only writes docs/architectures.md from the JSON. No
weights are needed.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES

from slimplus.models.loading import ModelLoadError, build_on_meta
from slimplus.pipeline.model_checks import LEAST_PACKED
from slimplus.pipeline.self_check import ERRORS, describe, self_check
from slimplus.utils.errors import InputError, first_line, named_first_line
from slimplus.utils.files import write_atomic
from slimplus.utils.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "architectures.md", ROOT / "benchmarks" / "results" / "architectures.json"
RULE = "|---|---|---|---|\n"

Row = dict[str, Any]


def row(model_type: str) -> Row:
    """Return what is found of one architecture.

    It holds `model_type` and `outcome`, and, if a model can be built, the path of its `blocks` and the `packed_share`.
    """
    found: Row = {"model_type": model_type}
    try:
        config = CONFIG_MAPPING[model_type]()
        report = describe(build_on_meta(config))
        found |= {"blocks": report.path, "packed_share": report.share}
        self_check(config)
        outcome = "yes" if report.share >= LEAST_PACKED else "with model.allow_unpacked=true"
    except ModelLoadError as error:
        cause = error.__cause__ or error
        outcome = f"no: its default configuration builds no model ({named_first_line(cause)})"
    except InputError as error:
        outcome = "no: " + (str(error).partition("is not supported: ")[2] or str(error))
    except ERRORS as error:
        outcome = f"no: its default configuration builds no model ({type(error).__name__}: {first_line(error)})"
    return found | {"outcome": outcome}


def line(row: Row) -> str:
    """Return a row as a line of the table."""
    outcome = row["outcome"].replace("|", "/").replace("model.allow_unpacked=true", "`model.allow_unpacked=true`")
    blocks, share = (f"`{row['blocks']}`", f"{row['packed_share']:.1%}") if "blocks" in row else ("", "")
    return f"| `{row['model_type']}` | {outcome} | {blocks} | {share} |"


def table(rows: list[Row]) -> str:
    """Return the page with a line of its table for each row."""
    head, rule, _ = PAGE.read_text(encoding="utf-8").partition(RULE)
    return head + rule + "".join(f"{line(row)}\n" for row in sorted(rows, key=lambda row: row["model_type"]))


def main() -> None:
    """Parse the arguments, make the rows, and write each into the JSON and the page as it is made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="architectures to try; default: all")
    parser.add_argument("--table", action="store_true", help="try none, and write the table from the JSON")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    results = json.loads(RESULTS.read_text())
    rows = {found["model_type"]: found for found in results["rows"]}
    machine = describe_machine()
    for model_type in tqdm([] if given.table else given.model_types or sorted({*TEXT, *IMAGES})):
        rows[model_type] = row(model_type) | {"machine": machine}
        results["rows"] = [rows[name] for name in sorted(rows)]
        write_atomic(RESULTS, json.dumps(results, indent=2) + "\n")
    write_atomic(PAGE, table(list(rows.values())))


if __name__ == "__main__":
    main()
