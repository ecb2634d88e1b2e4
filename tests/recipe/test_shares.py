"""What a recipe asks of several processes: strategies that can do it, and windows that can be shared evenly."""

from __future__ import annotations

import pytest

from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.preflight import check_inputs
from slimplus.utils.errors import InputError
from tests.support.recipes import SMALL

SETTINGS = (
    "recipe=smollm2_135m_2bit",
    *SMALL,
    "data.samples=16",
    "training.batch_size=2",
    "trainer.accelerator=cpu",
)


@pytest.mark.parametrize(
    ("offload", "strategy", "needed"),
    [
        ("optimizer", "ddp", "deepspeed_stage_1 or deepspeed_stage_2 or deepspeed_stage_3, got ddp"),
        ("parameters", "deepspeed_stage_2", "deepspeed_stage_3, got deepspeed_stage_2"),
    ],
)
def test_offloading_needs_a_stage_that_can(offload: str, strategy: str, needed: str) -> None:
    with pytest.raises(InputError, match=f"trainer.offload: {offload} needs trainer.strategy={needed}"):
        load_recipe([SETTINGS[0], f"trainer.strategy={strategy}", f"trainer.offload={offload}"])


@pytest.mark.parametrize("section", ["training", "end_to_end"])
def test_8bit_moments_are_not_sharded(section: str) -> None:
    with pytest.raises(InputError, match=rf"^{section}\.optimizer: DeepSpeed cannot shard the moments of adamw_8bit"):
        load_recipe([SETTINGS[0], f"{section}.optimizer=adamw_8bit", "trainer.strategy=deepspeed_stage_2"])
    load_recipe([SETTINGS[0], f"{section}.optimizer=adamw_8bit", "trainer.strategy=ddp"])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("trainer.devices=3", "data.samples: 16 windows cannot be shared evenly by 3 processes; give a multiple of 3"),
        (
            "trainer.devices=4",
            "training.batch_size: 2 windows a step cannot be shared evenly by 4 processes in 1 parts",
        ),
        ("training.accumulate_grad_batches=4", "by 1 processes in 4 parts each .* give a multiple of 4"),
        ("training.batch_size=3", "data.samples: 16 windows are no whole number of steps of 3"),
        (
            "trainer.devices=4 training.batch_size=4",
            "data.evaluation.windows: 2 is less than one for each of 4 processes",
        ),
    ],
)
def test_windows_that_cannot_be_shared_evenly(keys: str, said: str) -> None:
    """Before PyTorch is loaded and a process started."""
    with pytest.raises(InputError, match=said):
        check_inputs(load_recipe([*SETTINGS, *keys.split()]))
