"""Loading models, finding their parts, and running them block by block."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, ModelMaker
from torch import nn
from torchmetrics.text import Perplexity
from transformers import AutoConfig

from slimplus.evaluation.perplexity import perplexity
from slimplus.models.architectures import BLOCKS, find_blocks, find_linears
from slimplus.models.loading import ModelSource, build_on_meta
from slimplus.models.precision import resolve_precision
from slimplus.models.streaming import BlockRunner, StreamedModel, windows_at_a_time
from slimplus.run_dir.fingerprint import weights_digest
from slimplus.utils.errors import InputError, TemporaryFailure

CPU = torch.device("cpu")
RUNNER = BlockRunner(CPU, "32-true")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 250, (3, 24), generator=torch.Generator().manual_seed(0))


def test_every_supported_architecture_is_tested() -> None:
    assert set(TINY) == set(BLOCKS)


@pytest.mark.parametrize("windows", [1, 2])  # of three: as on a CPU, and as on a GPU
@pytest.mark.parametrize("model_type", BLOCKS)
def test_streaming_gives_the_logits_of_the_model(
    make_model: ModelMaker, tokens: torch.Tensor, model_type: str, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimplus.models.streaming.windows_at_a_time", lambda device, sequence_length: windows)
    source = ModelSource(str(make_model(model_type)), dtype="float32")
    with torch.no_grad():
        expected = source.model()(input_ids=tokens).logits
    streamed = StreamedModel(source.model(), RUNNER)
    inputs = streamed.block_inputs(tokens)
    hidden = inputs.hidden
    for block, arguments in zip(streamed.blocks, inputs.arguments, strict=True):
        hidden = RUNNER.run(RUNNER.load(block), hidden, arguments)
    torch.testing.assert_close(streamed.logits(tokens, hidden), expected, rtol=1e-4, atol=1e-4)


def test_a_rank_without_windows_runs_nothing(make_model: ModelMaker, tokens: torch.Tensor) -> None:
    """Of a few long windows not every rank has a share."""
    streamed = StreamedModel(ModelSource(str(make_model("llama")), dtype="float32").model(), RUNNER)
    inputs = streamed.block_inputs(tokens[:0])
    outputs = RUNNER.run(RUNNER.load(streamed.blocks[0]), inputs.hidden, inputs.arguments[0])
    assert outputs.shape == (0, 24, 64)


def test_a_gpu_runs_as_many_windows_as_keep_it_busy() -> None:
    counts = [windows_at_a_time(torch.device("cuda"), length) for length in (256, 2048, 16384)]
    assert counts == [32, 4, 1]
    assert windows_at_a_time(CPU, 256) == 1


def test_the_model_is_whole_again_after_streaming(make_model: ModelMaker, tokens: torch.Tensor) -> None:
    model = ModelSource(str(make_model("llama")), dtype="float32").model()
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        StreamedModel(model, RUNNER).block_inputs(tokens)
        assert torch.equal(model(input_ids=tokens).logits, before)


def test_the_perplexity_of_a_broken_model_is_a_number(make_model: ModelMaker, tokens: torch.Tensor) -> None:
    """A token may be so unlikely that float32 gives it no probability at all."""
    model = ModelSource(str(make_model("llama")), dtype="float32").model()
    with torch.no_grad():
        model.model.norm.weight *= 40 / model(input_ids=tokens).logits.std()
        logits = model(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.isinf(Perplexity()(logits[:, :-1], tokens[:, 1:]))
    measured = perplexity(StreamedModel(model, RUNNER), tokens, "test")
    assert math.log(measured) == pytest.approx(float(expected), rel=1e-4)


def test_perplexity_is_that_of_the_whole_model(make_model: ModelMaker, tokens: torch.Tensor) -> None:
    source = ModelSource(str(make_model("llama")), dtype="float32")
    with torch.no_grad():
        logits = source.model()(input_ids=tokens).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp()
    measured = perplexity(StreamedModel(source.model(), RUNNER), tokens, "test")
    assert measured == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("model_type", "count"), [("llama", 7), ("opt", 6)])
def test_linears_of_a_block(make_model: ModelMaker, model_type: str, count: int) -> None:
    model = build_on_meta(ModelSource(str(make_model(model_type))).config())
    assert model.device.type == "meta"
    blocks = find_blocks(model)
    assert len(blocks) == 2
    assert len(find_linears(blocks[0])) == count


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(InputError, match="'gpt2' is not supported"):
        find_blocks(build_on_meta(ModelSource.config_of({"model_type": "gpt2"})))
    with pytest.raises(InputError, match="'nothing' is no model_type"):
        ModelSource.config_of({"model_type": "nothing"})


def test_values_that_an_architecture_does_not_take_are_named() -> None:
    with pytest.raises(InputError, match=r"model\.config: no llama has such values \(.*hidden_size"):
        ModelSource.config_of({"model_type": "llama", "hidden_size": "x"})


def test_weights_cut_short_are_named(make_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.path: cannot load .*model' \("):
        ModelSource(str(folder)).model()


def test_a_full_disk_is_no_wrong_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blob")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(TemporaryFailure, match="no space is left to download org/name; free some, or set HF_HOME"):
        ModelSource("org/name").config()


@pytest.mark.parametrize("method", ["fp8", "awq", "bitsandbytes", "slimplus"])
def test_a_quantized_model_is_refused(make_model: ModelMaker, tmp_path: Path, method: str) -> None:
    """Its codes would be taken for weights."""
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(InputError, match=rf"model' is quantized already \({method}\); give the full-precision model"):
        ModelSource(str(folder)).config()


def test_a_hub_id_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Or a job that goes on after a push would join blocks of two models."""
    asked = Mock(
        side_effect=[f"/cache/models--org--name/snapshots/{commit}/snapshots/model.gguf" for commit in ("a1", "b2")]
    )
    monkeypatch.setattr("slimplus.models.loading.hf_hub_download", asked)
    source = ModelSource("org/name", gguf_file="snapshots/model.gguf", revision="v2")
    before, after = source.pinned(), source.pinned()
    assert (before.revision, after.revision) == ("a1", "b2")
    assert weights_digest(before) != weights_digest(after)
    assert asked.call_args.args == ("org/name", "snapshots/model.gguf")
    assert asked.call_args.kwargs == {"revision": "v2"}
    read = Mock(side_effect=OSError("no network"))
    for kind in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"slimplus.models.loading.{kind}.from_pretrained", read)
    for load in (before.config, before.tokenizer, before.model):
        with pytest.raises(InputError):
            load()
    assert [call.kwargs["revision"] for call in read.call_args_list] == ["a1"] * 3
    local = ModelSource(str(tmp_path))
    assert local.pinned() is local


def test_a_model_that_cannot_be_had_is_named() -> None:
    source = ModelSource("nobody/no-such-model")
    for load in (source.pinned, source.config, source.tokenizer, source.model):
        with pytest.raises(InputError, match=r"model\.path: cannot load 'nobody/no-such-model'"):
            load()


def test_half_a_tokenizer_is_named(make_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(make_model("llama"), tmp_path / "model")
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cannot load '.*model' \(tokenizer.json is damaged: .*give its local folder"):
        ModelSource(str(folder)).tokenizer()


def test_stored_dtype_is_kept(make_model: ModelMaker) -> None:
    assert ModelSource(str(make_model("llama"))).model().dtype == torch.bfloat16


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_precision_is_the_faster_one(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("16-mixed", CPU) == "16-mixed"


def test_autocast_runs_blocks_in_bfloat16(make_model: ModelMaker, tokens: torch.Tensor) -> None:
    runner = BlockRunner(CPU, "bf16-mixed")
    streamed = StreamedModel(ModelSource(str(make_model("llama"))).model(), runner)
    inputs = streamed.block_inputs(tokens)
    assert inputs.hidden.dtype == torch.bfloat16
    block = runner.load(streamed.blocks[0])
    seen: list[torch.dtype] = []
    block.get_submodule("mlp").register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    runner.run(block, inputs.hidden, inputs.arguments[0])
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}
