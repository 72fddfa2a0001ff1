"""Put a model's scores into its model card."""

import logging
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

_BEGIN, _END = "<!-- scores of distilkit.evaluate -->", "<!-- end of scores -->"


def add_scores(folder: Path, table: str) -> bool:
    """Write a markdown table of a model's scores into the card that distilkit made of it, in the place of an older table.

    Returns whether there is such a card; any other README.md is left alone.
    """
    card = folder / "README.md"
    if not table or not card.is_file():
        return False
    text = card.read_text("utf-8")
    if "distilkit]" not in text.partition("\n# ")[0]:  # among the tags of its header
        return False
    before, begin, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2] if begin and _END in rest else "\n"
    lines = [
        _BEGIN,
        "## Scores",
        "",
        "After fine-tuning on each task; medians over seeds, in percent where they are shares.",
        "",
    ]
    section = "\n".join([*lines, table, _END])
    try:
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".card", delete=False, encoding="utf-8") as temporary:
            temporary.write(before.rstrip("\n") + "\n\n" + section + after)
        Path(temporary.name).chmod(0o644)
        Path(temporary.name).replace(card)
    except OSError as error:  # a folder that is not ours to write: the scores are safe in their own file
        log.warning("%s keeps its old table: %s", card, error)
        return False
    return True
