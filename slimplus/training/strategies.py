"""Distributed training: the processes of a job, and the strategy of each of its Trainers.

A job launches its processes once (`launch`) and then fits many small modules, one Trainer each. Every
Trainer takes a new strategy (`build_strategy`), which reuses the process group. After `fit` returns, each rank
holds the module as an ordinary one with its full parameters, whatever the strategy made of it meanwhile.
"""

import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STAGES = {"deepspeed_stage_1": 1, "deepspeed_stage_2": 2, "deepspeed_stage_3": 3}

# DeepSpeed allocates its communication buffers at this many elements up front: 0.8 GB each with Lightning's
# 2e8. A parameter larger than this is reduced on its own.
BUCKET_SIZE = 2**24


def launch(accelerator: str, devices: int, num_nodes: int, strategy: str) -> Fabric:
    """Start the job's other processes, once, and join them in a process group (gloo on CPU, NCCL on CUDA).

    Processes started from outside (torchrun, SLURM, a LOCAL_RANK in the environment) are used as they are;
    otherwise this command line is run again for each further local rank. One process with strategy "auto"
    needs no group and gets none.

    Returns a Fabric for work between the fits: `device`, `global_rank`, `world_size`, `all_reduce`,
    `broadcast`, `barrier`.
    """
    alone = strategy == "auto" and devices * num_nodes == 1
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy="auto" if alone else "ddp")
    fabric.launch()
    return fabric


def build_strategy(name: str, fabric: Fabric) -> str | Strategy:
    """A strategy for one Trainer in the processes of `fabric`; each Trainer needs its own.

    `name` is "auto" (one device, or ddp on several), "ddp" or "deepspeed_stage_1", "_2" or "_3".

    Raises ValueError for any other name.
    """
    if name == "auto" and fabric.world_size == 1:
        return "auto"
    if name in ("auto", "ddp"):
        return _DDPStrategy()
    if name not in STAGES:
        raise ValueError(f"unknown strategy {name!r}: choose one of auto, ddp, {', '.join(STAGES)}")
    strategy = _ZeROStrategy if fabric.device.type == "cuda" else _CPUZeROStrategy
    return strategy(STAGES[name])


def gathered(module: nn.Module) -> AbstractContextManager[Any]:
    """Within this context every rank can read the full parameters of `module` during a fit.

    Only ZeRO stage 3 partitions parameters; for any other module this does nothing. Collective: all ranks
    enter together.
    """
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters)


class _DDPStrategy(DDPStrategy):
    """DDP without its broadcast of all buffers at every step: ours are frozen weights, equal on all ranks."""

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
        return super()._setup_model(model)


class _Float32(DeepSpeedPrecision):
    """Training in fp32 with dtypes and loss as they are.

    The base class casts frozen bf16 weights and inputs to fp32, and has DeepSpeed divide the loss by the number of
    accumulated batches although Lightning has done so.
    """

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def backward(  # type: ignore[override]
        self, tensor: torch.Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class _ZeROStrategy(DeepSpeedStrategy):
    """DeepSpeed ZeRO whose engine is dismantled after `fit`, so that many fits can follow in one process."""

    def __init__(self, stage: int) -> None:
        # Both warn at every step: DeepSpeed of PyTorch's new names for collectives, Lightning of its pytrees.
        for origin in (r"torch\.distributed\.c10d_logger", r"lightning\.pytorch\.utilities\._pytree"):
            warnings.filterwarnings("ignore", category=FutureWarning, module=origin)
        super().__init__(
            stage=stage,
            precision_plugin=_Float32(),
            logging_level=logging.ERROR,
            # Only DeepSpeed's throughput log reads this; unset, Lightning asks the loader's batch sampler.
            logging_batch_size_per_gpu=1,
            reduce_bucket_size=BUCKET_SIZE,
            allgather_bucket_size=BUCKET_SIZE,
        )

    def _setup_model_and_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = {child: set(vars(child)) for child in model.modules()}
        engine_and_optimizer = super()._setup_model_and_optimizer(model, *args, **kwargs)
        self._added_attributes = {child: vars(child).keys() - names for child, names in before.items()}
        return engine_and_optimizer

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load without unpickling arbitrary objects, which DeepSpeed would do."""
        self.deepspeed_engine.checkpoint_engine.load = _load_weights_only
        return super().load_checkpoint(checkpoint_path, weights_only)

    def teardown(self) -> None:
        module = self.lightning_module
        # When one rank fails the others are elsewhere, and a collective here would hang.
        if module is not None and self.model is not module and not module.trainer.interrupted:
            with gathered(module):
                _replace_parameters(module)
            self._dismantle_engine()
            self.model = module
        super().teardown()

    def _dismantle_engine(self) -> None:
        """Destroy the engine and what that leaves behind, which would keep it and the module alive."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

        engine = self.deepspeed_engine
        engine.destroy()
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        for child, names in self._added_attributes.items():
            for name in names:
                delattr(child, name)
        FWD_MODULE_STACK.clear()
        for method in vars(PartitionedParameterCoordinator).values():
            for cell in getattr(method, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):  # a method's lru_cache, which holds modules
                    cell.cell_contents.cache_clear()


class _CPUZeROStrategy(_ZeROStrategy):
    """The same between CPU processes over gloo, which DeepSpeed supports and Lightning refuses."""

    def __init__(self, stage: int) -> None:
        _set_deepspeed_accelerator_to_cpu()
        super().__init__(stage)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed wants an index

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()  # past the check for CUDA

    def setup_distributed(self) -> None:
        # The base class's steps without its check that device indices equal local ranks.
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def _set_deepspeed_accelerator_to_cpu() -> None:
    # DeepSpeed reads this while it is imported, so here and not above; the import takes seconds.
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class PlainGloo(CPU_Accelerator):
        """Without DeepSpeed's shared-memory all-reduce: building it takes a C++ compiler and a minute."""

        def create_op_builder(self, op_name: str) -> Any:
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

    set_accelerator(PlainGloo())


def _load_weights_only(path: str, map_location: Any = None) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True)


def _replace_parameters(module: nn.Module) -> None:
    """Give `module` new parameters of equal value: DeepSpeed's are shards, or keep its optimizer alive."""
    new = {old: nn.Parameter(old.detach().clone(), old.requires_grad) for old in module.parameters()}
    for child in module.modules():
        child._parameters = {name: None if old is None else new[old] for name, old in child._parameters.items()}
