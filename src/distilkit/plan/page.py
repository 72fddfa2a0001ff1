"""Show a forecast in a terminal: blocks, text, models, steps, the run, more devices, and what is faster."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from distilkit.plan.preview import Example
from distilkit.records import duration
from distilkit.watch.memory import megabytes


def show(found: Mapping[str, Any], examples: list[Example]) -> None:
    """Print the numbers of a plan, all but its last line, and the masked blocks."""
    console = Console(markup=False)  # texts and paths may hold brackets
    if examples:
        console.print(_blocks(examples))
    for title, lines in _lines(found).items():
        console.print(title, style="bold")
        console.print(Padding("\n".join(lines), (0, 0, 1, 2)), highlight=False)
    for table, note in ((_devices(found), found["assumption"] + "\n"), (_alternatives(found), "")):
        if table.row_count:
            console.print(table, note, highlight=False)


def _blocks(examples: list[Example]) -> Table:
    table = Table("a block, and {what to predict}", box=None, padding=(0, 2, 1, 0), header_style="bold")
    table.add_column("what the teacher predicts", min_width=34)
    for example in examples:
        text, beside = Text(), Text()
        for number, piece in enumerate(example.pieces):
            target = f"{{{piece}}}" if number % 2 else piece
            text.append(" " * bool(number and target) + target, "magenta" if number % 2 else "")
        for target, best in zip(example.pieces[1::2], example.predictions, strict=True):
            beside.append(f"{target}:", "magenta")
            for token, share in best:
                beside.append(f" {token} {share:.0%}", "green" if token == target else "")
            beside.append("\n" if best else " there is no teacher\n")
        beside.rstrip()
        table.add_row(text, beside)
    return table


def _lines(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Write what is no table, by title."""
    step, micro, run, text = found["step"], found["micro_batch"], found["run"], found["text"]
    model = "{}: {parameters:,} parameters, {parameters_without_embeddings:,} without embeddings"
    count = step["micro_batches"]
    part = f" with {step['timed_micro_batches']}" if step["timed_micro_batches"] < count else ""
    whence = "" if micro["measured"] else " by their growth"
    tried = ", ".join(str(point["size"]) for point in micro["points"])
    energy = "energy unknown: this device reports no power" if run["kwh"] is None else f"{run['kwh']:,.3g} kWh"
    price = "" if run["price"] is None else f", price {run['price']:,.2f}"
    disk = ", ".join(f"{name} {megabytes(value)}" for name, value in found["disk_mb"].items())
    return {
        "text": [
            "{documents:,} documents, {tokens:,} tokens, {blocks:,} blocks to train on".format(**text),
            "tokens of a document: median {document_tokens_median:.0f}, 95th percentile {document_tokens_p95:.0f}".format(
                **text
            ),
            "{duplicates:,} of {documents_read:,} documents are exact duplicates of others".format(**text),
            "{unknown_share:.2%} of the tokens are unknown, {padding_share:.1%} of a block is padding".format(**text),
        ],
        "models": [model.format(name, **found[name]) for name in ("teacher", "student") if found[name]],
        "a step": [
            found["machine"],
            f"{step['step_seconds']:.3g} s for {count} micro-batch{'es' * (count != 1)} of {micro['timed']} blocks, "
            f"median of {step['steps']} steps{part}",
            f"{step['tokens_per_second']:,.0f} tokens/s, MFU {step['mfu']:.1%}, {megabytes(found['memory_mb'])} of memory",
            f"micro-batches tried: {tried}; {micro['largest']} blocks fit in {megabytes(micro['limit'] / 2**20)}{whence}",
        ],
        "the run": [
            f"until {run['end']}: {run['tokens']:,.0f} tokens, as of {run['steps']:,.1f} full steps",
            f"{duration(run['hours'])}, of which validation {duration(run['validation_hours'])}; saving is not counted",
            f"{run['device_hours']:,.3g} device-hours{price}; {energy}",
            f"disk: {disk}",
        ],
    }


def _devices(found: Mapping[str, Any]) -> Table:
    names = ("devices", "tokens/s", "tokens", "time", "device-hours", "price", "kWh")
    columns = (Column(name, justify="right") for name in names)
    table = Table(*columns, title="on more devices", title_justify="left")
    for each in found["devices"]:
        numbers = (f"{each[key]:,.0f}" for key in ("tokens_per_second", "tokens"))
        costs = ("-" if each[key] is None else f"{each[key]:,.2f}" for key in ("price", "kwh"))
        table.add_row(str(each["devices"]), *numbers, duration(each["hours"]), f"{each['device_hours']:,.3g}", *costs)
    return table


def _alternatives(found: Mapping[str, Any]) -> Table:
    columns = (Column(name, justify="right") for name in ("tokens/s", "speed", "time", "memory"))
    table = Table("instead", *columns, title="what else was measured", title_justify="left")
    for each in found["alternatives"]:
        if "reason" in each:
            table.add_row(f"{each['override']}: {each['reason']}", *"----")
            continue
        numbers = f"{each['tokens_per_second']:,.0f}", f"{each['ratio']:.2f}x", duration(each["hours"])
        table.add_row(each["override"], *numbers, megabytes(each["memory_mb"]))
    return table
