"""Fit a model into a number of bytes: every group of weights gets the width that the model's loss says it deserves.

python examples/size_budget.py 30                               # megabytes for all linear layers of the blocks
python examples/size_budget.py 600 Qwen/Qwen3-1.7B --run-dir runs/qwen3
"""

from __future__ import annotations

import argparse
import json
from collections import Counter

import slimplus


def main() -> None:
    """Quantize under the budget, and show what it was spent on."""
    parser = argparse.ArgumentParser(description="Fit the linear layers of a model into a number of megabytes.")
    parser.add_argument("megabytes", type=float, help="for the packed linear layers, scales and zero points included")
    parser.add_argument("model", nargs="?", help="hub id or folder; by default the recipe's model")
    parser.add_argument("--recipe", default="smollm2_135m_2bit", help="name, or a YAML file")
    parser.add_argument("--run-dir", default="runs/size_budget", help="folder for all that is written")
    arguments = parser.parse_args()

    result = slimplus.quantize(
        arguments.model,
        recipe=arguments.recipe,
        run_dir=arguments.run_dir,
        **{
            "quantization.allocation": "model",
            "quantization.size_bytes": int(arguments.megabytes * 1e6),
            "quantization.widths": [1, 2, 3, 4],
            "quantization.scale_bits": 8,  # scales take half as much, which leaves more for the weights
        },
    )
    metrics = result.metrics
    print(f"{metrics['average_bits']:.3f} bits on average, {metrics['bits_per_weight']:.3f} with all that is stored")
    print(f"perplexity {metrics['perplexity']['full']:.2f} -> {metrics['perplexity']['quantized']:.2f}")
    allocation = json.loads((result.path.parent / "allocation.json").read_text())
    groups = Counter(width for widths in allocation["bits"].values() for width in widths)
    for width, count in sorted(groups.items()):
        print(f"{width} bits: {count:6,} groups, {count / groups.total():.0%}")


if __name__ == "__main__":
    main()
