"""Show a forecast in a terminal of 80 columns: models, text, steps, the run, more devices, and what is faster."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table

from distilkit.plan.forecast import duration, size
from distilkit.plan.measure import Plan
from distilkit.plan.preview import show_examples, show_figures


def show(plan: Plan, console: Console) -> None:
    """Print all parts of a forecast but its last line."""
    found = plan.numbers
    if plan.examples:
        console.print(show_examples(plan.examples))
    parts = {"text": show_figures(plan.text), "models": _models(found), "a step": _step(found), "the run": _run(found)}
    for title, part in parts.items():
        console.print(title, style="bold")
        console.print(Padding(part, (0, 0, 1, 2)), highlight=False)
    if found["devices"]:
        console.print(_devices(found))
        console.print(Padding(found["assumptions"][0], (0, 0, 1, 2)), highlight=False)
    if found["alternatives"]:
        console.print(_alternatives(found))


def _models(found: Mapping[str, Any]) -> str:
    lines = []
    for name in ("teacher", "student"):
        if (model := found[name]) is None:
            continue
        own = f" {model['name']}" if "name" in model else ""
        without = f"{model['parameters_without_embeddings']:,} without embeddings"
        lines.append(f"{name}{own}: {model['parameters']:,} parameters, {without}")
    return "\n".join(lines)


def _step(found: Mapping[str, Any]) -> str:
    step, micro, machine = found["step"], found["micro_batch"], found["machine"]
    timed = f"{step['timed_steps']} steps timed"
    if step["timed_micro_batches"] < step["micro_batches"]:
        timed += f", of {step['timed_micro_batches']} micro-batches each"
    whence = "measured" if micro["measured"] else "by the growth up to there, not tried"
    tried = max(point["micro_batch_size"] for point in micro["points"])
    largest = f"largest that fits {size(micro['limit_mb'])}: {micro['largest']} ({whence})"
    smaller = "" if micro["timed"] == micro["configured"] else f", not {micro['configured']}, which does not fit"
    return "\n".join(
        [
            f"{machine['device']}, {machine['precision']}",
            f"{step['seconds']:.3g} s for {step['micro_batches']} micro-batches of {micro['timed']} blocks{smaller} "
            f"({timed})",
            f"{step['tokens_per_second']:,.0f} tokens/s, MFU {step['mfu']:.1%}, {size(found['memory_mb'])} at the peak",
            f"micro-batch sizes tried up to {tried}; {largest}",
        ]
    )


def _run(found: Mapping[str, Any]) -> str:
    run, disk = found["run"], found["disk_mb"]
    energy = "energy unknown: this device reports no power" if run["kwh"] is None else f"{run['kwh']:,.2f} kWh"
    price = [] if run["price"] is None else [f"price {run['price']:,.2f}"]
    return "\n".join(
        [
            f"until {run['end']}: {run['steps']:,.0f} steps, {run['tokens']:,.0f} tokens",
            f"{duration(run['training_hours'])} of training, {duration(run['validation_hours'])} of validation",
            ", ".join([f"{run['device_hours']:,.2f} device-hours", *price, energy]),
            f"disk: token cache {size(disk['cache'])}, checkpoints {size(disk['checkpoints'])}, "
            f"student {size(disk['student'])}",
        ]
    )


def _devices(found: Mapping[str, Any]) -> Table:
    priced = any(each["price"] is not None for each in found["devices"])
    powered = any(each["kwh"] is not None for each in found["devices"])
    names = ["devices", "tokens/s", "tokens", "time", "device-hours", *(["price"] * priced), *(["kWh"] * powered)]
    table = Table(*(Column(name, justify="right") for name in names), title="on more devices", title_justify="left")
    for each in found["devices"]:
        cells = [str(each["devices"]), f"{each['tokens_per_second']:,.0f}", f"{each['tokens']:,.0f}"]
        cells += [duration(each["hours"]), f"{each['device_hours']:,.2f}"]
        cells += [f"{each['price']:,.2f}"] * priced + [f"{each['kwh'] or 0:,.2f}"] * powered
        table.add_row(*cells)
    return table


def _alternatives(found: Mapping[str, Any]) -> Table:
    numbers = (Column(name, justify="right") for name in ("tokens/s", "times", "time", "memory"))
    table = Table("instead", *numbers, title="measured alternatives", title_justify="left")
    for each in found["alternatives"]:
        if "reason" in each:
            table.add_row(f"{each['override']}: {each['reason']}", *"----")
            continue
        cells = f"{each['tokens_per_second']:,.0f}", f"{each['ratio']:.2f}", duration(each["hours"])
        table.add_row(each["override"], *cells, size(each["memory_mb"]))
    return table
