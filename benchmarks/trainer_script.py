"""Distil with transformers' Trainer and a loss of one's own, as scripts do; nothing of distilkit is used.

``python benchmarks/trainer_script.py --teacher bert-base-uncased --text wiki.txt --steps 100`` prints tokens per second.
"""

import argparse
import copy
import json
import statistics
import time
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class DistillationTrainer(Trainer):
    """Add the KL to the teacher's soft targets, and the cosine between last hidden states, to the model's own loss."""

    def __init__(self, *args: Any, teacher: nn.Module, temperature: float = 2.0, **kwargs: Any) -> None:
        """Keep the teacher on the trainer's device."""
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        self.temperature = temperature

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return DistilBERT's loss of a batch (arXiv 1910.01108, section 3)."""
        outputs = model(**inputs, output_hidden_states=True)
        with torch.no_grad():
            targets = self.teacher(**inputs, output_hidden_states=True)
        loss = distillation_loss(outputs, targets, inputs["attention_mask"].bool(), temperature=self.temperature)
        return (loss, outputs) if return_outputs else loss


def distillation_loss(student: Any, teacher: Any, mask: Tensor, *, temperature: float) -> Tensor:
    """Weight soft targets, hard targets and cosine by 5, 2 and 1."""
    soft = F.kl_div(
        F.log_softmax(student.logits[mask] / temperature, dim=-1),
        F.softmax(teacher.logits[mask] / temperature, dim=-1),
        reduction="batchmean",
    )
    ours, theirs = student.hidden_states[-1][mask], teacher.hidden_states[-1][mask]
    cosine = F.cosine_embedding_loss(ours, theirs, ours.new_ones(len(ours)))
    total: Tensor = 5.0 * temperature**2 * soft + 2.0 * student.loss + cosine
    return total


class Clock(TrainerCallback):
    """Note the time after each optimizer step."""

    def __init__(self) -> None:
        """Start empty."""
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note it; on a GPU, after its work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def main() -> None:
    """Read the arguments, train, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--skip", type=int, default=5, help="first steps that are not timed")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    teacher = AutoModelForMaskedLM.from_pretrained(arguments.teacher)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers //= 2
    student = AutoModelForMaskedLM.from_config(config)
    student.load_state_dict(teacher.state_dict(), strict=False)

    def tokenize(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows["text"], return_special_tokens_mask=True, truncation=False)

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain.from_iterable(values)) for name, values in rows.items()}
        length = len(joined["input_ids"]) // arguments.block_size * arguments.block_size
        return {
            name: [values[i : i + arguments.block_size] for i in range(0, length, arguments.block_size)]
            for name, values in joined.items()
        }

    raw = load_dataset("text", data_files=arguments.text, split="train", cache_dir=f"{arguments.out}/cache")
    blocks = raw.map(tokenize, batched=True, remove_columns=["text"]).map(group, batched=True)
    clock = Clock()
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=TrainingArguments(
            output_dir=arguments.out,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=5e-4,
            max_steps=arguments.steps,
            warmup_steps=arguments.steps // 20,
            bf16=arguments.bf16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=blocks,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        callbacks=[clock],
    )
    trainer.train()
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)][
        arguments.skip - 1 :
    ]
    tokens = arguments.batch_size * arguments.block_size
    print(json.dumps({"tokens_per_second": tokens / statistics.median(seconds), "steps": len(seconds)}))


if __name__ == "__main__":
    main()
