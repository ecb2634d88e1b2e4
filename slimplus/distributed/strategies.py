"""Distributed training: the processes of a job, and the strategy of each of its Trainers.

A job launches its processes once (`launch`) and then fits many small modules, one Trainer each. Every Trainer takes a
new strategy (`build_strategy`), which reuses the process group. After `fit` returns, each rank holds the module as an
ordinary one with its full parameters, whatever strategy trained it.
"""

from __future__ import annotations

import os
from typing import Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from slimplus.distributed.deepspeed import CPUZeROStrategy, ZeROStrategy
from slimplus.utils.errors import InputError

STAGES = {"deepspeed_stage_1": 1, "deepspeed_stage_2": 2, "deepspeed_stage_3": 3}
"""Name of a DeepSpeed strategy → its ZeRO stage."""

Offload = Literal["none", "optimizer", "parameters"]
"""Part of the training that DeepSpeed keeps in main memory: none, the optimizer, or optimizer and parameters."""


def launch(accelerator: str, devices: int, num_nodes: int, strategy: str) -> Fabric:
    """Start the job's other processes, once, and join them in a process group (gloo on CPU, NCCL on CUDA).

    Processes started from outside (torchrun, SLURM, a LOCAL_RANK in the environment) are used as they are; otherwise
    this command line is run again for each further local rank. One process with strategy "auto" gets no group.

    Args:
        accelerator: "cpu", "gpu", "cuda", or "auto" for CUDA if there is any and the CPU otherwise.
        devices: number of processes on each machine.
        num_nodes: number of machines.
        strategy: "auto" or the name of a strategy, as `build_strategy` takes it.

    Returns:
        A Fabric for work outside of training: `device`, `global_rank`, `world_size`, `all_reduce`, `broadcast` and
        `barrier`.

    Raises:
        InputError: if torchrun or SLURM has started another number of processes, or the machine lacks the devices.
    """
    _check_started(devices, num_nodes)
    # Lightning's own "auto" may choose Apple's GPUs, which have no float64.
    accelerator = {"gpu": "cuda", "auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(accelerator, accelerator)
    alone = strategy == "auto" and devices * num_nodes == 1
    strategy = "auto" if alone else "ddp"
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy)
    except (RuntimeError, MisconfigurationException) as error:
        raise InputError(
            f"trainer.accelerator={accelerator}, trainer.devices={devices}: {' '.join(str(error).split())} "
            "Give what this machine has, or trainer.accelerator=cpu"
        ) from error
    fabric.launch()
    return fabric


def _check_started(devices: int, num_nodes: int) -> None:
    """Check that torchrun or SLURM, if it started this process, started as many as the recipe asks for.

    Raises:
        InputError: if the numbers differ.
    """
    if TorchElasticEnvironment.detect():
        starter, option, started = "torchrun", "--nproc-per-node", TorchElasticEnvironment().world_size()
    elif SLURMEnvironment.detect():
        starter, option, started = "SLURM", "--ntasks-per-node", int(os.environ["SLURM_NTASKS"])
    else:
        return
    if started != devices * num_nodes:
        raise InputError(
            f"trainer.devices: {devices} devices on each of {num_nodes} machines (trainer.num_nodes), but {starter} "
            f"has started {started} processes; give its {option} as trainer.devices"
        )


def build_strategy(name: str, fabric: Fabric, offload: Offload = "none") -> str | Strategy:
    """Build the strategy of one Trainer in the processes of a job; every Trainer needs its own.

    Args:
        name: "auto" (no strategy on one device, DDP on several), "ddp" or "deepspeed_stage_1", "_2" or "_3".
        fabric: the processes of the job.
        offload: "optimizer" requires a DeepSpeed strategy, and "parameters" requires its stage 3.

    Raises:
        ValueError: for an unknown name, or an offload that the strategy does not support.
    """
    stage = STAGES.get(name, 0)
    if stage < {"none": 0, "optimizer": 1, "parameters": 3}[offload]:
        raise ValueError(f"the strategy {name!r} cannot offload {offload}")
    if name == "auto" and fabric.world_size == 1:
        return "auto"
    if name in ("auto", "ddp"):
        return _DDPStrategy()
    if not stage:
        raise ValueError(f"unknown strategy {name!r}: choose one of auto, ddp, {', '.join(STAGES)}")
    strategy = ZeROStrategy if fabric.device.type == "cuda" else CPUZeROStrategy
    return strategy(stage, offload)


def takes_step(trainer: Trainer) -> bool:
    """Return whether the next call of the optimizer steps, instead of accumulating another batch."""
    return not isinstance(trainer.strategy, ZeROStrategy) or trainer.strategy.takes_step


def gradient_norm(trainer: Trainer) -> float:
    """Return the norm of the gradient, reduced over the ranks, that the optimizer is about to use.

    The call is collective: every rank makes it and gets the same norm.
    """
    if isinstance(trainer.strategy, ZeROStrategy):
        return trainer.strategy.gradient_norm()
    gradients = [parameter.grad for parameter in trainer.lightning_module.parameters() if parameter.grad is not None]
    return float(nn.utils.get_total_norm(gradients))


def discard_gradient(trainer: Trainer) -> None:
    """Make the next call of the optimizer change neither parameters nor moments; every rank calls this."""
    if isinstance(trainer.strategy, ZeROStrategy):
        trainer.strategy.discard_gradient()
    else:
        for parameter in trainer.lightning_module.parameters():
            parameter.grad = None


class _DDPStrategy(DDPStrategy):
    """DDP without the broadcast of all buffers at every step: the buffers are frozen weights, equal on all ranks."""

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
        return super()._setup_model(model)
