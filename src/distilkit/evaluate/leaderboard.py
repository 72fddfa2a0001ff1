"""Predictions of test sets in the files that GLUE's leaderboard takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

_BY_ID = ("CoLA", "SST-2", "MRPC", "QQP", "WNLI")  # the other classes go by their names
_HIGHEST = 5.0  # of STS-B's numbers


def write_submission(
    folder: Path, name: str, predictions: Sequence[str | float], *, ids: Mapping[str, int] | None
) -> None:
    """Write ``<name>.tsv`` with ``index`` and ``prediction``, a line for each row of the test set.

    Predictions are names of classes with their ``ids``, or numbers, which are clipped to those of STS-B.
    """

    def answer(said: str | float) -> str:
        if ids is None:
            return f"{min(max(float(said), 0.0), _HIGHEST):.3f}"
        return str(ids[str(said)]) if name in _BY_ID else str(said)

    lines = ["index\tprediction", *(f"{index}\t{answer(said)}" for index, said in enumerate(predictions))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
