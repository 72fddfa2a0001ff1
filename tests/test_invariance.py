"""The same training on any number of processes and micro-batches; ``pytest -m slow -s`` prints a table of deviations."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from training import largest_differences, train

STEPS, BROKEN = 12, 7
# The processes, the strategy and the blocks of a micro-batch; and those of the run that goes on after BROKEN steps.
ROWS: list[tuple[Any, ...]] = [
    (1, "single", 8),
    (1, "single", 4),
    (1, "single", 3),
    (1, "single", 1),
    (2, "ddp", 8),
    (2, "ddp", 4),
    (2, "ddp", 1),
    (4, "ddp", 2),
    (2, "fsdp", 8),
    (2, "fsdp", 4),
    (2, "fsdp", 1),
    (4, "fsdp", 2),
    (1, "single", 4, 1, "single", 2),
    (1, "single", 4, 2, "ddp", 4),
    (2, "ddp", 4, 1, "single", 8),
    (2, "ddp", 4, 4, "ddp", 1),
    (1, "single", 4, 2, "fsdp", 4),
    (2, "fsdp", 4, 1, "single", 4),
    (2, "fsdp", 4, 2, "ddp", 2),
    (4, "fsdp", 2, 2, "fsdp", 8),
]


def shown(ranks: int, strategy: str, micro: int) -> list[str]:
    return [strategy, str(ranks), str(micro), str(-(-16 // ranks // micro))]


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["blocks", "documents"])
def test_processes_micro_batches_and_strategies_change_rounding_alone(
    packing: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def run(ranks: int, strategy: str, micro: int, **fields: Any) -> Any:
        data = {"micro_batch_size": micro, "packing": packing}
        return train(tmp_path, tokenizer, ranks=ranks, sharded=strategy == "fsdp", data=data, **fields)

    expected = run(1, "single", 16, steps=STEPS)
    assert len(expected.steps) == STEPS
    assert len({sum(step.values()) for step in expected.steps}) > 1  # an epoch ends with a smaller step
    table = [["strategy", "processes", "micro-batch", "accumulation", "then", "loss", "weights and moments"]]
    table.append(["---"] * len(table[0]))
    for row in ROWS:
        found = run(*row[:3], steps=BROKEN if len(row) > 3 else STEPS)
        then = "-"
        if len(row) > 3:
            assert found.steps == expected.steps[:BROKEN]
            found = run(*row[3:], steps=STEPS, resume="last.ckpt")
            then = "{}, {} processes, micro-batch {}, accumulation {}".format(*shown(*row[3:]))
        assert found.steps == expected.steps[STEPS - len(found.steps) :], row  # each sequence once, in the same step
        assert found.tokens == expected.tokens
        loss, weights = largest_differences(expected, found)
        table.append([*shown(*row[:3]), then, f"{loss:.1e}", f"{weights:.1e}"])
        assert loss < 4e-6, row
        assert weights < 1e-4, row
    print(f"\ndata.packing={packing}")
    print("\n".join(f"| {' | '.join(cells)} |" for cells in table))
