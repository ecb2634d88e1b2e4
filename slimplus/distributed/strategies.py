"""Distributed training: the processes of a job, and the strategy of each of its Trainers.

A job launches its processes once (`launch`) and then fits many small modules, one Trainer each. Every
Trainer takes a new strategy (`build_strategy`), which reuses the process group. After `fit` returns, each rank
holds the module as an ordinary one with its full parameters, whatever the strategy made of it meanwhile.
"""

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

Offload = Literal["none", "optimizer", "parameters"]
"""What DeepSpeed keeps in main memory: nothing, the optimizer's state and step, or the parameters as well."""


def launch(accelerator: str, devices: int, num_nodes: int, strategy: str) -> Fabric:
    """Start the job's other processes, once, and join them in a process group (gloo on CPU, NCCL on CUDA).

    Processes started from outside (torchrun, SLURM, a LOCAL_RANK in the environment) are used as they are;
    otherwise this command line is run again for each further local rank. One process with strategy "auto"
    needs no group and gets none.

    Returns a Fabric for work between the fits: `device`, `global_rank`, `world_size`, `all_reduce`,
    `broadcast`, `barrier`.

    Raises:
        InputError: if torchrun or SLURM has started another number of processes, or the machine lacks the devices.
    """
    _check_started(devices, num_nodes)
    # Lightning would take Apple's GPUs, which have no float64.
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
    """Whether what has started this process, if anything has, started as many as the recipe asks for."""
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
    """A strategy for one Trainer in the processes of `fabric`; each Trainer needs its own.

    Args:
        name: "auto" (one device, or ddp on several), "ddp" or "deepspeed_stage_1", "_2" or "_3".
        fabric: the processes.
        offload: "optimizer" takes a DeepSpeed strategy, and "parameters" its stage 3.

    Raises:
        ValueError: for any other name, and an offload that the strategy does not have.
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
    """Whether the optimizer, about to be called, will step."""
    return not isinstance(trainer.strategy, ZeROStrategy) or trainer.strategy.takes_step


def gradient_norm(trainer: Trainer) -> float:
    """Norm of the gradient, reduced over the ranks, that the optimizer is about to use. On every rank."""
    if isinstance(trainer.strategy, ZeROStrategy):
        return trainer.strategy.gradient_norm()
    held = [parameter.grad for parameter in trainer.lightning_module.parameters() if parameter.grad is not None]
    return float(nn.utils.get_total_norm(held))


def discard_gradient(trainer: Trainer) -> None:
    """Have the optimizer, about to be called, change nothing: neither parameters nor moments. On every rank."""
    if isinstance(trainer.strategy, ZeROStrategy):
        trainer.strategy.discard_gradient()
    else:
        for parameter in trainer.lightning_module.parameters():
            parameter.grad = None


class _DDPStrategy(DDPStrategy):
    """DDP without its broadcast of all buffers at every step: ours are frozen weights, equal on all ranks."""

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
        return super()._setup_model(model)
