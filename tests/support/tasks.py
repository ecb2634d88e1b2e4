"""Tasks of lm-eval in local files."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

QUESTIONS = (
    ("The capital of France is", ("Paris", "Berlin", "Rome"), 0),
    ("A dog says", ("meow", "woof", "moo"), 1),
    ("Two plus two is", ("five", "four", "nine"), 1),
    ("The sun rises in the", ("basement", "west", "east"), 2),
    ("Grass is usually", ("blue", "green", "red"), 1),
)


def write_tasks(folder: Path) -> Path:
    """Write a multiple-choice task, `local_choice`, and a perplexity task, `local_page`, and return their folder."""
    choice = [{"question": question, "choices": choices, "label": label} for question, choices, label in QUESTIONS]
    pages = [{"text": topics[name][:400]} for name in sorted(topics)[:4]]
    for name, rows in (("choice", choice), ("page", pages)):
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tasks = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "page": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        },
    }
    for name, task in tasks.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        whole = {"task": f"local_{name}", "test_split": "test", **data, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(whole), encoding="utf-8")
    return folder
