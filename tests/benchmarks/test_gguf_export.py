"""What the documentation says of llama.cpp is what was measured; this one needs no llama.cpp."""

from __future__ import annotations

import json

from tests.support.processes import ROOT

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "gguf_export.json").read_text(encoding="utf-8"))
PAGE = " ".join((ROOT / "docs" / "deployment.md").read_text(encoding="utf-8").split())


def test_the_documentation_shows_the_results() -> None:
    models, windows = RESULTS["models"], RESULTS["windows"]
    assert f"{windows[0]} windows of {windows[1]} tokens" in PAGE
    for name in ("transformers", "llama.cpp"):
        ratio = 100 * (models[name]["perplexity_ratio"] - 1)
        assert (
            f"| {name} | {models[name]['kl_mean']:.1e} | {models[name]['top_token_agreement']:.1%} | {ratio:+.2f}% |"
            in PAGE
        )
    whole = [equal == 32 for equal in RESULTS["greedy_tokens_equal"].values()]
    assert f"after {sum(whole)} of {len(whole)} prompts" in PAGE
    assert RESULTS["same_tokens_of_text"]
    assert RESULTS["machine"]["commit"]


def test_the_file_computes_what_the_packed_checkpoint_does() -> None:
    assert RESULTS["models"]["transformers"]["kl_mean"] < 1e-4
    assert abs(RESULTS["models"]["transformers"]["perplexity_ratio"] - 1) < 1e-3
