"""The LightningModule of distillation: it trains a student on the terms of an objective."""

import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilkit import losses
from distilkit.budget import VIRTUAL_STEPS, Clock, run_over_time
from distilkit.errors import UserError
from distilkit.export.folder import student_files
from distilkit.language_model import LM, Batch, cast_parameters, lm_head
from distilkit.numbers import Spikes
from distilkit.objective import Objective, labelled_rows, real_rows
from distilkit.runs.continued import wandb_id
from distilkit.runs.same_run import on_purpose
from distilkit.schedule import build_schedule, piecewise
from distilkit.sharding import FullyShardedStrategy
from distilkit.teacher import Teacher
from distilkit.verdict import Verdict, weight_sample

log = logging.getLogger(__name__)


class DistillationModule(LightningModule):
    """Train a student on the terms of an objective, with a frozen teacher.

    Each term is a sum over tokens, divided once by the tokens of the whole optimizer step, over all micro-batches and
    ranks. ``optimizer`` builds an optimizer from parameter groups. ``scheduler`` and ``scheduler_kwargs`` are name and
    arguments of ``transformers.get_scheduler``, with a warmup over ``warmup_share`` of the steps. With a ``budget`` in
    seconds of training, time takes the place of steps, and ends the run. ``record`` holds what the model card shows.
    Up to ``max_skipped`` optimizer steps whose loss or gradient is not finite change nothing; with more, or with 0 at the
    next step that logs, a ``UserError`` ends the run.
    An objective or a schedule that does not fit raises a ``UserError``.
    """

    def __init__(
        self,
        *,
        student: PreTrainedModel,
        teacher: Teacher | None,
        tokenizer: PreTrainedTokenizerBase,
        lm: LM,
        objective: Objective,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        scheduler: str,
        warmup_share: float,
        seed: int,
        record: Mapping[str, Any],
        scheduler_kwargs: Mapping[str, Any] | None = None,
        budget: float | None = None,
        max_skipped: int = 0,
    ) -> None:
        """Check the settings; the teacher moves with the module, but no checkpoint contains it."""
        super().__init__()
        if not isinstance(warmup_share, int | float) or not 0 <= warmup_share <= 1:
            raise UserError(f"scheduler.{warmup_share=}, but it must be between 0 and 1; the paper's is 0.05")
        objective.check_models(student=student, teacher=teacher.model if teacher else None, lm=lm)
        self.student = student
        self.teacher = teacher.model if teacher else None
        self.teacher_sha256 = teacher.sha256 if teacher and objective.reads_teacher else None
        self.teacher_name = teacher.name if teacher else None
        self.scores_teacher = teacher is not None and teacher.has_head
        self.keeps_teacher_dtype = teacher is not None and teacher.dtype == "float32"
        self.files = student_files(student, tokenizer)  # before training, so that an error in saving costs no run
        self.lm, self.objective, self.optimizer, self.seed = lm, objective, optimizer, seed
        kwargs: Any = dict(scheduler_kwargs) if isinstance(scheduler_kwargs, Mapping) else scheduler_kwargs
        kwargs = {} if kwargs is None else kwargs
        self.schedule = functools.partial(build_schedule, name=scheduler, warmup_share=warmup_share, kwargs=kwargs)
        try:  # refuse a wrong one now
            trial = optimizer([{"params": [nn.Parameter(torch.zeros(1))]}])
        except (ValueError, TypeError) as error:
            raise UserError(
                f"optimizer cannot be built: {error}; change optimizer.* to what its class takes"
            ) from error
        self.schedule(trial, num_steps=100)
        self.record = dict(record)
        self.tokens, self.step_tokens = torch.tensor(0), torch.tensor(0)  # without padding, over all ranks
        self.num_steps = 0  # of the whole training; 0 before it is known
        self.clock = Clock(budget=budget)
        self.configured: list[dict[str, Any]] = []  # of each parameter group of the optimizer
        self.step_objective = objective.at(0.0)  # of the optimizer step that runs
        self.step_terms: dict[str, Tensor] = {}
        self.denominators: dict[str, Tensor] = {}
        self.all_finite = torch.tensor(True)
        self.first_bad = torch.tensor(-1)  # the first optimizer step whose loss or gradient was not finite
        self.step_loss = torch.tensor(0.0)  # of the whole optimizer step, over all ranks
        self.spikes = {"loss": Spikes(), "gradient_norm": Spikes()}
        self.max_skipped, self.num_skipped = max_skipped, 0
        self.val_metrics: dict[str, MeanMetric] = {}
        self.shown: dict[str, float] = {}  # on the host; Lightning reads its own values from the device at each batch
        self.before: dict[str, float] = {}  # held-out metrics before the first step
        self.after: dict[str, float] = {}  # and of the current weights, if they are scored
        self.val_blocks: list[dict[str, Tensor]] = []  # sums over the tokens of each held-out block, by batch
        self.before_blocks: dict[str, Tensor] = {}  # of all held-out blocks before the first step, (blocks,) each
        self.after_blocks: dict[str, Tensor] = {}
        self.start = weight_sample(student.state_dict())
        theirs = weight_sample(teacher.model.state_dict()) if teacher else {}
        same = self.start.keys() == theirs.keys() and all(map(torch.equal, self.start.values(), theirs.values()))
        depth = getattr(teacher.model.config, "num_hidden_layers", None) if teacher else None
        self.copied = same or (depth is not None and record.get("layers") == list(range(depth)))
        self.verdict: Verdict | None = None  # of the finished run, on the first rank
        self.strict_loading = False  # no teacher in checkpoints; ``on_load_checkpoint`` checks the student
        self.shapes = {name: list(tensor.shape) for name, tensor in student.state_dict().items()}  # before any sharding
        for parameter in objective.unread_parameters(student):  # DDP would wait for their gradients
            parameter.requires_grad_(False)
        settings = {"scheduler": scheduler, "warmup_share": warmup_share, "seed": seed, "scheduler_kwargs": kwargs}
        self.save_hyperparameters(vars(objective) | settings)
        self.train()  # models are loaded in eval mode, and ``Trainer.fit`` keeps it

    @property
    def progress(self) -> float:
        """The share of the training that is done, from 0 to 1: of its steps or its budget; 0 before it is known."""
        return self.progress_at(self.trainer.global_step if self.num_steps else 0)

    def progress_at(self, step: int) -> float:
        """Return the progress before an optimizer step that may lie ahead; with a budget it is that of now."""
        if self.clock.budget is not None:
            return self.clock.progress
        return min(1.0, step / self.num_steps) if self.num_steps else 0.0

    @property
    def tokens_seen(self) -> int:
        """The tokens of all finished optimizer steps over all ranks, without padding; reading it waits for the device."""
        return int(self.tokens)

    def train(self, mode: bool = True) -> "DistillationModule":
        """Set the mode of the student; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def setup(self, stage: str) -> None:
        """Check the ranks' configs and the precision, and cast the teacher once instead of at each step."""
        precision, strategy = str(self.trainer.precision), self.trainer.strategy
        # Each rank reads the metadata from the hub, where one may fail, and each node may have a cache of its own. Ranks
        # that rank 0 starts get the layers that it has chosen, without the measurement.
        text = json.dumps({**self.record, "metadata": None, "layer_choice": None}, sort_keys=True, default=str)
        same = json.loads(text, object_hook=lambda node: {key: node[key] for key in node if key != "cache_dir"})
        mine = hashlib.sha256(json.dumps(same).encode()).hexdigest()
        if self.trainer.world_size > 1 and strategy.broadcast(mine) != mine:
            found = f"rank {self.global_rank} was started with another config than rank 0"
            raise UserError(f"{found}; start all ranks with one command line")
        self.check_precision(self.trainer)
        if precision.startswith("bf16") and self.teacher is not None and not self.keeps_teacher_dtype:
            cast_parameters(self.teacher, torch.bfloat16)

    def check_precision(self, trainer: Trainer) -> None:
        """Refuse a precision of ``trainer`` that does not fit the models; also before any data are read."""
        precision = str(trainer.precision)
        if precision.endswith("-true") and precision not in ("32-true", "64-true"):
            raise UserError(
                f"trainer.precision={precision} holds weights and optimizer state in half precision, which loses small "
                "updates; set trainer.precision=bf16-mixed"
            )
        if "mse" in self.objective.weights and precision.startswith("16"):
            raise UserError(
                f"objective.alpha_mse={self.objective.alpha_mse} overflows in trainer.precision={precision}: "
                "squared logits are too large for float16; set trainer.precision=bf16-mixed or 32-true"
            )
        if precision == "16-mixed" and isinstance(trainer.strategy, FullyShardedStrategy):
            found = "trainer.precision=16-mixed scales the loss, and the scale of sharded gradients was not tried"
            raise UserError(f"{found}; set trainer.precision=bf16-mixed or 32-true, or trainer=ddp")

    def on_train_start(self) -> None:
        """Give a resumed run the learning rate, weight decay and so on of its config, not those of the checkpoint."""
        schedule: LambdaLR = self.trainer.lr_scheduler_configs[0].scheduler  # type: ignore[assignment]
        schedule.base_lrs = [configured["initial_lr"] for configured in self.configured]
        rates = [
            base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        schedule._last_lr = rates
        groups = self.trainer.optimizers[0].param_groups
        for group, configured, rate in zip(groups, self.configured, rates, strict=True):
            group.update(configured, lr=rate)  # without flags, on which the optimizer's state depends

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start the clock, and seed dropout by (seed, epoch, micro-batch, rank), so that a resumed run repeats it."""
        self.clock.start()
        if batch["is_first"]:  # Lightning's count, under which metrics are logged, may be too high after a resume
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        self.after = {}
        self.seed_dropout(batch_idx)

    def seed_dropout(self, batch_idx: int) -> None:
        """Seed torch's generators for a micro-batch of this epoch and rank."""
        torch.manual_seed(hash((self.seed, self.current_epoch, batch_idx, self.global_rank)) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this micro-batch's share of the loss of the optimizer step."""
        # 1. The denominators cover the whole optimizer step, so its first micro-batch sums the counts over ranks.
        if batch["is_first"]:
            counts = torch.stack([batch["num_tokens"], batch["num_labels"]]).to(self.device)  # (2,)
            counts = self.sum_over_ranks(counts)
            self.step_tokens = counts[0]
            self.denominators = self.objective.denominators(num_tokens=counts[0], num_labels=counts[1], lm=self.lm)
            self.step_objective, self.step_terms = self.objective.at(self.progress), {}
        models = self.student, self.teacher
        loss, terms = self.step_objective.loss(*models, batch, lm=self.lm, denominators=self.denominators)
        if self.step_objective.weights.keys() != self.objective.weights.keys() and not isinstance(self, FSDPModule):
            # DDP waits for a gradient of all that other steps read; an optimizer moves it by its momentum in any case.
            unread = self.step_objective.unread_parameters(self.student)
            loss = loss + sum(parameter.flatten()[:0].sum() for parameter in unread if parameter.requires_grad)
        # 2. Terms and the check stay on the device until a step is logged, so that the host does not wait.
        for name, term in {**terms, "": loss.detach()}.items():
            self.step_terms[name] = self.step_terms.get(name, 0.0) + term
        if batch["is_last"]:
            self.tokens = self.tokens.to(loss.device) + self.step_tokens
            self.step_loss = self.sum_over_ranks(self.step_terms[""])
            self._note(self.step_loss.isfinite())
            if self.logs(self.trainer.global_step + 1):
                self._check_finite()
                self._log_step()
        # 3. Lightning divides by the accumulation and DDP by the ranks, but the denominators contain both.
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def logs(self, step: int) -> bool:
        """Return whether the ``step``-th optimizer step, counted from 1, is logged."""
        log_every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by one of its connectors
        return bool(log_every) and step > 0 and step % log_every == 0

    def _note(self, finite: Tensor) -> None:
        """Keep the first step that is not finite on the device, unless such steps are skipped."""
        if not self.max_skipped:
            known, first = self.all_finite.to(finite.device), self.first_bad.to(finite.device)
            self.first_bad = torch.where(known & ~finite, self.trainer.global_step, first)
            self.all_finite = known & finite

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """End the optimizer step on the clock, and the run with its budget, before the schedule goes on."""
        self.clock.end_step(self._of_first_rank if self.trainer.world_size > 1 else None)
        if self.clock.done:
            self._end_here(self.trainer.global_step)
        super().lr_scheduler_step(scheduler, metric)

    def _end_here(self, step: int) -> None:
        """End the run after ``step`` optimizer steps, as ``max_steps`` does."""
        self.trainer.fit_loop.epoch_loop.max_steps = step

    def _of_first_rank(self, values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.trainer.strategy.root_device)
        torch.distributed.broadcast(tensor, src=0)
        agreed: list[float] = tensor.tolist()
        return agreed

    def on_validation_start(self) -> None:
        """Do not count the validation."""
        self.stop_clock()

    def on_train_end(self) -> None:
        """Do not count the end of a run."""
        self.stop_clock()

    def stop_clock(self) -> None:
        """Stop the clock until the next batch, after the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.clock.stop()

    def _log_step(self) -> None:
        sums = {name: float(self.sum_over_ranks(term)) for name, term in self.step_terms.items() if name}
        sums[""] = float(self.step_loss)
        kept: Any = self.trainer._results  # Lightning would log what an earlier step found
        for name in self.objective.weights.keys() - sums.keys():
            for key in (f"loss_{name}", f"weighted_{name}"):
                kept.pop(f"training_step.train/{key}", None)
        losses_by_name = {f"train/loss_{name}" if name else "train/loss": value for name, value in sums.items()}
        self.shown |= losses_by_name
        alphas: Any = self.step_objective.weights
        weighted = {f"train/weighted_{name}": alpha * sums.get(name, 0.0) for name, alpha in alphas.items()}
        self.log_dict(losses_by_name | weighted)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def axes(self) -> dict[str, float]:
        """Return what curves are drawn over: the tokens of all finished steps, and the hours of training."""
        return {"progress/tokens": float(self.tokens_seen), "progress/hours": self.clock.seconds / 3600}

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, which all must call."""
        if self.trainer.world_size == 1:
            return tensor
        total = tensor.clone()
        torch.distributed.all_reduce(total)  # Lightning's own waits at a barrier on the host
        return total

    def _check_finite(self) -> None:
        """Stop all ranks if any loss was not finite; called only where the host waits for the device anyway."""
        # After a run the module is on the CPU, but the process group may need the root device.
        broken = (~self.all_finite).float().to(self.trainer.strategy.root_device)
        if float(self.sum_over_ranks(broken)):
            raise UserError(self._not_finite(int(self.first_bad)))

    def _not_finite(self, step: int) -> str:
        """Describe an optimizer step, counted from 0, that is not finite, or with -1 the held-out loss."""
        found = f"the held-out loss is not finite after step {self.trainer.global_step}"
        if step >= 0:
            batches = self.trainer.num_training_batches
            epoch, within = divmod(step, math.ceil(batches / self.trainer.accumulate_grad_batches))
            values = ", ".join(f"{name or 'total'}={float(term):.4g}" for name, term in self.step_terms.items())
            at = f"(at step {self.trainer.global_step}: {values})"
            found = f"the loss is not finite at step {step} or its gradient is not {at}; distilkit.replay(run, "
            found += f"epoch={epoch}, step={within}) returns its batch of seed={self.seed}"
        last = Path(self.trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        on = f"go on with ckpt_path={last}" if last.is_file() else "there is no checkpoint to go on from"
        cure = (
            "Lower optimizer.lr, lower trainer.gradient_clip_val, or set trainer.precision=32-true or non_finite=skip"
        )
        return f"{found}. {cure}; {on}"

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the global norm, count spikes, and leave out a step that is not finite, on all ranks alike."""
        norm = self._clip(gradient_clip_val, GradClipAlgorithmType(gradient_clip_algorithm or "norm"))
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)  # it leaves out infinite gradients itself
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            norm = norm / scaler._scale
        finite = self.step_loss.isfinite() & (norm.isfinite() | (scaler is not None))
        self._note(finite)
        if self.max_skipped and not finite:  # the host waits for the device
            self.num_skipped += 1
            found = self._not_finite(self.trainer.global_step)
            if self.num_skipped > self.max_skipped:
                raise UserError(f"{found}; max_skipped={self.max_skipped} steps were left out before")
            if self.trainer.is_global_zero:
                log.warning("left out a step: %s", found.partition(". Lower")[0])
            if scaler is None:  # without gradients, an optimizer changes neither weights nor its own state
                optimizer.zero_grad()
        for name, value in (("loss", self.step_loss), ("gradient_norm", norm)):
            self.spikes[name].add(value)
        if self.logs(self.trainer.global_step + 1):
            counts = {f"train/spikes_{name}": spikes.count.float() for name, spikes in self.spikes.items()}
            counts |= {"train/skipped_steps": torch.tensor(float(self.num_skipped))} if self.max_skipped else {}
            self.log_dict({"train/gradient_norm": norm, **counts})

    def _clip(self, limit: float | None, algorithm: GradClipAlgorithmType) -> Tensor:
        """Clip the gradient, also of shards; return its global norm before."""
        # Lightning's own also refuses a fused optimizer with bfloat16, where no gradients are unscaled.
        parameters = [parameter for parameter in self.student.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        if limit and algorithm == GradClipAlgorithmType.VALUE:
            nn.utils.clip_grad_value_(parameters, limit)
        elif limit:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def configure_optimizers(self) -> Any:
        """Apply weight decay to matrices only, and schedule over the real number of optimizer steps."""
        trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim >= 2]
        others = [parameter for parameter in trained if parameter.ndim < 2]
        optimizer = self.optimizer([{"params": matrices}, {"params": others, "weight_decay": 0.0}])
        # Such an optimizer unscales gradients inside its kernel; Lightning refuses that in the first step only.
        unscales, clip = getattr(optimizer, "_step_supports_amp_scaling", False), self.trainer.gradient_clip_val
        if unscales and self.trainer.precision == "16-mixed" and clip:
            found = f"trainer.gradient_clip_val={clip} cannot clip them with trainer.precision=16-mixed"
            cure = "set optimizer.fused=null, or trainer.precision=bf16-mixed"
            raise UserError(f"optimizer.fused=true unscales gradients inside the optimizer, so that {found}; {cure}")
        over_time = self.clock.budget is not None
        self.num_steps = 0 if over_time else int(self.trainer.estimated_stepping_batches)  # 0: without training, too
        schedule = self.schedule(optimizer, num_steps=self.num_steps or VIRTUAL_STEPS)
        if over_time:
            run_over_time(schedule, self.clock)
        names = {"initial_lr", *getattr(self.optimizer, "keywords", ())}
        self.configured = [
            {name: value for name, value in group.items() if name in names and not isinstance(value, bool | None)}
            for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the means of the objective's terms, and of the scores of student and teacher on labelled tokens."""
        labels, rows, real = batch["labels"].flatten(), labelled_rows(batch), real_rows(batch)
        sizes = len(labels) if real is None else len(real), len(rows)
        num_tokens, num_labels = torch.tensor(sizes, device=self.device)
        # Denominators of this batch make each term a mean, which its metric weights by its tokens.
        objective = self.objective.of_validation()
        counts = objective.denominators(num_tokens=num_tokens, num_labels=num_labels, lm=self.lm)
        # Each model runs once; loss and scores share what it returns.
        models = self.student, self.teacher
        read = objective.read(*models, batch, whole=True)
        _, terms = objective.loss(*models, batch, lm=self.lm, denominators=counts, read=read)
        for name, mean in terms.items():
            if name not in self.val_metrics:
                self.val_metrics[name] = MeanMetric().to(self.device)
            if counts[name]:
                self.all_finite = self.all_finite.to(mean.device) & mean.isfinite()  # the metric ignores a NaN
                self.val_metrics[name].update(mean.float(), weight=counts[name])

        targets, predictions = labels[rows], {}  # (rows,)
        by_row = {"tokens": torch.ones(len(rows), device=self.device)}  # (rows,) each
        for prefix, model, (hidden, _) in zip(("", "teacher_"), models, read, strict=True):
            if model is None or hidden is None or (prefix and not self.scores_teacher):
                continue
            nll, predictions[prefix] = losses.score(lm_head(model, hidden[rows]), targets)  # (rows,) each
            self.all_finite = self.all_finite.to(nll.device) & nll.isfinite().all()
            by_row |= {f"{prefix}nll": nll, f"{prefix}accuracy": predictions[prefix] == targets}
        if "teacher_" in predictions:
            by_row["agreement"] = predictions[""] == predictions["teacher_"]
        num_blocks, length = batch["labels"].shape
        zeros = torch.zeros(num_blocks, device=self.device)
        sums = {name: zeros.index_add(0, rows // length, values.to(zeros)) for name, values in by_row.items()}
        self.val_blocks.append({"ids": block_ids(batch), **sums})

    def on_validation_epoch_end(self) -> None:
        """Log means over all ranks, perplexities, and the loss by the weights of the end, which compares over time."""
        self._check_finite()
        means = {f"loss_{name}": metric.compute().cpu() for name, metric in self.val_metrics.items()}
        blocks = {name: torch.cat([part[name] for part in self.val_blocks]) for name in self.val_blocks[0]}  # (blocks,)
        if self.trainer.world_size > 1:  # all ranks have equally many
            blocks = {name: self.all_gather(each).flatten() for name, each in blocks.items()}  # type: ignore[union-attr]
        blocks = {name: each.cpu() if name == "ids" else each.cpu().double() for name, each in blocks.items()}
        total = blocks["tokens"].sum()
        means |= {name: sums.sum() / total for name, sums in blocks.items() if name not in ("ids", "tokens")}
        weighted = [piecewise(alpha, 1.0) * means[f"loss_{name}"] for name, alpha in self.objective.weights.items()]
        values = {"loss": torch.stack(weighted).sum()}
        for name, mean in means.items():
            values[name] = mean
            if name.endswith("nll"):
                values[name.replace("nll", "perplexity")] = mean.exp()
        self.val_metrics, self.val_blocks = {}, []
        scores = {f"val/{name}": float(value) for name, value in values.items()}
        self.shown |= {name: scores[name] for name in ("val/loss", "val/nll", "val/accuracy") if name in scores}
        if self.trainer.sanity_checking:  # before the first step, where ``self.log`` has no effect
            self.before, self.before_blocks = scores, blocks
            for logger in self.trainer.loggers:
                logger.log_metrics({**scores, **self.axes()}, step=0)
            return
        self.after, self.after_blocks = scores, blocks
        self.log_dict(scores)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove the teacher, and add the data that export and resume need; the clock stands until the next batch."""
        self.stop_clock()
        self._check_finite()
        state = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith("student.")}
        broken = next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)
        # With trainer=fsdp, rank 0 alone has the weights, and the other ranks would wait for it.
        any_rank = torch.tensor(float(broken is not None), device=self.trainer.strategy.root_device)
        if float(self.sum_over_ranks(any_rank)):
            found = f"{broken or 'a weight'} is not finite at step {self.trainer.global_step}"
            cure = "Lower optimizer.lr, or set trainer.precision=32-true"
            raise UserError(f"{found}; no checkpoint was written. {cure}")
        checkpoint["state_dict"] = state
        checkpoint["distilkit"] = {
            "teacher": {"name": self.teacher_name, "sha256": self.teacher_sha256},
            "objective": vars(self.objective),
            "tokens_seen": self.tokens_seen,
            "clock": self.clock.state_dict(),
            "shapes": self.shapes,
            "record": self.record,
            "files": self.files,
            "before": self.before,
            "before_blocks": self.before_blocks,
            "spikes": {name: spikes.state_dict() for name, spikes in self.spikes.items()},
            "num_skipped": self.num_skipped,
            "row": self._row(),
            "wandb_id": wandb_id(self.trainer.loggers),
        }

    def _row(self) -> dict[str, float]:
        """Return what this step logs, which a checkpoint at its end may come before; nothing at a step without a log."""
        results = self.trainer.fit_loop.epoch_loop._results
        found = results.metrics(on_step=True)["log"] if self.logs(self.trainer.global_step) else {}
        logged = {name: float(value) for name, value in found.items()}
        return {"epoch": self.current_epoch, **logged} if logged else {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a resumed run has the objective, teacher and student of its checkpoint."""
        saved = checkpoint.get("distilkit")
        if saved is None:
            raise UserError("the checkpoint was not written by distilkit; give ckpt_path of a run of distilkit.train")
        cure = "resume with the same settings, or start again with student=hf student.name=<exported student>"
        may_change = (self.record.get("config") or {}).get("may_change") or ()
        for name, value in vars(self.objective).items():
            was = saved["objective"].get(name, getattr(Objective, name, None))
            if name != "implementation" and was != value and not on_purpose(f"objective.{name}", may_change):
                raise UserError(f"the checkpoint was trained with objective.{name}={was}, this run has {value}; {cure}")
        if saved["teacher"]["sha256"] != self.teacher_sha256:
            found = f"the checkpoint was distilled from teacher {saved['teacher']['name']!r}"
            raise UserError(f"{found}, this run has {self.teacher_name!r} or other weights of it; {cure}")
        for name in sorted(saved["shapes"] | self.shapes):
            if saved["shapes"].get(name) != self.shapes.get(name):
                raise UserError(f"the checkpoint has another student: {name} differs; {cure}")
        if 0 < (most := self.trainer.max_epochs or 0) < (done := checkpoint["epoch"]):
            cure = "set trainer.max_epochs, trainer.max_steps or budget above what it has"
            raise UserError(f"the checkpoint has {done} epochs, more than trainer.max_epochs={most}; {cure}")
        self.tokens = torch.tensor(saved["tokens_seen"])
        self.before, self.before_blocks = saved.get("before", {}), saved.get("before_blocks", {})
        self.num_skipped = saved.get("num_skipped", 0)
        for name, state in saved.get("spikes", {}).items():
            self.spikes[name].load_state_dict(state)
        # Earlier versions kept the seconds with a callback.
        seconds = checkpoint.get("callbacks", {}).get("Throughput", {}).get("seconds", 0.0)
        self.clock.load_state_dict(saved.get("clock", {"seconds": seconds, "wall": seconds, "pace": 0.0}))
        if self.clock.done:
            self._end_here(checkpoint["global_step"])
            found = "the checkpoint has used %.0f of budget=%g seconds, so that nothing is left to train"
            log.warning(found + "; a larger budget goes on", self.clock.used, self.clock.budget)


def block_ids(batch: Batch) -> Tensor:
    """Return a number for each block (blocks,) that tells its tokens, labels and their places, without padding."""
    ids, labels = batch["input_ids"], batch["labels"]
    mixed = (ids * 1_000_003 + labels) * 1_000_003 + torch.arange(ids.shape[1], device=ids.device)
    mixed = mixed * mixed  # modulo 2 ** 64
    mixed = mixed ^ (mixed >> 31)
    return (mixed * batch["attention_mask"] if "attention_mask" in batch else mixed).sum(dim=1)
