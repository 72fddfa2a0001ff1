"""The section on the settings of a sweep: parallel coordinates, from what its runs set to what they reached."""

import math
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from distilkit.report.ablation import Run
from distilkit.report.drawing import COLOURS, WIDTH, plain, png
from distilkit.report.page import Plot

_GROUPS = ("objective", "optimizer", "scheduler", "student", "teacher", "data", "tokenizer", "budget", "seed")
_LEFT_OUT = ("_target_", "cache_dir", "description", "num_workers", "seed")  # ends of keys; the seed itself is one word
_FEWEST, _MOST = 3, 6  # runs of a sweep that is drawn; axes
_TICKS, _LOG = 6, 20.0  # values written at an axis; ratio from which an axis is logarithmic


def varied(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ, each with the value of each run, from the configs in their folders."""
    files = [Path(run["folder"]) / "config.yaml" for run in runs]
    configs: Any = [OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {} for file in files]
    frame = pd.json_normalize(configs).astype(object)
    frame = frame.where(frame.notna(), "-")
    own = (key for key in map(str, frame) if key.partition(".")[0] in _GROUPS)
    columns = {key: frame[key].tolist() for key in own if key == "seed" or not key.endswith(_LEFT_OUT)}
    return {key: values for key, values in columns.items() if len(set(map(str, values))) > 1}


def _heights(values: Sequence[Any]) -> tuple[list[float], dict[float, str]]:
    """Return the height of each value on an axis from 0 to 1, and what is written at some heights."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        names = sorted(set(map(str, values)))
        places = {name: index / max(1, len(names) - 1) for index, name in enumerate(names)}
        written = {place: plain(name, width=14) for name, place in places.items()}
        return [places[str(value)] for value in values], written
    logarithmic = min(values) > 0 and max(values) > _LOG * min(values)
    scaled = [math.log(value) if logarithmic else float(value) for value in values]
    low, span = min(scaled), max(scaled) - min(scaled)
    heights = [(value - low) / span if span else 0.5 for value in scaled]
    ticks: dict[float, str] = {}
    distinct = dict(zip(heights, values, strict=True))
    wanted = distinct if len(distinct) <= _TICKS else [index / (_TICKS - 1) for index in range(_TICKS)]
    for place in sorted(wanted, key=lambda place: (place not in (0, 1), place)):  # the ends first
        height = min(distinct, key=lambda other: abs(other - place))
        if all(abs(height - other) > 0.06 for other in ticks):
            ticks[height] = f"{distinct[height]:.4g}"
    return heights, ticks


def settings_plots(runs: Sequence[Run]) -> list[Plot]:
    """Plot each sweep's runs as lines over its settings to their held-out cross-entropy, the best one in front."""
    sweeps: dict[PurePath, list[Run]] = {}
    for run in runs:
        if run["after"].get("val/nll") is not None:
            sweeps.setdefault(PurePath(run["folder"]).parent, []).append(run)
    plots: list[Plot] = []
    for folder, own in sweeps.items():
        columns = dict(list(varied(own).items())[:_MOST]) if len(own) >= _FEWEST else {}
        if not columns:
            continue
        columns["cross-entropy"] = [run["after"]["val/nll"] for run in own]
        heights, ticks = zip(*map(_heights, columns.values()), strict=True)
        figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        axis = figure.subplots()
        order = sorted(range(len(own)), key=lambda index: columns["cross-entropy"][index])  # the best one first
        for rank, index in reversed(list(enumerate(order))):  # and in front
            share = rank / (len(own) - 1)
            beside = [0.04 * (share - 0.5)] * (len(columns) - 1) + [0.0]  # lines of equal values stand apart
            places = [column[index] + shift for column, shift in zip(heights, beside, strict=True)]
            colour = COLOURS[5] if rank == 0 else colormaps["viridis"](0.9 * share)
            axis.plot(places, color=colour, linewidth=1.2 if rank else 2.8)
        for place, written in enumerate(ticks):
            axis.axvline(place, color="black", linewidth=0.8)
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            for height, text in written.items():
                look: Any = {"textcoords": "offset points", "va": "center", "fontsize": 9, "bbox": box}
                axis.annotate(text, (place, height), (6, 0), **look)
        axis.set_xticks(range(len(columns)), [plain(key.replace(".", "\n", 1)) for key in columns])
        axis.set(yticks=[], ylim=(-0.05, 1.05), xlim=(-0.1, len(columns) - 0.6))
        axis.spines[:].set_visible(False)
        caption = f"Settings and held-out cross-entropy of the {len(own)} runs of {folder.name}, the best one in red."
        plots.append(Plot(name=f"settings_{len(plots) + 1}", caption=caption, png=png(figure)))
    return plots
