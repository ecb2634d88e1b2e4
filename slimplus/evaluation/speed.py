"""Speed and memory of models side by side, each in a process of its own, so that their memory can be told apart.

The models take turns, round by round, so that other load of the machine affects them all alike. The parent process
imports nothing heavy, because a new process starts with the peak memory of its parent.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from slimplus.evaluation.workload import Candidate, Workload
from slimplus.utils.errors import InputError
from slimplus.utils.machine import describe_machine
from slimplus.utils.units import format_bytes

SECONDS_TO_END = 5  # for a process to end by itself


class Worker:
    """A process that loads one model and runs a round when asked.

    Args:
        name: name of the model in messages.
        connection: connection to the process.
    """

    def __init__(self, name: str, connection: Connection) -> None:
        self.name, self._connection = name, connection

    def receive(self) -> dict[str, Any]:
        """Wait for the next answer of the process, and return it.

        Raises:
            InputError: if the process met one, or ended.
        """
        try:
            answer: dict[str, Any] = self._connection.recv()
        except EOFError:
            raise InputError(
                f"the process of the {self.name} model ended before it was measured; if nothing else is said above, "
                "memory ran out: measure a smaller model, or each one alone"
            ) from None
        if "error" in answer:
            raise InputError(answer["error"])
        return answer

    def ask(self, question: str) -> dict[str, Any]:
        """Ask the process for a `round` or its `memory`, and return the answer, see `TimedModel`."""
        self._connection.send(question)
        return self.receive()


@contextmanager
def start_worker(name: str, candidate: Candidate, workload: Workload) -> Iterator[Worker]:
    """Start a process that loads a model, and end it with the context.

    Args:
        name: name of the model in messages.
        candidate: the model.
        workload: what a round is.
    """
    context = multiprocessing.get_context("spawn")
    connection, process_end = context.Pipe()
    process = context.Process(target=_serve, args=(process_end, candidate, workload), daemon=True)
    process.start()
    process_end.close()
    try:
        yield Worker(name, connection)
    finally:
        connection.close()
        process.join(SECONDS_TO_END)  # it sees the end of the pipe and cleans up, unless it is still loading
        process.terminate()
        process.join()


def _serve(connection: Connection, candidate: Candidate, workload: Workload) -> None:
    """Load a model in this process, send what is known of it, and answer questions until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    from slimplus.evaluation.timed_model import TimedModel  # PyTorch, in this process alone

    try:
        timed = TimedModel(candidate, workload)
    except InputError as error:
        connection.send({"error": str(error)})
        return
    connection.send(timed.facts)
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        connection.send(timed.round() if question == "round" else timed.memory())


def benchmark(candidates: Mapping[str, Candidate], workload: Workload) -> dict[str, Any]:
    """Measure models side by side.

    Args:
        candidates: name → model; the ratios of `packed` and `dense` are given as well if both are there.
        workload: what a round is, and how many there are.

    Returns:
        The machine, the workload, and for each model seconds, bytes, tokens/s of the median round, and all rounds.

    Raises:
        InputError: if a model or the device does not exist, or a process ended, for example out of memory.
    """
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        facts: dict[str, dict[str, Any]] = {}
        for name, candidate in candidates.items():  # one after another: loading is timed as well
            workers[name] = stack.enter_context(start_worker(name, candidate, workload))
            facts[name] = workers[name].receive()
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for _ in range(workload.rounds):
            for name, worker in workers.items():
                rounds[name].append(worker.ask("round"))
        models = {
            name: facts[name] | worker.ask("memory") | _speeds(rounds[name], workload) | {"rounds": rounds[name]}
            for name, worker in workers.items()
        }
    result = {"machine": describe_machine(), "workload": asdict(workload), "models": models}
    return result | ({"packed_over_dense": _ratios(models)} if "dense" in models else {})


def _speeds(rounds: list[dict[str, float]], workload: Workload) -> dict[str, float]:
    """Return the tokens/s of the median round, for reading the prompt and for writing the tokens after the first."""
    prefill, decode = (median(each[key] for each in rounds) for key in ("prefill_seconds", "decode_seconds"))
    return {
        "prefill_tokens_per_second": workload.prompt_tokens / prefill,
        "decode_tokens_per_second": (workload.new_tokens - 1) / decode,
    }


FIGURES = {
    "prefill_tokens_per_second": "prefill, tokens/s",
    "decode_tokens_per_second": "decode, tokens/s",
    "weight_bytes": "weights in memory",
    "resident_bytes": "resident memory",
    "peak_resident_bytes": "peak resident memory",
    "peak_device_bytes": "peak device memory",
    "load_seconds": "load time",
}


def _ratios(models: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return each figure of the packed model, divided by that of the dense one."""
    packed, dense = models["packed"], models["dense"]
    return {figure: packed[figure] / dense[figure] for figure in FIGURES if packed[figure] and dense[figure]}


def table(result: Mapping[str, Any]) -> str:
    """Return the figures as text, a line each, with the ratio of packed and dense if both were measured."""
    models, ratios = result["models"], result.get("packed_over_dense", {})
    lines = [["", *models, *(["packed / dense"] if ratios else [])]]
    for figure, name in FIGURES.items():
        values = [model[figure] for model in models.values()]
        if all(value is not None for value in values):
            ratio = [f"{ratios[figure]:.2f}"] if figure in ratios else []
            lines.append([name, *(_format(figure, value) for value in values), *ratio])
    width = max(len(line[0]) for line in lines)
    rows = [f"{line[0]:<{width}}" + "".join(f"{cell:>16}" for cell in line[1:]) for line in lines]
    workload, device = result["workload"], next(iter(models.values()))["device"]
    head = (
        f"{device}, {workload['dtype']}, a prompt of {workload['prompt_tokens']} tokens, {workload['new_tokens']} new; "
        f"median of {workload['rounds']}"
    )
    return "\n".join([head, "", *(row.rstrip() for row in rows)])


def _format(figure: str, value: float) -> str:
    """Return a figure with its unit."""
    if figure.endswith("_bytes"):
        return format_bytes(value)
    return f"{value:.2f} s" if figure.endswith("_seconds") else f"{value:.1f}"
