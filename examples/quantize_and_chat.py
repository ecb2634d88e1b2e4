"""Quantize a model, then talk to it.

python examples/quantize_and_chat.py                            # SmolLM2-135M from a Python package, with no hub
python examples/quantize_and_chat.py Qwen/Qwen3-0.6B --bits 3 --run-dir runs/qwen3
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from transformers import AutoTokenizer, TextStreamer

import slimplus


def main() -> None:
    """Quantize, then answer each line of the standard input."""
    parser = argparse.ArgumentParser(description="Quantize a model, then talk to it.")
    parser.add_argument("model", nargs="?", help="hub id or folder; by default the recipe's model")
    parser.add_argument("--recipe", default="smollm2_135m_2bit", help="name, or a YAML file")
    parser.add_argument("--bits", type=int, default=2, help="average bits of a weight")
    parser.add_argument("--run-dir", default="runs/quantize_and_chat", help="folder for all that is written")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens of an answer")
    arguments = parser.parse_args()
    try:
        result = slimplus.quantize(
            arguments.model,
            recipe=arguments.recipe,
            run_dir=arguments.run_dir,
            **{"quantization.bits": arguments.bits},
        )
    except slimplus.InputError as error:
        sys.exit(str(error))

    perplexity, megabytes = result.metrics["perplexity"], result.metrics["size_bytes"] / 1e6
    print(f"{result.path}: {megabytes:.1f} MB, {result.metrics['compression']:.2f} times smaller than at 16 bit")
    print(f"perplexity {perplexity['full']:.2f} at full precision, {perplexity['quantized']:.2f} quantized")

    model: Any = result.load()
    tokenizer = AutoTokenizer.from_pretrained(result.path)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    print("Write a message; Ctrl-D ends.")
    for line in sys.stdin:
        model.generate(
            **prompt(tokenizer, line.strip()).to(model.device),
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            streamer=streamer,
        )


def prompt(tokenizer: Any, message: str) -> Any:
    """Return the tokens of a message: in the model's chat template, or as they are for a model that has none."""
    if tokenizer.chat_template is None:
        return tokenizer(message, return_tensors="pt", return_token_type_ids=False)
    conversation = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


if __name__ == "__main__":
    main()
