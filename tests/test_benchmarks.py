"""The benchmarks at toy size; only figures that do not depend on the machine are asserted."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import batch_sizes, growth, loss, step, suite, trainer_script, training
from benchmarks.machine import Precision
from benchmarks.measure import NoProducts, here, in_turn, peak_megabytes
from benchmarks.models import Family
from benchmarks.naive import naive_loss
from benchmarks.ratios import ratios

WORK = step.Workload(family="bert", size="toy", length=16, dropout=0.0)
PLAN = suite.Plan(
    size="toy",
    length=16,
    blocks=2,
    memory_blocks=2,
    step_rounds=1,
    loss_tokens=64,
    loss_rounds=1,
    data_batches=1,
    data_rounds=1,
    weighed=("default", "raised"),
)


@pytest.mark.parametrize(
    ("family", "rows"),
    [("bert", "all"), ("bert", "masked"), ("roberta", "all"), ("roberta", "masked"), ("gpt2", "all")],
)
def test_the_naive_step_has_the_objectives_loss_and_gradient(family: Family, rows: Any) -> None:
    work = step.Workload(family=family, size="toy", length=16, dropout=0.0)
    naive, ours = step.Variant("naive", "fp32", rows), step.Variant("ours", "fp32", rows)
    steps = step.build_steps([naive, ours], work, initializer_range=0.2)
    losses = {variant: it.loss(step.batch_of(work, 3)) for variant, it in steps.items()}
    assert losses[naive].item() > 1
    torch.testing.assert_close(losses[ours], losses[naive], rtol=1e-4, atol=1e-4)
    for value in losses.values():
        value.backward()
    theirs = dict(steps[naive].student.named_parameters())
    for name, parameter in steps[ours].student.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_every_way_to_compute_the_loss_alone_gives_the_same() -> None:
    heads = loss.draw_heads(64, vocabulary=100, width=16, spread=0.3)
    expected = loss.naive_head_loss(heads)
    assert expected.item() > 1
    for other in (loss.full_logits_loss, loss.our_head_loss):
        torch.testing.assert_close(other(heads), expected, rtol=1e-4, atol=1e-4)


def test_the_flops_are_those_that_torch_counts() -> None:
    work = step.Workload(family="roberta", size="toy", length=16, dropout=0.0)
    (naive,) = step.build_steps([step.Variant("naive", "fp32", "all")], work).values()
    batch = step.batch_of(work, 2)
    for model in (naive.student, naive.teacher):
        model.set_attn_implementation("eager")  # the counter knows its products
    with FlopCounterMode(display=False) as counter:
        naive_loss(naive.student, naive.teacher, batch, objective=naive.objective, lm="mlm").backward()
    assert counter.get_total_flops() == pytest.approx(naive.flops(batch), rel=0.01)


def test_bert_base_takes_630_million_flops_a_token_and_466_on_masked_rows() -> None:
    work = step.Workload(family="bert", size="base", length=128, dropout=0.0)
    batch = step.batch_of(work, 2)
    chosen = [step.Variant("ours", "fp32", "all"), step.Variant("ours", "fp32", "masked")]
    with torch.device("meta"):  # shapes alone
        steps = step.build_steps(chosen, dataclasses.replace(work, device="meta"))
    flops = [each.flops(batch) / (2 * 128) for each in steps.values()]
    assert [count / 1e6 for count in flops] == pytest.approx([630, 466], rel=0.003)


def test_runs_are_timed_in_turn() -> None:
    order: list[str] = []
    runs: dict[str, Callable[[], object]] = {name: lambda name=name: order.append(name) for name in "ABC"}
    timings = in_turn(runs, rounds=3, once=frozenset("B"))
    assert "".join(order) == "ABCACAC"
    assert {name: timing.rounds for name, timing in timings.items()} == {"A": 3, "B": 1, "C": 3}


def test_the_peak_is_what_a_run_takes_at_once() -> None:
    earlier = bytearray(500_000_000)  # a higher peak, which must not hide the later one
    del earlier

    def run() -> None:
        for _ in range(3):
            block = bytearray(200_000_000)
            del block

    assert peak_megabytes(run) == pytest.approx(200, abs=20)


def test_without_products_shapes_and_gradients_stay() -> None:
    left, right = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with NoProducts():
        output = torch.nn.functional.linear(left, right)
        output.sum().backward()
    assert output.shape == (3, 5) and not output.any()
    assert left.grad is not None and left.grad.shape == left.shape and not left.grad.any()


@pytest.mark.parametrize("fast", ["fp32", "bf16"])
def test_the_suite_measures_every_variant_and_draws_them(
    fast: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "bf16" if fast == "fp32" else "fp32"
    monkeypatch.setattr(suite, "matmul_peaks", lambda device: {fast: 100.0, other: 10.0})
    monkeypatch.setattr(loss.torch, "compile", lambda function: function)  # compiling takes longer than all the rest
    suite.run_suite(here, PLAN, out=tmp_path)
    results = json.loads((tmp_path / "bench-toy.json").read_text("utf-8"))

    expected = {"naive fp32, all rows", "naive bf16, all rows", "naive bf16, masked rows"}
    expected |= {f"ours {fast}, all rows", f"ours {fast}, masked rows"}
    expected |= {"naive fp32, masked rows"} if fast == "fp32" else set()
    for malloc in ("default", "raised"):
        assert {record["variant"] for record in results["steps"] if record["malloc"] == malloc} == expected
    assert {"naive fp32", "naive bf16", f"ours {fast}"} <= {record["variant"] for record in results["losses"]}
    assert {record["variant"] for record in results["data"]} >= {"ours"}
    assert len(results["data"]) == 4
    for record in (*results["steps"], *results["losses"], *results["data"]):
        assert record["core_seconds"] > 0 and record["tokens_per_core_second"] > 0
    speeds = {
        *(f"step, {rows} rows: times the speed of naive {fast}" for rows in ("all", "masked")),
        f"loss alone: times the speed of naive {fast}",
        "data path: times the speed of transformers' collator",
    }
    assert speeds <= set(results["ratios"])
    assert results["machine"]["processor"] and results["machine"]["torch"] == torch.__version__
    assert results["machine"]["date"][:2] == "20"
    assert (tmp_path / "bench-toy.png").stat().st_size > 20_000
    if loss.absent():
        assert any("not measured" in note for note in results["notes"])


def bench_record(variant: str, rate: float, peak: float | None) -> dict[str, Any]:
    return {"variant": variant, "tokens_per_core_second": rate, "peak_mb": peak}


def test_ratios_are_ours_over_naive() -> None:
    steps = [
        bench_record("naive fp32, all rows", 100, 900),
        bench_record("naive bf16, all rows", 200, 1000),
        bench_record("naive bf16, masked rows", 200, 1000),
        bench_record("ours bf16, all rows", 300, 300),
        bench_record("ours bf16, masked rows", 500, None),  # out of memory
    ]
    steps = [{**row, "malloc": malloc} for row in steps for malloc in ("default", "raised")]
    losses = [bench_record("naive fp32", 10, 60), bench_record("naive bf16", 20, 60), bench_record("ours bf16", 80, 20)]
    losses += [bench_record("torch, hard targets bf16", 50, 40), bench_record("ours, hard targets bf16", 75, 10)]
    losses += [bench_record("Liger, chunked bf16", 64, 30)]
    data = [bench_record("ours", 25e6, 0), bench_record("HF collator, memory map", 1e6, 0)]
    found = ratios({"fast_precision": "bf16", "steps": steps, "losses": losses, "data": data})
    assert {what: round(ratio, 2) for what, ratio in found.items()} == {
        "step, all rows: times the speed of naive bf16": 1.5,
        "step, all rows: times the speed of naive fp32": 3.0,
        "step, all rows: share of the memory of naive bf16": 0.3,
        "step, masked rows: times the speed of naive bf16": 2.5,
        "loss alone: times the speed of naive bf16": 4.0,
        "loss alone: times the speed of naive fp32": 8.0,
        "loss alone: share of the memory of naive bf16": 0.33,
        "loss alone: times the speed of Liger": 1.25,
        "hard targets: times the speed of torch's": 1.5,
        "hard targets: share of the memory of torch's": 0.25,
        "data path: times the speed of transformers' collator": 25.0,
    }


def test_speed_is_compared_with_raised_thresholds_and_memory_with_the_default_ones() -> None:
    steps = [
        {**bench_record("naive fp32, all rows", 200, 1000), "malloc": "raised"},
        {**bench_record("ours fp32, all rows", 300, 900), "malloc": "raised"},
        {**bench_record("naive bf16, all rows", 2, 1000), "malloc": "default"},
        {**bench_record("naive fp32, all rows", 100, 1200), "malloc": "default"},
        {**bench_record("ours fp32, all rows", 300, 500), "malloc": "default"},
    ]
    assert ratios({"fast_precision": "fp32", "steps": steps, "losses": [], "data": []}) == {
        "step, all rows: times the speed of naive fp32": 1.5,
        "step, all rows: share of the memory of naive bf16": 0.5,
    }


def test_batch_sizes_rise_until_memory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_sizes, "batch_of", fails_above(2, torch.OutOfMemoryError()))
    monkeypatch.setattr(suite, "matmul_peaks", lambda device: {"fp32": 1.0, "bf16": 2.0})
    results = suite.run_gpu(
        here,
        out=tmp_path,
        device="cpu",
        size="toy",
        families=("bert", "gpt2"),
        lengths=(8,),
        batch_sizes=(1, 2, 4),
        rounds=1,
        loss_tokens=64,
    )
    found = {(record["family"], record["variant"], record["blocks"]) for record in results["steps"]}
    assert {blocks for _, _, blocks in found} == {1, 2}
    assert len(found) == 2 * (5 + 3)
    assert json.loads((tmp_path / "bench-gpu.json").read_text("utf-8"))["steps"] == results["steps"]
    assert (tmp_path / "bench-gpu.md").read_text("utf-8").count("\n| bert at 8 | ours bf16, all rows |") == 3
    assert (tmp_path / "bench-gpu.png").stat().st_size > 20_000
    assert {record["variant"] for record in results["losses"]} >= {"naive fp32", "naive bf16", "ours bf16"}


def test_the_best_batch_sizes_are_compared_with_the_naive_step_on_the_same_rows() -> None:
    def record(variant: str, blocks: int, rate: float, peak: float) -> dict[str, Any]:
        rows = "masked" if "masked" in variant else "all"
        named = {"family": "bert", "length": 8, "variant": variant, "rows": rows}
        return {**named, "blocks": blocks, "tokens_per_second": rate, "peak_mb": peak}

    best = batch_sizes.best_of_each(
        [
            record("naive bf16, all rows", 1, 10, 100),
            record("naive bf16, all rows", 2, 8, 200),
            record("ours bf16, all rows", 1, 20, 50),
            record("ours bf16, all rows", 2, 30, 60),
            record("ours bf16, all rows", 4, 25, 80),
            record("ours bf16, masked rows", 1, 5, 5),
        ]
    )
    assert [(row["blocks"], row["times_naive"], row["memory_share"]) for row in best] == [
        (1, 1.0, 1.0),
        (2, 3.0, 0.3),
        (1, None, None),
    ]


def test_what_was_measured_before_memory_ran_out_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    work = step.Workload(family="bert", size="toy", length=8, dropout=0.0)
    variant = step.Variant("ours", "fp32", "all")
    for message, error in (
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", RuntimeError),
        ("CUDA error: out of memory", RuntimeError),
        ("", MemoryError),
    ):
        monkeypatch.setattr(batch_sizes, "batch_of", fails_above(1, error(message)))
        assert [row["blocks"] for row in batch_sizes.measure_until_full(work, variant, (1, 2, 4), 1)] == [1]
    monkeypatch.setattr(batch_sizes, "batch_of", fails_above(1, RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        batch_sizes.measure_until_full(work, variant, (1, 2), 1)


def fails_above(most: int, error: Exception) -> Any:
    def batch_of(work: step.Workload, batch_size: int) -> Any:
        if batch_size > most:
            raise error
        return step.batch_of(work, batch_size)

    return batch_of


def test_growth_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "matmul_peaks", lambda device: {"fp32": 2.0, "bf16": 1.0})
    monkeypatch.setattr(growth, "prepare_once", lambda size: growth_record(size))
    results = suite.run_growth(here, out=tmp_path, tokens=(8, 16), vocabularies=(50, 70), megabytes=(1, 2), width=8)
    measured = {(record["maker"], record["tokens"], record["vocabulary"]) for record in results["loss"]}
    assert measured == {
        *(("ours", tokens, vocabulary) for tokens in (8, 16) for vocabulary in (50, 70)),
        ("naive", 8, 50),
        ("naive", 16, 50),
    }
    assert (tmp_path / "growth.json").exists()
    for name in ("loss", "preparation"):
        assert (tmp_path / f"growth-{name}.png").stat().st_size > 20_000


def growth_record(size: int) -> dict[str, Any]:
    return {"megabytes": size, "seconds": size, "core_seconds": 2.0 * size, "peak_mb": 5.0, "tokens": size}


def test_preparation_tokenizes_the_text_it_wrote() -> None:
    record = growth.prepare_once(1)
    assert 100_000 < record["tokens"] < 500_000  # words of a megabyte, whole or in a few pieces
    assert record["core_seconds"] > 0


def test_the_hard_targets_of_torch_are_ours() -> None:
    heads = loss.draw_heads(64, vocabulary=100, width=16, spread=0.3)
    words = dataclasses.replace(heads, labels=torch.arange(64))
    values, gradients = [], []
    for compute in (loss.torch_hard_loss, loss.our_hard_loss):
        heads.forget_gradients()
        values.append(compute(words))
        values[-1].backward()
        gradients.append(heads.student.weight.grad)
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_the_trainer_script_has_the_naive_loss() -> None:
    work = step.Workload(family="bert", size="toy", length=16, dropout=0.0)
    (naive,) = step.build_steps([step.Variant("naive", "fp32", "all")], work, initializer_range=0.2).values()
    batch = step.batch_of(work, 3)
    inputs = {"input_ids": batch["input_ids"], "output_hidden_states": True}
    student, teacher = naive.student(**inputs, labels=batch["labels"]), naive.teacher(**inputs)
    mask = torch.ones_like(batch["labels"], dtype=torch.bool)
    theirs = trainer_script.distillation_loss(student, teacher, mask, temperature=2.0)
    torch.testing.assert_close(theirs, naive.loss(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # starts two trainings
def test_whole_trainings_are_timed_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without transformers' Trainer, which needs a package that tests do not install."""
    shape = {"vocab_size": 30522, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    rates = iter([10.0, 20.0, 30.0, 40.0])
    monkeypatch.setattr(training, "_theirs", lambda out, **given: next(rates))
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: object())
    shape = {**shape, "intermediate_size": 32}
    found = training.run_training(out=tmp_path, steps=8, batch_size=4, shape=shape, threads=1)
    assert found["tokens_per_second"][training.DEFAULT] == [10.0, 30.0]
    assert found["tokens_per_second"][training.RAISED] == [20.0, 40.0]
    ours = found["tokens_per_second"][training.OURS]
    assert len(ours) == 2 and min(ours) > 0
    assert found["ratios"][training.DEFAULT] == pytest.approx(sum(ours) / 2 / 20)
    assert json.loads((tmp_path / "bench-train.json").read_text("utf-8")) == found
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs accelerate: pip install -c constraints.txt -e '.\[bench\]'"):
        training.run_training(out=tmp_path)
