"""DeepSpeed ZeRO as Lightning strategies for many short trainings in one process, on GPUs and CPUs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

# Elements of each communication buffer, which DeepSpeed allocates before training; Lightning's default of 2e8 takes
# 0.8 GB a buffer. DeepSpeed reduces a larger parameter on its own.
BUCKET_SIZE = 2**24

MOMENTS = ("exp_avg", "exp_avg_sq")  # names of Adam's moments in its state


def gathered(module: nn.Module, modify: bool = False) -> AbstractContextManager[Any]:
    """Return a context in which every rank holds the full parameters of a module that is being trained.

    Only ZeRO stage 3 partitions parameters; for any other module the context does nothing. It is collective: all ranks
    enter it together.

    Args:
        module: the module, or a part of it.
        modify: whether to keep what the first rank changes in the parameters.
    """
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=0 if modify else None)


class _Float32(DeepSpeedPrecision):
    """Precision plugin that leaves dtypes and loss unchanged.

    The base class casts frozen bfloat16 weights and inputs to float32, and has DeepSpeed divide the loss by the number
    of accumulated batches, which Lightning has done already.
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


class ZeROStrategy(DeepSpeedStrategy):
    """DeepSpeed ZeRO whose engine is dismantled after `fit`, so that many trainings can follow in one process.

    Checkpoints are ordinary ones of Lightning, not DeepSpeed's shards: any strategy on any number of processes can
    resume from them, they are whole or absent, and loading them unpickles tensors and plain values only. They are
    small, since only quantizers are trained. The optimizer must be an Adam, or one without state.

    Args:
        stage: ZeRO stage, 1 to 3.
        offload: part of the training to keep in main memory, as `build_strategy` takes it.
    """

    def __init__(self, stage: int, offload: str) -> None:
        # Each step would show two warnings: on names of collectives that DeepSpeed uses, and on Lightning's pytrees.
        for origin in (r"torch\.distributed\.c10d_logger", r"lightning\.pytorch\.utilities\._pytree"):
            warnings.filterwarnings("ignore", category=FutureWarning, module=origin)
        super().__init__(
            stage=stage,
            precision_plugin=_Float32(),
            logging_level=logging.ERROR,
            # Only DeepSpeed's throughput log reads this value; without it, Lightning asks the loader's batch sampler.
            logging_batch_size_per_gpu=1,
            reduce_bucket_size=BUCKET_SIZE,
            allgather_bucket_size=BUCKET_SIZE,
            offload_optimizer=offload != "none",
            offload_parameters=offload == "parameters",
            pin_memory=True,
        )
        assert isinstance(self.config, dict)
        # DeepSpeed's own Adam for the CPU needs a compiler, and brings nothing for so few parameters.
        self.config["zero_force_ds_cpu_optimizer"] = False

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        before = {child: set(vars(child)) for child in model.modules()}
        # DeepSpeed replaces the parameters of the optimizer with flat shards.
        self._groups: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        engine_and_optimizer = super()._setup_model_and_optimizer(model, optimizer, *args, **kwargs)
        self._added_attributes = {child: vars(child).keys() - names for child, names in before.items()}
        return engine_and_optimizer

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's state with full parameters, as an ordinary module gives it; collective."""
        module = self._module
        with gathered(module):
            return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the optimizer's state for full parameters, as an optimizer without DeepSpeed gives it; collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self.deepspeed_engine.optimizer.optimizer
        state = {}
        if any(inner.state.values()):  # empty before the first step; reading a parameter's state creates it
            if not self.zero_stage_3:
                self._link_optimizer_state()
            step = next(iter(inner.state.values()))["step"]
            for index, trained in enumerate(self._trained):
                moments = {key: safe_get_full_optimizer_state(trained, key).clone() for key in MOMENTS}
                state[index] = {"step": step.clone(), **moments}
        indices = iter(range(len(self._trained)))
        groups = [
            _settings(group) | {"params": list(islice(indices, len(parameters)))}
            for group, parameters in zip(inner.param_groups, self._groups, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def _link_optimizer_state(self) -> None:
        """Link every parameter to its moments; DeepSpeed links them once, when only the first group has stepped."""
        zero = self.deepspeed_engine.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write an ordinary Lightning checkpoint; only the first rank writes."""
        super(DeepSpeedStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read an ordinary Lightning checkpoint, written by any strategy on any number of processes."""
        return super(DeepSpeedStrategy, self).load_checkpoint(checkpoint_path, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Distribute the full parameters of a checkpoint to the shards of this rank."""
        from deepspeed.utils import safe_set_full_fp32_param

        module = self._module
        with gathered(module, modify=True):
            module.load_state_dict(checkpoint["state_dict"], strict=strict)
        values = {id(p): checkpoint["state_dict"].get(name) for name, p in module.named_parameters()}
        for trained in self._trained:
            safe_set_full_fp32_param(trained, values[id(trained)].to(self.root_device))

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning restores the optimizer: it does, from its ordinary checkpoint."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Distribute the optimizer's state of a checkpoint to shards, which DeepSpeed would make at the first step."""
        from deepspeed.utils import safe_set_full_optimizer_state

        (saved,) = checkpoint["optimizer_states"]
        zero = self.deepspeed_engine.optimizer
        for group, settings in zip(zero.optimizer.param_groups, saved["param_groups"], strict=True):
            group.update(_settings(settings))
        if not saved["state"]:
            return
        shards = zero.fp32_partitioned_groups_flat if self.zero_stage_3 else zero.single_partition_of_fp32_groups
        step = saved["state"][0]["step"]
        for shard in shards:
            zero.optimizer.state[shard] = {"step": step.clone(), **{key: torch.zeros_like(shard) for key in MOMENTS}}
        if not self.zero_stage_3:
            zero._lazy_init_hp_params_optimizer_state()
        for trained, state in zip(self._trained, saved["state"].values(), strict=True):
            for key in MOMENTS:
                safe_set_full_optimizer_state(trained, state[key].to(self.root_device), key)

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _trained(self) -> list[nn.Parameter]:
        """The trained parameters, in the order in which an ordinary optimizer numbers them."""
        return [parameter for group in self._groups for parameter in group]

    @property
    def takes_step(self) -> bool:
        """Whether the next call of the optimizer steps; DeepSpeed calls it for every accumulated batch."""
        return bool(self.deepspeed_engine.is_gradient_accumulation_boundary())

    def gradient_norm(self) -> float:
        """Return the norm, over all ranks, of the gradient that the optimizer is about to use; NaN if not finite."""
        from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm

        zero = self.deepspeed_engine.optimizer
        groups = zero._get_norm_groups() if self.zero_stage_3 else [zero.scaled_global_norm()]
        norm = combine_grad_norm_groups(groups)
        return torch.nan if is_invalid_grad_norm(norm) else float(norm)

    def discard_gradient(self) -> None:
        """Make the next step change nothing: DeepSpeed skips a step whose norm is invalid, and cleans up after it."""
        zero = self.deepspeed_engine.optimizer
        name = "_get_norm_groups" if self.zero_stage_3 else "scaled_global_norm"

        def invalid() -> Any:
            delattr(zero, name)  # the method of the class comes back after this step
            return [torch.tensor(-1.0)] if self.zero_stage_3 else torch.tensor(-1.0)

        setattr(zero, name, invalid)

    def teardown(self) -> None:
        """Turn the module into an ordinary one with full parameters, and dismantle the engine; collective."""
        module = self.lightning_module
        # After an interruption the other ranks may be elsewhere, and a collective here would hang.
        if module is not None and self.model is not module and not module.trainer.interrupted:
            with gathered(module):
                _replace_parameters(module)
            self._dismantle_engine()
            self.model = module
        super().teardown()

    def _dismantle_engine(self) -> None:
        """Destroy the engine, and remove all that it leaves behind and that would keep it and the module in memory."""
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
                if hasattr(cell.cell_contents, "cache_clear"):  # the lru_cache of a method, which holds modules
                    cell.cell_contents.cache_clear()


class CPUZeROStrategy(ZeROStrategy):
    """DeepSpeed ZeRO between CPU processes over gloo, which DeepSpeed supports and Lightning refuses.

    Args:
        stage: ZeRO stage, 1 to 3.
        offload: part of the training to keep in main memory, as `build_strategy` takes it.
    """

    def __init__(self, stage: int, offload: str) -> None:
        _set_deepspeed_accelerator_to_cpu()
        super().__init__(stage, offload)

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""
        return torch.device("cpu", 0)  # DeepSpeed requires an index

    def setup_environment(self) -> None:
        """Set up the processes without the base class's check for CUDA."""
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Join the process group without the base class's check that device indices equal local ranks."""
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def _set_deepspeed_accelerator_to_cpu() -> None:
    """Choose DeepSpeed's accelerator for the CPU, over plain gloo."""
    # DeepSpeed reads the variable while it is imported, so that the import must follow here.
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class PlainGloo(CPU_Accelerator):
        """Accelerator without DeepSpeed's shared-memory all-reduce, whose build takes a C++ compiler and a minute."""

        def create_op_builder(self, op_name: str) -> Any:
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

    set_accelerator(PlainGloo())


def _replace_parameters(module: nn.Module) -> None:
    """Give a module new parameters of equal values: DeepSpeed's are shards, or keep its optimizer in memory."""
    new = {old: nn.Parameter(old.detach().clone(), old.requires_grad) for old in module.parameters()}
    for child in module.modules():
        child._parameters = {name: None if old is None else new[old] for name, old in child._parameters.items()}


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an optimizer's parameter group, without the parameters."""
    return {key: value for key, value in group.items() if key != "params"}
