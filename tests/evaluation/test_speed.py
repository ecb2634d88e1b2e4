"""The table of a speed measurement."""

from __future__ import annotations

from slimplus.evaluation.speed import table


def test_one_model_alone_has_no_ratios() -> None:
    figures = {"prefill_tokens_per_second": 10.0, "decode_tokens_per_second": 2.5, "weight_bytes": 3_000_000_000}
    others = {"resident_bytes": 4_000_000, "peak_resident_bytes": 5_000_000, "load_seconds": 1.234}
    model = {"device": "cpu", "peak_device_bytes": None, **figures, **others}
    workload = {"dtype": "bfloat16", "prompt_tokens": 8, "new_tokens": 4, "rounds": 5}
    lines = table({"models": {"packed": model}, "workload": workload}).splitlines()
    assert lines[0] == "cpu, bfloat16, a prompt of 8 tokens, 4 new; median of 5"
    assert any(line.split() == ["weights", "in", "memory", "3.00", "GB"] for line in lines)
    assert not any("device memory" in line or "dense" in line for line in lines)
