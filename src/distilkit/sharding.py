"""Fully sharded training: FSDP2 around each layer, with the checkpoints of a single process."""

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from distilkit.errors import UserError
from distilkit.layers import layer_stack


class FullyShardedStrategy(DDPStrategy):
    """Shard weights, gradients and optimizer state over all processes, layer by layer, with ``torch.fully_shard``.

    1. A layer's weights are gathered when it runs, in bfloat16 with ``precision=bf16-mixed``. Embeddings and heads are
       gathered in float32 for the whole micro-batch, because the losses read them outside of any forward. Gradients
       are summed in float32.
    2. ``shard_teacher=False`` gives each process the whole teacher: more memory, less communication.
    3. Rank 0 saves whole weights and optimizer states, as one process does, so that each resumes the other's run.

    Processes are started and joined as by DDP. Lightning's own ``ModelParallelStrategy`` needs the number of processes
    in the config, and numbers the optimizer's parameters in another way than one process.
    """

    def __init__(self, *, shard_teacher: bool = True, **kwargs: Any) -> None:
        """Store whether the teacher is sharded; the other arguments are those of ``DDPStrategy``."""
        super().__init__(**kwargs)
        self.shard_teacher = shard_teacher

    def setup(self, trainer: Trainer) -> None:
        """Shard the module, which moves one layer after another to the device, and build the optimizer of its shards."""
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        if not isinstance(self.lightning_module, FSDPModule):
            self._shard(self.lightning_module)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self, module: LightningModule) -> None:
        halves = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        in_layers = MixedPrecisionPolicy(param_dtype=halves, reduce_dtype=torch.float32)
        parts: Any = module  # a DistillationModule, which imports this file
        student, teacher, objective = parts.student, parts.teacher, parts.objective
        # Relations enter backward within a layer, where no hook would gather its weights again.
        related = objective.relation_layers(student, teacher)[0] if "rel" in objective.weights else None
        for model in (student, teacher if self.shard_teacher else None):
            for number, layer in enumerate(_layers(model) if model is not None else ()):
                kept = model is student and number == related
                fully_shard(layer, mesh=mesh, mp_policy=in_layers, reshard_after_forward=not kept)
        whole = set() if teacher is None or self.shard_teacher else set(teacher.to(self.root_device).parameters())
        # The root holds what is in no layer.
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), ignored_params=whole)
        # A step may not read all weights; an optimizer moves them by their momentum in any case.
        parts.set_reduce_scatter_unused_params(True)
        for step in ("training_step", "validation_step"):
            register_fsdp_forward_method(module, step)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the student's weights on rank 0; the others return none. Tied weights stay one tensor."""
        assert self.lightning_module is not None
        state, whole = self.lightning_module.state_dict(keep_vars=True), dict[int, Any]()
        state = {name: tensor for name, tensor in state.items() if name.startswith("student.")}
        for tensor in state.values():
            if id(tensor) not in whole:
                whole[id(tensor)] = self._gather(tensor.detach())
        return {name: whole[id(tensor)] for name, tensor in state.items()} if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather an optimizer's state on rank 0, numbered as in one process."""
        saved: dict[str, Any] = super().optimizer_state(optimizer)
        state = {
            index: {name: self._gather(value) for name, value in values.items()}
            for index, values in saved["state"].items()
        }
        return {**saved, "state": state}

    def _gather(self, value: Any) -> Any:
        """Return the whole tensor of a shard on the CPU of rank 0, and None on the other ranks."""
        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor()  # all ranks take part
        return whole.cpu() if self.is_global_zero else None

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each rank its shards of the whole states of a checkpoint, which all ranks have read."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                index: {name: _shard_like(value, parameters[index]) for name, value in values.items()}
                for index, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def teardown(self) -> None:
        """Leave the shards on their devices, where the process group can still gather them."""
        assert self.accelerator is not None and self.cluster_environment is not None
        for part in (self.cluster_environment, self.precision_plugin, self.accelerator, self.checkpoint_io):
            part.teardown()


def _layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    try:
        return list(layer_stack(model))
    except UserError as error:
        found = f"trainer=fsdp shards a model by its layers, but model type {model.config.model_type!r} has no list"
        raise UserError(f"{found} of them; set trainer=ddp") from error


def _shard_like(value: Any, parameter: torch.Tensor) -> Any:
    """Return this rank's shard of a value that is as large as its parameter, and other values as they are."""
    if not isinstance(value, torch.Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)  # no communication
