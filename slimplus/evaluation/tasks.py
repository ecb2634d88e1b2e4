"""Tasks of the Language Model Evaluation Harness (https://github.com/EleutherAI/lm-evaluation-harness)."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jinja2 import TemplateError
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from slimplus.utils.errors import InputError, named_first_line

if TYPE_CHECKING:
    from slimplus.evaluation.harness_model import Told

PAPER = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")
"""Tasks of the tables of SliM-LLM (https://arxiv.org/abs/2405.14917), without examples in the prompt."""

TASK_FILES = (".yaml", ".yml")
CHARACTERS, CHOICES = 4, 4  # of a token of English, and of an example of multiple choice, about


def _ignore(answered: int, asked: int) -> None:
    """Take a report of answered requests, and tell nobody."""


@dataclass(frozen=True)
class TaskConfig:
    """What tasks are asked, and how.

    Attributes:
        tasks: names of the harness's tasks, groups and tags; `paper`; task files, or folders with task files.
        num_fewshot: examples in a prompt; None is each task's own number.
        limit: examples of each task at most, from its start; None asks all.
        batch_size: examples that run at once.
    """

    tasks: Sequence[str]
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8


@dataclass(frozen=True, eq=False)
class LoadedTasks:
    """Tasks with their data.

    Attributes:
        config: what is asked.
        loaded: `tasks`, `groups` and `group_map` as the harness has loaded them, by name.
        fingerprint: SHA-256 over what is asked, in hexadecimal.
        tokens: number of tokens that a model reads for them, about: to tell how long it takes, and nothing else.
    """

    config: TaskConfig
    loaded: dict[str, dict[str, Any]]
    fingerprint: str
    tokens: float


WRONG_TASK = (ValueError, LookupError, TypeError, AttributeError, AssertionError, StopIteration, TemplateError)
"""What a wrong task file raises, when it is loaded or when it is asked."""


def load_tasks(config: TaskConfig) -> LoadedTasks:
    """Load tasks and their data, which come from the hub or from local files.

    Raises:
        InputError: if a task is unknown, a task file is wrong, or data cannot be had.
    """
    from lm_eval.tasks import TaskManager  # with hundreds of modules, and only where there are tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = list(dict.fromkeys(_expanded(config.tasks)))
    manager = TaskManager(include_defaults=not all(_is_file(name) for name in names))
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        if not _is_file(name) and name not in manager.task_index:
            raise InputError(
                f"evaluation.tasks: lm-eval has no task {name!r}; give paper, a name that `lm-eval ls tasks` lists, a "
                ".yaml task file or a folder of them"
            )
        with isolate_rng():
            _seed()
            found = _load(manager, name)
        if _is_file(name) and (twice := loaded["tasks"].keys() & found["tasks"].keys()):
            raise InputError(
                f"evaluation.tasks: {name} holds a task called {min(twice)!r}, and so does another one; give one of "
                "them, or rename it"
            )
        loaded = {kind: loaded[kind] | found[kind] for kind in loaded}
    digest = hashlib.sha256(json.dumps(asdict(config)).encode())
    tokens = 0.0
    for name, task in sorted(loaded["tasks"].items()):
        _set_examples(task, config.num_fewshot)
        examples = [json.dumps(example, sort_keys=True, default=str) for example in task.eval_docs]
        digest.update(name.encode())
        _update(digest, task, examples)
        tokens += _tokens(task, examples[: config.limit])
    return LoadedTasks(config, loaded, digest.hexdigest(), tokens)


def _seed() -> None:
    """Set the seeds that the harness's own command sets, on which shuffled choices and drawn examples depend."""
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)


def _set_examples(task: Any, num_fewshot: int | None) -> None:
    """Set the number of examples in a task's prompt and their seed, as the harness's own command does."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:  # a task that says 0 is always asked without
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)


def _expanded(tasks: Sequence[str]) -> Iterator[str]:
    """Yield the names of tasks and the paths of task files, `paper` and folders written out."""
    for task in tasks:
        path = Path(task).expanduser()
        if task == "paper":
            yield from PAPER
        elif path.is_dir():
            files = sorted(str(file) for file in path.iterdir() if _is_file(file.name))
            if not files:
                raise InputError(f"evaluation.tasks: {path} holds no .yaml task file; give a folder with some")
            yield from files
        else:
            yield str(path) if _is_file(task) else task


def _is_file(name: str) -> bool:
    return name.endswith(TASK_FILES)


def _load(manager: Any, name: str) -> dict[str, dict[str, Any]]:
    """Return what the harness makes of one name: `tasks`, `groups` and `group_map`.

    Raises:
        InputError: if the task is wrong, or its data cannot be had.
    """
    import yaml
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        found: dict[str, dict[str, Any]] = manager.load([name])
        return found
    except (*WRONG_TASK, OSError, RuntimeError, ImportError, yaml.YAMLError, DatasetsError, HTTPError) as error:
        remedy = (
            "check the file and the data that it names"
            if _is_file(name)
            else "run once with a network, or give local task files"
        )
        raise InputError(f"evaluation.tasks: {name} cannot be loaded ({named_first_line(error)}); {remedy}") from error


def _update(digest: Any, task: Any, examples: Sequence[str]) -> None:
    """Hash what is asked of a task: its configuration and its examples."""
    config = json.dumps(task.dump_config(), sort_keys=True, default=str)
    digest.update(re.sub(r" at 0x[0-9a-f]+", "", config).encode())  # addresses of functions differ from start to start
    for example in examples:
        digest.update(example.encode())


def _tokens(task: Any, examples: Sequence[str]) -> float:
    """Return the number of tokens that a model reads for some examples of a task, about."""
    prompts = CHOICES if task.OUTPUT_TYPE == "multiple_choice" else 1
    return prompts * (1 + task.get_config("num_fewshot")) * sum(map(len, examples)) / CHARACTERS


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: LoadedTasks,
    told: Told = _ignore,
) -> list[dict[str, Any]]:
    """Return the scores of a model, a row for each metric of each task and group.

    A row holds `task`, `part_of` (the group that the task belongs to, or None), `metric`, `num_fewshot`, `examples`,
    `value`, and `stderr`, None where the harness gives no standard error.

    Args:
        model: the model, on its device.
        tokenizer: its tokenizer.
        tasks: what is asked.
        told: function that is told how many requests are answered, and how many there are as far as is known.

    Raises:
        InputError: if a task cannot be asked, such as one that runs code that a model writes.
    """
    from lm_eval.evaluator import evaluate

    from slimplus.evaluation.harness_model import CountedModel

    config = tasks.config
    asked = CountedModel(told, pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size)
    try:
        with isolate_rng():
            _seed()
            found: Any = evaluate(asked, tasks.loaded, limit=config.limit, log_samples=False)
    except (*WRONG_TASK, NotImplementedError) as error:
        raise InputError(f"evaluation.tasks: {named_first_line(error)}; leave that task out") from error
    parents = {child: group for group, children in found["group_subtasks"].items() for child in children}
    return list(_rows(found, parents))


def _rows(found: Mapping[str, Any], parents: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of what the harness returns."""
    for task, figures in {**found["results"], **found.get("groups", {})}.items():
        for key, value in figures.items():
            metric, comma, rule = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{rule}")
            yield {
                "task": task,
                "part_of": parents.get(task),
                "metric": metric if rule == "none" else f"{metric} ({rule})",
                "num_fewshot": found["n-shot"].get(task),
                "examples": found["n-samples"].get(task, {}).get("effective"),
                "value": float(value),
                "stderr": None if error in (None, "N/A") else float(error),
            }


def settings(tasks: LoadedTasks) -> dict[str, Any]:
    """Return how tasks are asked, under the names that metrics.json gives it."""
    return asdict(tasks.config) | {"lm_eval": version("lm_eval"), "fingerprint": tasks.fingerprint}
