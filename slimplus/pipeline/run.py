"""The whole run: text → windows → block inputs → bit widths, scales → trained quantizers → packed checkpoint."""

from __future__ import annotations

from slimplus.distributed.preemption import Preemption
from slimplus.distributed.watchdog import watched
from slimplus.pipeline.prepare import prepare, start
from slimplus.pipeline.report import finish
from slimplus.pipeline.stages.ask import ask_full_precision, ask_packed
from slimplus.pipeline.stages.blocks import quantize_blocks
from slimplus.pipeline.stages.end_to_end import train_end_to_end
from slimplus.pipeline.stages.evaluate import measure_full_precision, measure_packed
from slimplus.pipeline.stages.export import export
from slimplus.pipeline.stages.sensitivity import measure_sensitivity
from slimplus.recipe.schema import Recipe
from slimplus.run_dir.lock import locked, readable_errors
from slimplus.run_dir.metrics import device_bytes
from slimplus.utils.progress import Progress


def run(recipe: Recipe) -> str | None:
    """Quantize a model as a recipe says; what `recipe.run_dir` already holds is skipped.

    Returns:
        The summary on the first rank, None on the others.

    Raises:
        InputError: if the input is wrong; the message names the key, file or tensor, and a remedy.
        TemporaryFailure: if the run failed for a reason that passes, such as a lost process.
        Preempted: if SIGTERM or SIGUSR1 ended the run.
    """
    fabric, root = start(recipe), recipe.run_dir
    first = fabric.is_global_zero
    with (
        Preemption() as preemption,
        watched(fabric),
        readable_errors(root),
        locked(root, first),
        Progress(first, device_bytes(fabric.device)) as progress,
    ):
        job = prepare(recipe, fabric, preemption, progress)
        measure_full_precision(job)
        ask_full_precision(job)
        measure_sensitivity(job)
        quantize_blocks(job)
        train_end_to_end(job)
        export(job)
        measure_packed(job)
        ask_packed(job)
        return finish(job)
