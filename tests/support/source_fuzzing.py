"""Models that users might bring: a small valid folder, changed in one place or two, and what becomes of it.

Run as a script with the number of folders to try: `python -m tests.support.source_fuzzing 2000`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from lightning.fabric import Fabric
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slimplus.distributed.preemption import Preemption
from slimplus.evaluation.perplexity import perplexity
from slimplus.pipeline.prepare import prepare, start
from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.preflight import check_inputs
from slimplus.recipe.schema import Recipe
from slimplus.run_dir import fingerprint
from slimplus.utils.errors import InputError
from tests.support.fuzzing import fuzz, places
from tests.support.models import save_tiny_model
from tests.support.recipes import SMALL

WEIGHTS, INDEX, POINTER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "version https://git-lfs.github.com/spec/v1\n",
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 8, 16, 63, 64, 65, 128, 256, 300, 1000, 0.5, 1e-6, 1e4, 1e308),
    *("", "2", "silu", "gelu", "x", [], [1], ["LlamaForCausalLM"], {}, {"rope_type": "default", "rope_theta": 1e4}),
    *("llama", "qwen2", "opt", "bert", "float16", "float32", "bfloat16"),
)
"""What somebody may have put in the place of a value of config.json."""

Choose = Callable[[Any], Any]
"""Function that chooses one of several things."""
Change = Callable[[Path, Choose], None]


def _edit(file: Path, choose: Choose) -> None:
    """Remove, rename or replace one value of a JSON file."""
    value = json.loads(file.read_text())
    *path, last = choose(list(places(value)))
    parent = value
    for key in path:
        parent = parent[key]
    action = choose(("replace", "replace", "replace", "remove", "rename"))
    if action == "remove":
        del parent[last]
    elif action == "rename" and isinstance(parent, dict):
        parent[choose(("x", "num_layers", ""))] = parent.pop(last)
    else:
        parent[last] = choose(VALUES)
    file.write_text(json.dumps(value))


def config(folder: Path, choose: Choose) -> None:
    _edit(folder / "config.json", choose)


def blocks_in_config(folder: Path, choose: Choose) -> None:
    values = json.loads((folder / "config.json").read_text())
    values.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": choose((1, 3, 2, 0, "2", 10**12))}))


def tied_in_config(folder: Path, choose: Choose) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": choose((True, False))}))


def tokenizer(folder: Path, choose: Choose) -> None:
    _edit(folder / choose(("tokenizer_config.json", "tokenizer_config.json", "tokenizer.json")), choose)


def generation(folder: Path, choose: Choose) -> None:
    _edit(folder / "generation_config.json", choose)


def tensors(folder: Path, choose: Choose) -> None:
    """One tensor or all of them."""
    held = load_file(folder / WEIGHTS)
    choose(TENSORS)(held, choose)
    save_file({name: tensor.clone() for name, tensor in held.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def _drop(held: dict[str, torch.Tensor], choose: Choose) -> None:
    del held[choose(sorted(held))]


def _poison(held: dict[str, torch.Tensor], choose: Choose) -> None:
    tensor = held[choose(sorted(held))]
    tensor.view(-1)[choose(range(tensor.numel()))] = choose((float("nan"), float("inf"), -float("inf"), 1e38, 1e30))


def _rename(held: dict[str, torch.Tensor], choose: Choose) -> None:
    name = choose(sorted(held))
    held[choose((f"{name}_scale", f"base_model.model.{name}", name.replace("0", "5"), f"{name}.weight"))] = held.pop(
        name
    )


def _prefix(held: dict[str, torch.Tensor], choose: Choose) -> None:
    prefix = choose(("_orig_mod.", "module.", "base_model.model.", "model.", "-"))
    for name in sorted(held):
        held[name.removeprefix("model.") if prefix == "-" else prefix + name] = held.pop(name)


def _add(held: dict[str, torch.Tensor], choose: Choose) -> None:
    name = choose(sorted(held))
    stem = name.removesuffix(".weight")
    added = choose(
        (f"{stem}.bias", f"{name}_scale", f"{stem}.qzeros", f"{stem}.lora_A.weight", "model.rotary_emb.inv_freq")
    )
    held[added] = torch.ones(held[name].shape[:1])


def _head(held: dict[str, torch.Tensor], choose: Choose) -> None:
    own = held["model.embed_tokens.weight"].clone()
    held["lm_head.weight"] = choose((own, own * 2, own[:-1], own.float()))


def _reshape(held: dict[str, torch.Tensor], choose: Choose) -> None:
    name = choose(sorted(held))
    tensor = held[name]
    held[name] = choose((tensor.T, tensor[:-1], tensor[None], torch.cat([tensor, tensor[:2]]), tensor[:0])).contiguous()


def _cast(held: dict[str, torch.Tensor], choose: Choose) -> None:
    dtype = choose((torch.float32, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool))
    for name in choose((sorted(held), [choose(sorted(held))])):
        held[name] = held[name].to(dtype)


TENSORS: tuple[Callable[[dict[str, torch.Tensor], Choose], None], ...] = (
    *(_drop, _poison, _poison, _rename, _prefix, _add, _head, _reshape, _cast),
)


def shards(folder: Path, choose: Choose) -> None:
    """Two shards and an index, of which something may be wrong."""
    held = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {name: files[number % 2] for number, name in enumerate(sorted(held))}
    for file in files:
        save_file({name: held[name] for name in held if places[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    wrong = choose((None, "index", "missing", "cut", "twice", "elsewhere", "garbage"))
    if wrong == "index":
        _edit(folder / INDEX, choose)
    elif wrong == "missing":
        (folder / choose(files)).unlink()
    elif wrong == "cut":
        _cut(folder / choose(files), choose)
    elif wrong == "twice":
        save_file(held, folder / files[0], {"format": "pt"})
    elif wrong == "elsewhere":
        places[sorted(held)[0]] = choose(("../model.safetensors", "/etc/hostname", "model.bin", ""))
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    elif wrong == "garbage":
        (folder / INDEX).write_text(choose(("", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}')))


def _cut(file: Path, choose: Choose) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * choose((0, 0.0001, 0.5, 0.999)))])


def files(folder: Path, choose: Choose) -> None:
    """One of the files, whichever it is."""
    file = choose(sorted(folder.iterdir()))
    action = choose(("cut", "pointer", "gone", "link", "folder"))
    if action == "cut":
        _cut(file, choose)
        return
    file.unlink()
    if action == "pointer":
        file.write_text(POINTER)
    elif action == "link":
        file.symlink_to("nowhere")
    elif action == "folder":
        file.mkdir()


def beside(folder: Path, choose: Choose) -> None:
    """A file that nobody reads, or a link to nothing."""
    name = choose(("training_args.bin", "README.md", "consolidated.pth", "optimizer.pt", "runs", "adapter_config.json"))
    choose((lambda: (folder / name).symlink_to("nowhere"), lambda: (folder / name).write_text("{}")))()


def token(folder: Path, choose: Choose) -> None:
    """A token that the embedding may have no row for, and perhaps a text with it."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"].append({"id": choose((257, 300)), "content": choose(("<|sys|>", "<|never|>")), **added})
    file.write_text(json.dumps(content))


def text(folder: Path, choose: Choose) -> None:
    """The calibration text, which lies in the folder."""
    file = folder / "text.txt"
    content = file.read_bytes()
    file.write_bytes(
        choose((b"\xef\xbb\xbf" + content, b"", b"\xff\xfe\x00", content[:40], content + b"\x00\xff", b" " * 900))
    )


CHANGES: tuple[Change, ...] = (
    *(config, config, config, blocks_in_config, tied_in_config, tokenizer, generation),
    *(tensors, tensors, tensors, tensors, shards, files, files, beside, token, text),
)


UNCHANGEABLE = (OSError, LookupError, ValueError, RuntimeError, SafetensorError, InvalidArgument)
"""What a change raises where an earlier one left it nothing to change."""


class Violation(AssertionError):
    """A model that was taken although it is another than transformers loads, or refused without a clear sentence."""


class SourceFuzzer:
    """Tries changed folders, in one process.

    Args:
        work: folder to work in.
        model_type: architecture of the model that is changed.
    """

    def __init__(self, work: Path, model_type: str = "llama") -> None:
        self.base, self.work = work / "base", work
        save_tiny_model(self.base, model_type, 2, {})
        (self.base / "text.txt").write_text("<|sys|> Some words, to be read and to be predicted. " * 40)
        self.outcomes: Counter[str] = Counter()
        self.sentences: Counter[str] = Counter()

    def recipe(self, folder: Path) -> Recipe:
        keys = {"model.path": folder, "run_dir": self.work / "run"}
        keys |= {f"data.{split}.path": folder / "text.txt" for split in ("calibration", "evaluation")}
        small = [key for key in SMALL if not key.startswith("data.")]
        sizes = ["data.samples=2", "data.sequence_length=16", "end_to_end.batch_size=1"]
        sizes += ["data.evaluation.sequence_length=16", "data.evaluation.windows=1", "quantization.method=rtn"]
        return load_recipe(
            ["recipe=smollm2_135m_2bit", *small, *sizes, *(f"{key}={value}" for key, value in keys.items())]
        )

    def run(self, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """A window, and the logits of the model as a run has it before it quantizes the first block."""
        recipe = self.recipe(folder)
        check_inputs(recipe)
        job = prepare(recipe, self.fabric, Preemption())
        window = job.evaluation_texts[0].tokens
        job.metrics["perplexity"]["full"] = perplexity(job.model, window, "full precision")
        job.metrics.save()
        job.run.open()
        return window, job.model.logits(window, job.model.last_hidden(job.model.block_inputs(window)))

    @property
    def fabric(self) -> Fabric:
        if not hasattr(self, "_fabric"):
            self._fabric = start(self.recipe(self.base))
        return self._fabric

    def attempt(self, change: Callable[[Path], None]) -> str | None:
        """What is said against a changed folder, None if its model is taken and is what transformers loads."""
        folder, run = self.work / "model", self.work / "run"
        for each in (folder, run):
            shutil.rmtree(each, ignore_errors=True)
        shutil.copytree(self.base, folder)
        change(folder)
        run.mkdir()
        try:
            logits = self.run(folder)
        except InputError as error:
            said = str(error)
            if not all(SENTENCE.fullmatch(line) for line in said.splitlines()) or "login" in said:
                raise Violation(f"no clear sentence: {said}") from error
            self.outcomes["refused"] += 1
            return said
        self._compare(folder, *logits)
        for file in run.glob("*.json"):
            json.loads(file.read_text(), parse_constant=_no_number)
        self.outcomes["taken"] += 1
        return None

    def _compare(self, folder: Path, window: torch.Tensor, logits: torch.Tensor) -> None:
        with torch.no_grad():
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
            model, info = loaded
            if any(info.values()):
                raise Violation(f"taken, but transformers says {info}")
            expected = model.float()(input_ids=window).logits
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


SENTENCE = re.compile(r"(model|data|perplexity|quantization|run_dir)[\w.]*[:,] .{20,}")
"""What each line must be: the key that names a file or a stage, and what is wrong."""


def _no_number(text: str) -> None:
    raise Violation(f"{text} is no JSON")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries, whose warnings thousands of models would repeat, and save them what takes time."""
    logging.disable(logging.ERROR)
    versions = functools.cache(fingerprint.library_versions)
    try:
        with (  # to save time
            mock.patch("os.fsync"),
            mock.patch("slimplus.pipeline.prepare.library_versions", versions),
            mock.patch("slimplus.pipeline.known_figures.library_versions", versions),
        ):
            yield
    finally:
        logging.disable(logging.NOTSET)


def campaign(work: Path, examples: int, model_type: str = "llama") -> SourceFuzzer:
    """Try changed folders; the first violation, or an error that is no sentence, ends it with the smallest example."""
    fuzzer = SourceFuzzer(work, model_type)

    @fuzz(examples)
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        def choose(options: Any) -> Any:
            return data.draw(st.sampled_from(options))

        changes = [choose(CHANGES) for _ in range(choose((1, 1, 1, 2)))]

        def change(folder: Path) -> None:
            for each in changes:
                with contextlib.suppress(*UNCHANGEABLE):
                    each(folder, choose)  # a second change may find that the first one left nothing to change

        said = fuzzer.attempt(change)
        if not sum(fuzzer.outcomes.values()) % 100:
            sys.stderr.write(f"{json.dumps(fuzzer.outcomes)}\n")
        fuzzer.sentences[" ".join((said or "taken").replace(str(work), "").split()[:7])] += 1

    with quiet():
        attempt()
    return fuzzer


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        done = campaign(Path(folder), int(sys.argv[1]), *sys.argv[2:])
    for sentence, count in done.sentences.most_common():
        sys.stdout.write(f"{count:6} {sentence}\n")
    sys.stdout.write(f"{json.dumps(done.outcomes)}\n")
