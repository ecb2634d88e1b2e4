"""The documentation's table of what vLLM serves is that of the results; this one needs no vLLM."""

from __future__ import annotations

import json

from tests.support.processes import ROOT
from tests.vllm.architectures import ARCHITECTURES, RESULTS, table


def test_the_documentation_shows_the_results() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert table(results["rows"]) in (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    assert [row["model_type"] for row in results["rows"]] == list(ARCHITECTURES)
    assert results["machine"]["commit"]
    assert results["vllm"]
