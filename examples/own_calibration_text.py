"""Quantize a model on a text like those that it will be used on, and measure it on a part that it has not seen.

python examples/own_calibration_text.py my_articles.txt
python examples/own_calibration_text.py my_articles.txt Qwen/Qwen3-0.6B --run-dir runs/articles
"""

from __future__ import annotations

import argparse
from pathlib import Path

import slimplus

HELD_OUT = 0.1  # share of the text that perplexity is measured on


def main() -> None:
    """Split the text, quantize on one part and report the perplexity on the other."""
    parser = argparse.ArgumentParser(description="Quantize a model on a text of your own.")
    parser.add_argument("text", type=Path, help="a text file in UTF-8")
    parser.add_argument("model", nargs="?", help="hub id or folder; by default the recipe's model")
    parser.add_argument("--recipe", default="smollm2_135m_2bit", help="name, or a YAML file")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/own_calibration_text"), help="folder of the run")
    arguments = parser.parse_args()

    parts = arguments.run_dir.with_name(f"{arguments.run_dir.name}_text")
    calibration, evaluation = split(arguments.text, parts)
    result = slimplus.quantize(
        arguments.model,
        recipe=arguments.recipe,
        run_dir=arguments.run_dir,
        **{"data.calibration.path": calibration, "data.evaluation.path": evaluation},
    )
    perplexity = result.metrics["perplexity"]
    print(f"on the last {HELD_OUT:.0%} of {arguments.text}, which the quantization has not seen:")
    print(f"perplexity {perplexity['full']:.2f} at full precision, {perplexity['quantized']:.2f} quantized")
    print(f"the packed checkpoint is in {result.path}")


def split(text: Path, folder: Path) -> tuple[Path, Path]:
    """Write the start and the end of a text to two files, parted between lines."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    first = round(len(lines) * (1 - HELD_OUT))
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "calibration.txt", folder / "evaluation.txt"
    for file, part in zip(files, (lines[:first], lines[first:]), strict=True):
        file.write_text("".join(part), encoding="utf-8")
    return files


if __name__ == "__main__":
    main()
