"""Quantize on several GPUs: the windows, and the layers of each block, are shared among as many processes.

python examples/several_gpus.py --devices 4                     # starts the other three processes itself
torchrun --nproc-per-node 4 examples/several_gpus.py --devices 4
python examples/several_gpus.py --devices 2 --accelerator cpu   # the same between processes on CPUs

This file runs in every process, from its first line to its last: what is to be done once is left to the first one.
"""

from __future__ import annotations

import argparse
import os

import slimplus


def main() -> None:
    """Quantize; the first process reports."""
    parser = argparse.ArgumentParser(description="Quantize a model on several GPUs.")
    parser.add_argument("model", nargs="?", help="hub id or folder; by default the recipe's model")
    parser.add_argument("--recipe", default="smollm2_135m_2bit", help="name, or a YAML file")
    parser.add_argument("--run-dir", default="runs/several_gpus", help="folder that all processes see")
    parser.add_argument("--devices", type=int, default=2, help="processes, one for each GPU")
    parser.add_argument("--accelerator", default="cuda", choices=("cuda", "cpu"), help="where they run")
    parser.add_argument("--strategy", default="ddp", help="ddp, or deepspeed_stage_1 to 3, which save memory")
    arguments = parser.parse_args()

    result = slimplus.quantize(
        arguments.model,
        recipe=arguments.recipe,
        run_dir=arguments.run_dir,
        **{
            "trainer.accelerator": arguments.accelerator,
            "trainer.devices": arguments.devices,
            "trainer.strategy": arguments.strategy,
            "training.batch_size": arguments.devices,  # windows of a step, of all processes together
            "end_to_end.batch_size": 2 * arguments.devices,
        },
    )
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0:
        perplexity = result.metrics["perplexity"]
        print(f"perplexity {perplexity['full']:.2f} -> {perplexity['quantized']:.2f}, packed in {result.path}")


if __name__ == "__main__":
    main()
