"""Run by vLLM's Python: serves the checkpoints named on the standard input, and writes a line of JSON for each.

A line of the input is a job, `{"path", "prompts", "new_tokens", "engine", "adapter"}`: `engine` holds arguments of
`vllm.LLM`, `adapter` the folder of a LoRA adapter or null. A line of the output is `{"tokens"}` or `{"error"}`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a process for each engine would take longer
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
ENGINE = {"max_model_len": 128, "max_num_seqs": 4, "enforce_eager": True, "disable_log_stats": True}


def serve(job: dict[str, Any]) -> list[list[int]]:
    """Return the greedy tokens after each prompt."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine: dict[str, Any] = ENGINE | job["engine"]
    if job["adapter"]:
        engine |= {"enable_lora": True, "max_lora_rank": 8}
    model = LLM(job["path"], **engine)
    outputs = model.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        SamplingParams(max_tokens=job["new_tokens"], temperature=0, ignore_eos=True),
        use_tqdm=False,
        lora_request=LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    """Serve all the jobs, one after another."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM writes goes to the error output
    from vllm.distributed import cleanup_dist_env_and_memory

    jobs = [json.loads(line) for line in sys.stdin]
    for job in jobs:
        try:
            answer: dict[str, Any] = {"tokens": serve(job)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        results.write(json.dumps(answer) + "\n")
        results.flush()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
