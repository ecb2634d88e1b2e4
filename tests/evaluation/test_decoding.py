"""Decoding on a static cache writes what `generate` writes, and a compiled step as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache
from transformers.generation import BaseStreamer

import slimplus
from slimplus.evaluation import decoding, graph_steps
from slimplus.evaluation.decoding import GraphDecoder
from tests.support.models import ModelMaker
from tests.support.packed import save_packed

PROMPT = torch.tensor([[72, 101, 108, 108, 111]])
PADDED = torch.tensor([[0, 0, 72, 101, 108], [70, 71, 72, 73, 74], [0, 65, 66, 67, 68]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
BATCHES = {"one": (PROMPT, torch.ones_like(PROMPT)), "padded": (PADDED, MASK)}
GREEDY = {"do_sample": False}
DRAWN = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 50, "min_p": 0.01}


@pytest.fixture(scope="module")
def packed_folder(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    return save_packed(make_model("llama"), folder / "packed", outer=("model.embed_tokens",))


@pytest.fixture(scope="module")
def loaded(packed_folder: Path) -> Any:
    return slimplus.load(packed_folder, dtype=torch.float32).eval()


class Columns(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.given.append(value)

    def end(self) -> None:
        self.ended += 1


def written(generate: Any, batch: str, ends: list[int], **options: Any) -> Tensor:
    ids, mask = BATCHES[batch]
    torch.manual_seed(3)
    found: Tensor = generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=20, pad_token_id=0, eos_token_id=ends, **options
    )
    return found


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_the_loop_writes_what_generate_writes(loaded: Any, batch: str, sampling: dict[str, Any]) -> None:
    decoder, streamer = GraphDecoder(loaded), Columns()
    endless = written(loaded.generate, batch, [999], **sampling)
    assert torch.equal(written(decoder.generate, batch, [999], **sampling), endless)
    ends = endless[:, 12].unique().tolist()  # each text ends somewhere on the way, or at the latest here
    expected = written(loaded.generate, batch, ends, **sampling)
    assert expected.shape[1] < endless.shape[1]
    assert torch.equal(written(decoder.generate, batch, ends, streamer=streamer, **sampling), expected)
    prompt, *columns = streamer.given
    assert torch.equal(prompt, BATCHES[batch][0])
    assert torch.equal(torch.stack(columns, dim=1), expected[:, prompt.shape[1] :])
    assert streamer.ended == 1
    assert not decoder.captured


def test_a_chunk_beyond_the_end_changes_nothing(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host reads tokens after it has asked for more."""
    expected = written(loaded.generate, "padded", [999])
    ends = expected[:, 9].unique().tolist()
    expected = written(loaded.generate, "padded", ends)
    begin = graph_steps.Arrivals.__init__

    def late(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        self.ahead = 1

    monkeypatch.setattr(graph_steps.Arrivals, "__init__", late)
    streamer = Columns()
    assert torch.equal(written(GraphDecoder(loaded).generate, "padded", ends, streamer=streamer), expected)
    assert len(streamer.given) == 1 + expected.shape[1] - PADDED.shape[1]


def test_steps_are_kept_for_the_next_text(loaded: Any) -> None:
    decoder = GraphDecoder(loaded)
    first = written(decoder.generate, "one", [999])
    kept = decoder._steps
    assert torch.equal(written(decoder.generate, "one", [999]), first)
    assert decoder._steps is kept
    written(decoder.generate, "one", [999], **DRAWN)
    assert decoder._steps is not kept
    assert torch.equal(written(decoder.generate, "one", [999]), first)


class Graph:
    """A CUDA graph that is none: what is captured runs once more at each replay."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.captured()

    def captured(self) -> None:
        raise AssertionError("replayed before it was captured")


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch, failure: str | None = None) -> None:
    """Lets a CPU capture steps, or fail to; while one is captured nothing is computed."""
    capturing: list[Graph] = []
    step, start = graph_steps.Steps._step, graph_steps.Steps.__init__

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        capturing.append(graph)
        yield
        capturing.pop()
        if failure:
            raise RuntimeError(failure)

    def captured_step(self: Any) -> None:
        if capturing:
            capturing[-1].captured = partial(step, self)  # type: ignore[method-assign]
        else:
            step(self)

    def on_gpu(self: Any, *arguments: Any) -> None:
        start(self, *arguments)
        self.capturable = True

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": Graph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(graph_steps.Steps, "_step", captured_step)
    monkeypatch.setattr(graph_steps.Steps, "__init__", on_gpu)


def test_the_first_step_is_launched_and_the_others_are_replayed(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    expected = written(loaded.generate, "padded", [999], **DRAWN)
    pretend_a_gpu(monkeypatch)
    decoder = GraphDecoder(loaded)
    assert torch.equal(written(decoder.generate, "padded", [999], **DRAWN), expected)
    assert decoder.captured
    graph: Any = decoder._steps and decoder._steps.graph
    assert graph.replays == 20 - 2  # the first token comes with the prompt
    assert torch.equal(written(decoder.generate, "padded", [999], **DRAWN), expected)
    assert graph.replays == 20 - 2 + 20 - 1


def test_a_model_that_cannot_be_captured_is_launched(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    expected = written(loaded.generate, "one", [999])
    pretend_a_gpu(monkeypatch, failure="operation not permitted when stream is capturing")
    decoder = GraphDecoder(loaded)
    assert torch.equal(written(decoder.generate, "one", [999]), expected)
    assert not decoder.captured
    (message,) = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert message.endswith("(operation not permitted when stream is capturing); its steps are launched")


def test_a_graph_is_stale_when_the_weights_have_moved(packed_folder: Path) -> None:
    model: Any = slimplus.load(packed_folder, dtype=torch.bfloat16).eval()
    decoder = GraphDecoder(model)
    written(decoder.generate, "one", [999])
    steps = decoder._steps
    assert steps is not None
    assert not steps.is_stale()  # there is no graph
    steps.graph = Graph()  # type: ignore[assignment]
    steps._read, steps._weights = graph_steps._addresses(model), list(graph_steps._weights(model))
    assert not steps.is_stale()
    model.model.layers[0].self_attn.q_proj.forget()
    assert steps.is_stale()
    model.model.layers[0].self_attn.q_proj.fused._backend = steps._weights[0]
    assert not steps.is_stale()
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.clone())
    assert steps.is_stale()


def test_windows_of_attention_are_kept_by_the_mask(make_model: ModelMaker) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model("mistral"), dtype=torch.float32).eval()
    assert model.config.sliding_window == 8
    for batch in BATCHES:
        expected = written(model.generate, batch, [999])
        decoder = GraphDecoder(model)
        assert torch.equal(written(decoder.generate, batch, [999]), expected)
        assert decoder._steps is not None


@pytest.mark.parametrize("option", [{"repetition_penalty": 1.5}, {"max_time": 60.0}, {"use_cache": False}], ids=str)
def test_what_the_loop_does_not_know_generate_does(loaded: Any, option: dict[str, Any]) -> None:
    decoder = GraphDecoder(loaded)
    assert torch.equal(
        written(decoder.generate, "one", [999], **option), written(loaded.generate, "one", [999], **option)
    )
    assert decoder._steps is None


def test_a_cache_of_the_caller_is_filled(loaded: Any) -> None:
    expected = written(loaded.generate, "one", [999])
    cache = StaticCache(config=loaded.config, max_cache_len=64)
    decoder = GraphDecoder(loaded)
    assert torch.equal(written(decoder.generate, "one", [999], past_key_values=cache), expected)
    assert int(cache.get_seq_length()) == expected.shape[1] - 1
    assert decoder._steps is None


def test_experts_are_left_to_generate(make_model: ModelMaker) -> None:
    from slimplus.nn.expert_stack import ExpertStack

    model = torch.nn.Module()
    model._can_compile_fullgraph = True  # type: ignore[assignment]
    model.stack = ExpertStack.__new__(ExpertStack)
    torch.nn.Module.__init__(model.stack)
    assert not decoding._is_static(model, {"position_ids": PROMPT})


def test_beams_are_refused(loaded: Any) -> None:
    with pytest.raises(ValueError, match="a GraphDecoder decodes greedily or by sampling"):
        written(GraphDecoder(loaded).generate, "one", [999], num_beams=2)


@torch.no_grad()
def test_a_compiled_step_is_one_graph_and_writes_the_same(packed_folder: Path) -> None:
    model: Any = slimplus.load(packed_folder, dtype=torch.bfloat16).eval()
    expected = written(model.generate, "one", [999])[:, PROMPT.shape[1] :]
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    cache = StaticCache(config=model.config, max_cache_len=32)
    tokens = [model(input_ids=PROMPT, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)]
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    for position in range(PROMPT.shape[1], PROMPT.shape[1] + 19):
        places = torch.tensor([[position]])
        logits = step(input_ids=tokens[-1][:, None], position_ids=places, past_key_values=cache, use_cache=True).logits
        tokens.append(logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(tokens, dim=1), expected)
    (graph,) = graphs
    products = [node for node in graph.graph.nodes if "int4_linear" in str(node.target)]
    assert len(products) == 2 * 4  # of a block: q, k and v at once, o, gate and up at once, down
