"""Try every causal language model of transformers by the self-check, and write docs/architectures.md.

    python -m benchmarks.architectures [MODEL_TYPE ...]

Configurations are the defaults of each `model_type`. The whole table takes half an hour on two cores; with model types,
only their rows are made again. No weights are needed.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import transformers
from tqdm import tqdm
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slimplus.models.loading import build_on_meta
from slimplus.pipeline.model_checks import LEAST_PACKED
from slimplus.pipeline.self_check import ERRORS, describe, self_check
from slimplus.utils.errors import InputError, first_line

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
ROW = re.compile(r"^\| `([^`]+)` \|.*$", re.MULTILINE)


def row(model_type: str) -> str:
    """Return the line of the table for one architecture."""
    blocks = share = ""
    try:
        config = CONFIG_MAPPING[model_type]()
        report = describe(build_on_meta(config))
        blocks, share = f"`{report.path}`", f"{report.share:.1%}"
        self_check(config)
        outcome = "yes" if report.share >= LEAST_PACKED else "with `model.allow_unpacked=true`"
    except InputError as error:
        outcome = "no: " + (str(error).partition("is not supported: ")[2] or str(error))
    except ERRORS as error:
        outcome = f"no: its default configuration builds no model ({type(error).__name__}: {first_line(error)})"
    return f"| `{model_type}` | {outcome.replace('|', '/')} | {blocks} | {share} |"


def main(chosen: list[str]) -> None:
    """Make the rows of the chosen architectures, or of all, and write each into the page as it is made."""
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    head, line, _ = PAGE.read_text().partition("|---|---|---|---|\n")
    rows = {match[1]: match[0] for match in ROW.finditer(PAGE.read_text().partition("|---|")[2])}
    for model_type in tqdm(chosen or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        rows[model_type] = row(model_type)
        PAGE.write_text(head + line + "\n".join(rows[name] for name in sorted(rows)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
