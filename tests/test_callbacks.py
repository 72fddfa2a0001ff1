"""The comparison of input forms at the start of a run."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilkit.callbacks import CompareForms
from distilkit.data import DistillationDataModule
from distilkit.language_model import weight_hash
from distilkit.module import DistillationModule
from distilkit.objective import Objective
from distilkit.student import cut_student
from distilkit.teacher import Teacher
from streams import MASKING
from tiny import WORDS, build_model

LISTS = [" ".join(WORDS[start : start + 12]) for start in range(0, 60, 12)]  # a word follows from its position


class Lists:
    def fingerprint(self) -> dict[str, Any]:
        return {}

    def documents(self) -> Iterator[str]:
        for index in range(120):
            yield f"{LISTS[index % 5]} {WORDS[60 + index % 16]} {WORDS[60 + index // 16]}"


@pytest.fixture(scope="module")
def reader(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A teacher that was trained on single documents and knows words by their positions."""
    model = build_model("bert", num_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = tokenizer(LISTS, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        masked = torch.where(torch.rand(batch.shape) < 0.3, 4, batch)
        loss = torch.nn.functional.cross_entropy(model(masked).logits.flatten(0, 1), batch.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


Start = Callable[..., CompareForms]


@pytest.fixture
def start(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, reader: PreTrainedModel) -> Start:
    """Start a run of one step, and return its comparison."""

    def run(*, packing: str = "blocks", alpha_ce: float = 5.0, enabled: bool = True, **fit_fields: Any) -> CompareForms:
        data: Any = DistillationDataModule(
            corpus=Lists(),
            tokenizer=tokenizer,
            lm="mlm",
            masking=MASKING,
            cache_dir=str(tmp_path),
            block_size=32,
            global_batch_size=4,
            micro_batch_size=4,
            val_share=0.4,
            max_val_blocks=4,
            attend_across_documents=True,
            packing=packing,  # type: ignore[arg-type]
            num_workers=0,
            seed=0,
        )
        teacher = Teacher(model=reader, name="reader", revision="", lm="mlm", sha256=weight_hash(reader))
        objective = Objective(
            alpha_ce=alpha_ce,
            alpha_mlm=1.0,
            alpha_clm=0.0,
            alpha_cos=1.0,
            alpha_mse=0.0,
            temperature=1.0,
            soft_targets="all",
            implementation="fused",
        )
        module = DistillationModule(
            student=cut_student(teacher=teacher, tokenizer=tokenizer, layers="half"),
            teacher=teacher,
            tokenizer=tokenizer,
            lm="mlm",
            objective=objective,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            scheduler="constant",
            warmup_share=0.0,
            seed=0,
            record={"config": {}},
        )
        callback = CompareForms(enabled=enabled, ckpt_path=fit_fields.get("ckpt_path"))
        trainer = Trainer(
            accelerator="cpu",
            max_steps=1 if "ckpt_path" not in fit_fields else 2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            callbacks=[callback],
        )
        trainer.fit(module, datamodule=data, **fit_fields)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return callback

    return run


def test_a_run_warns_of_blocks_that_its_teacher_cannot_read(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="distilkit"):
        found = start().found
    assert found is not None
    assert found.nll["blocks"] > found.nll["documents"] + 0.3
    lines = [record.getMessage() for record in caplog.records if record.name == "distilkit.callbacks"]
    assert len(lines) == 2
    assert lines[0].startswith(f"the teacher on {found.sequences} held-out sequences: packed into blocks ")
    assert lines[1] == "the teacher reads data.packing=blocks clearly worse; set data.packing=documents"


def test_a_run_on_documents_has_nothing_to_warn_of(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="distilkit"):
        found = start(packing="documents").found
    assert "held-out sequences" in caplog.text
    assert "clearly worse" not in caplog.text
    assert found == start(packing="blocks").found


def test_no_comparison_is_made_where_it_is_off_or_says_nothing(start: Start, tmp_path: Path) -> None:
    assert start(enabled=False).found is None
    assert start(alpha_ce=0.0).found is None  # the teacher's head may be untrained
    assert (found := start().found) is not None
    assert start(ckpt_path=tmp_path / "last.ckpt").found == found  # of the part before
