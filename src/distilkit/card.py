"""Put a model's scores into its model card."""

from collections.abc import Sequence
from pathlib import Path

from distilkit.results import Result
from distilkit.tables import results_markdown

_BEGIN, _END = "<!-- scores of distilkit.evaluate -->", "<!-- end of scores -->"


def add_scores(folder: Path, results: Sequence[Result]) -> bool:
    """Write the table of a model's scores into the card that distilkit made of it, in the place of an older table.

    Returns whether there is such a card; any other README.md is left alone.
    """
    card = folder / "README.md"
    table = results_markdown(results)
    if not table or not card.is_file():
        return False
    text = card.read_text("utf-8")
    if "distilkit]" not in text.partition("\n# ")[0]:  # among the tags of its header
        return False
    before, begin, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2] if begin else "\n"
    lines = [
        _BEGIN,
        "## Scores",
        "",
        "After fine-tuning on each task; medians over seeds, in percent where they are shares.",
        "",
    ]
    section = "\n".join([*lines, table, _END])
    temporary = card.with_suffix(".tmp")
    temporary.write_text(before.rstrip("\n") + "\n\n" + section + after, "utf-8")
    temporary.replace(card)
    return True
