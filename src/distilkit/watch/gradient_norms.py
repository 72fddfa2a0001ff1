"""The gradient norm of each term of the loss, for a run that asks for it."""

from dataclasses import replace
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from distilkit.errors import UserError
from distilkit.module import DistillationModule
from distilkit.sharding import FullyShardedStrategy


class GradientNorms(Callback):
    """Log the norm of each weighted term's gradient over the whole optimizer step, before clipping.

    Each term costs a forward and a backward pass more at steps that are logged, and a copy of the student's gradients.
    The passes have the dropout of the step. Sharded students are refused.
    """

    def __init__(self, *, by_term: bool) -> None:
        """Do nothing unless ``by_term``."""
        self.by_term = by_term
        self.batch: Any = None
        self.sums: dict[str, list[Tensor]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse gradients that lie on several ranks."""
        if self.by_term and isinstance(trainer.strategy, FullyShardedStrategy):
            found = "callbacks.gradient_norms.by_term=true needs whole gradients, which trainer=fsdp shards"
            raise UserError(f"{found}; set it to false, or trainer=ddp")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the micro-batch, if norms are asked for."""
        self.batch = (batch, batch_idx) if self.by_term else None

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the gradients of this micro-batch's terms; after the last one, log their norms."""
        module = pl_module
        assert isinstance(module, DistillationModule)
        if not self.by_term or not module.logs(trainer.global_step + 1):
            return
        batch, batch_idx = self.batch
        self.sums = {} if batch["is_first"] else self.sums
        weights: Any = module.step_objective.weights
        parameters = [each for each in module.student.parameters() if each.requires_grad]
        for name in weights:
            others: Any = {f"alpha_{other}": 0.0 for other in weights if other != name}
            alone = replace(module.step_objective, **others)
            with trainer.precision_plugin.forward_context():
                module.seed_dropout(batch_idx)  # as the next micro-batch does, so that nothing else changes
                loss, _ = alone.loss(
                    module.student, module.teacher, batch, lm=module.lm, denominators=module.denominators
                )
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            own = self.sums.setdefault(name, [torch.zeros_like(each) for each in parameters])
            for total, gradient in zip(own, found, strict=True):
                total += 0.0 if gradient is None else gradient
        if batch["is_last"]:
            for name, gradients in self.sums.items():
                norm = nn.utils.get_total_norm([module.sum_over_ranks(each) for each in gradients])
                module.log(f"train/gradient_norm_{name}", norm)
            self.sums, self.batch = {}, None
