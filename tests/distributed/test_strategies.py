"""Strategies between two real processes; run as a script, this file is the job those processes execute."""

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from slimplus.distributed.deepspeed import gathered
from slimplus.distributed.strategies import build_strategy, launch
from slimplus.training.optimizers import SignSGD
from slimplus.utils.errors import InputError
from tests.support.processes import ROOT

WIDTH = 320  # ZeRO stage 3 partitions only parameters of more than 1e5 elements
GLOBAL_BATCH, SAMPLES, EPOCHS = 4, 16, 4
TIMEOUT = 240
FAST, SLOW = ("ddp", "deepspeed_stage_2"), ("deepspeed_stage_1", "deepspeed_stage_3")


class ScaledLinear(nn.Module):
    """A frozen bf16 weight and a trained fp32 scale, like a fake-quantized linear layer."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(WIDTH, WIDTH).bfloat16(), persistent=False)
        self.scale = nn.Parameter(torch.ones(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale).t() / WIDTH**0.5 + self.bias


class Reconstruction(pl.LightningModule):
    rank: Tensor

    def __init__(self, rank: int, failing: bool = False, signs: bool = False) -> None:
        super().__init__()
        self.signs = signs
        self.block = nn.Sequential(ScaledLinear(), nn.Tanh(), ScaledLinear())
        self.register_buffer("rank", torch.tensor(rank), persistent=False)
        self.failing = failing

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.failing and batch_idx == 1:
            raise RuntimeError("this rank fails")
        x, target = batch
        assert x.dtype == self.block[0].weight.dtype == torch.bfloat16
        return (self.block(x.float()) - target).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer: torch.optim.Optimizer
        if self.signs:
            optimizer = SignSGD(self.parameters(), lr=1e-2)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4)  # no step hangs on rounding
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Observer(Callback):
    """What a parameter looks like during the fit, and a stop after half the epochs if asked for."""

    def __init__(self, stop_halfway: bool) -> None:
        self.stop_halfway = stop_halfway
        self.sizes: set[tuple[int, int]] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        scale = pl_module.block[0].scale
        outside = scale.numel()
        with gathered(pl_module):
            self.sizes.add((outside, scale.numel()))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = self.stop_halfway and trainer.current_epoch + 1 >= EPOCHS // 2


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, WIDTH, generator=generator).bfloat16()
    return x, torch.randn(SAMPLES, WIDTH, generator=generator)


def fit(
    name: str,
    fabric: Fabric,
    seed: int,
    folder: Path | None = None,
    resume: bool = False,
    failing: bool = False,
    signs: bool = False,
) -> tuple[Reconstruction, set[tuple[int, int]]]:
    """One block's fit; with a `folder` it writes checkpoints and, unless it resumes, stops halfway."""
    world = fabric.world_size
    torch.manual_seed(seed)
    module = Reconstruction(fabric.global_rank, failing, signs)
    share = TensorDataset(*(tensor[fabric.global_rank :: world] for tensor in data(seed)))
    observer = Observer(stop_halfway=folder is not None and not resume)
    checkpoints = [ModelCheckpoint(folder, filename="{step}", save_last="link")] if folder else []
    trainer = pl.Trainer(
        accelerator=fabric.device.type,
        devices=world,
        strategy=build_strategy(name, fabric),
        precision="32-true",
        use_distributed_sampler=False,
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        gradient_clip_val=0.05,
        callbacks=[observer, *checkpoints],
        enable_checkpointing=folder is not None,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )
    loader = DataLoader(share, batch_size=GLOBAL_BATCH // world)
    path = folder / "last.ckpt" if folder and resume else None
    trainer.fit(module, loader, ckpt_path=path, weights_only=True if path else None)
    return module, observer.sizes  # not the observer: Lightning gives callbacks a reference to the module


def run_strategy(name: str, fabric: Fabric, folder: Path) -> dict[str, Any]:
    """Two blocks in a row, then the first again: stopped halfway, resumed, and resumed when finished."""
    blocks, fits = [], []
    for seed in (0, 1):
        module, sizes = fit(name, fabric, seed)
        blocks.append(module.block)
        fits.append((weakref.ref(module), int(module.rank), sizes))
        del module
    fit(name, fabric, 0, folder)
    with mock.patch("torch.load", wraps=torch.load) as load:
        resumed = [fit(name, fabric, 0, folder, resume=True)[0].block.state_dict() for _ in range(2)]
    gc.collect()
    signs = folder / "signs"
    fit(name, fabric, 0, signs, signs=True)
    by_signs = [fit(name, fabric, 0, signs=True), fit(name, fabric, 0, signs, resume=True, signs=True)]
    return {
        "by_signs": [module.block.state_dict() for module, _ in by_signs],
        "states": [block.state_dict() for block in blocks],
        "resumed": resumed,
        "weights_only": [call.kwargs["weights_only"] for call in load.call_args_list],
        "outputs": [block(data(seed)[0].float()).detach() for seed, block in enumerate(blocks)],
        "alive": [module() is not None for module, _, _ in fits],
        "rank": [rank for _, rank, _ in fits],
        "sizes": [sorted(sizes) for _, _, sizes in fits],
    }


def main(folder: str, failing: str, *strategies: str) -> None:
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    fabric = launch("cpu", devices=2, num_nodes=1, strategy=strategies[0])
    for name in strategies:
        if failing == str(fabric.global_rank):
            fit(name, fabric, 0, failing=True)
        results = run_strategy(name, fabric, Path(folder, name))
        torch.save(results, Path(folder, f"{name}-{fabric.global_rank}.pt"))


def run(folder: Path, *strategies: str, failing: str = "none", launcher: tuple[str, ...] = ()) -> tuple[int, str]:
    """The job's exit status and output, once all of its processes have ended."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MASTER_", "SLURM_", "TORCHELASTIC_"))
        and key not in {"LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE"}
    }
    compiled = folder / "compiled"
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(compiled)}
    process = subprocess.Popen(
        [sys.executable, *launcher, __file__, str(folder), failing, *strategies],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a hanging job can be ended as a whole
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)  # every rank holds the pipe, so this awaits them all
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended, as they should
            os.killpg(process.pid, signal.SIGKILL)
    assert not compiled.exists(), "DeepSpeed compiled an extension"
    return process.returncode, output


def run_job(folder: Path, *strategies: str) -> Path:
    """One job for several strategies: it saves time, and shows that none leaves a mark on the next."""
    status, output = run(folder, *strategies)
    assert status == 0, output
    # Lightning warns of a checkpoint folder that is not empty; little else is said, however many fits.
    said = [line for line in output.splitlines() if "exists and is not empty" not in line]
    assert len(said) <= 4, output
    return folder


@pytest.fixture(scope="module")
def fast_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_job(tmp_path_factory.mktemp("fast"), *FAST)


@pytest.fixture(scope="module")
def slow_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_job(tmp_path_factory.mktemp("slow"), *SLOW)


@pytest.fixture(params=[*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ranks(request: pytest.FixtureRequest, strategy: str) -> list[dict[str, Any]]:
    """What each rank reports of `run_strategy`."""
    folder = request.getfixturevalue("fast_job" if strategy in FAST else "slow_job")
    return [torch.load(folder / f"{strategy}-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> list[nn.Module]:
    """The two blocks trained in one process on the same global batches."""
    fabric = launch("cpu", devices=1, num_nodes=1, strategy="auto")
    assert not torch.distributed.is_initialized()
    return [fit("auto", fabric, seed)[0].block for seed in (0, 1)]


def test_ranks_agree_with_each_other_and_with_one_process(ranks: list[dict[str, Any]], alone: list[nn.Module]) -> None:
    for seed, block in enumerate(alone):
        first, second = (results["states"][seed] for results in ranks)
        for key, expected in block.state_dict().items():
            assert (expected - expected.round()).abs().max() > 0.02, "it did not train"
            torch.testing.assert_close(first[key], expected, atol=1e-5, rtol=0)
            assert torch.equal(first[key], second[key])


def test_module_is_ordinary_after_fit(ranks: list[dict[str, Any]], alone: list[nn.Module]) -> None:
    """Its block runs outside of the fit, and holds on to nothing of the trainer."""
    for rank, results in enumerate(ranks):
        for seed, block in enumerate(alone):
            torch.testing.assert_close(results["outputs"][seed], block(data(seed)[0].float()), atol=1e-3, rtol=0)
        assert results["alive"] == [False, False]
        assert results["rank"] == [rank, rank], "buffers were broadcast"


def test_gathered_shows_full_parameters_during_fit(ranks: list[dict[str, Any]], strategy: str) -> None:
    outside = 0 if strategy == "deepspeed_stage_3" else WIDTH**2
    for results in ranks:
        assert results["sizes"] == [[(outside, WIDTH**2)]] * 2


def test_checkpoint_resumes_exactly_and_loads_weights_only(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        for resumed in results["resumed"]:
            assert all(torch.equal(resumed[key], value) for key, value in results["states"][0].items())
        assert results["weights_only"]
        assert all(results["weights_only"])


def test_an_optimizer_without_state_resumes_exactly(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        whole, resumed = results["by_signs"]
        assert all(torch.equal(resumed[key], value) for key, value in whole.items())
        assert (whole["0.scale"] - 1).abs().max() > 0.02, "it did not train"


def test_unknown_strategy_is_refused() -> None:
    fabric = launch("cpu", devices=1, num_nodes=1, strategy="auto")
    with pytest.raises(ValueError, match=r"unknown strategy 'fsdp'.*deepspeed_stage_3"):
        build_strategy("fsdp", fabric)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "deepspeed_stage_3"])
def test_a_failing_rank_ends_the_job(name: str, tmp_path: Path) -> None:
    status, output = run(tmp_path, name, failing="1")
    assert status != 0
    assert "this rank fails" in output


@pytest.mark.slow
def test_processes_of_torchrun_are_used(tmp_path: Path) -> None:
    status, output = run(tmp_path, "ddp", launcher=("-m", "torch.distributed.run", "--nproc_per_node=2"))
    assert status == 0, output
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["ddp-0.pt", "ddp-1.pt"]


@pytest.mark.parametrize(("tasks", "devices"), [(4, 1), (1, 4)])
def test_tasks_of_slurm_are_counted(monkeypatch: pytest.MonkeyPatch, tasks: int, devices: int) -> None:
    """Or four jobs would write into one run_dir, or one process leave three devices idle."""
    for key, value in {"NTASKS": tasks, "JOB_NAME": "quantize", "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    with pytest.raises(
        InputError, match=rf"{devices} devices .* SLURM has started {tasks} processes; give its --ntasks"
    ):
        launch("cpu", devices=devices, num_nodes=1, strategy="auto")


def test_devices_that_the_machine_lacks_are_named() -> None:
    with pytest.raises(InputError, match=r"accelerator=cuda, trainer\.devices=99: .+ or trainer\.accelerator=cpu"):
        launch("cuda", devices=99, num_nodes=1, strategy="auto")


if __name__ == "__main__":
    main(*sys.argv[1:])
