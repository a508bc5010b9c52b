"""Pictures of a run: the five dimensions of behaviour for each stage, and the course of the calibration phases."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = {"greedy": "#0f5c6e", "sampled": "#e8a33d"}
PHASE_COLOURS = ("#0f5c6e", "#e8a33d", "#7a4b94", "#5b8c3e")
INK, PALE = "#22313a", "#d9dfe2"
DIMENSIONS = (
    ("correctness", "Correctness", "share of right answers"),
    ("efficiency", "Efficiency", "correctness per tool call"),
    ("conciseness", "Conciseness", "no repeated or failed call"),
    ("successful_execution", "Successful execution", "share of calls that worked"),
    ("reasoning_tokens", "Brevity of reasoning", "tokens written · less is better"),
)
CURVES = (
    ("reward", "Reward"),
    ("correctness", "Correctness"),
    ("calls", "Tool calls"),
    ("model_tokens", "Tokens written"),
    ("entropy", "Entropy (nats per token)"),
)


def plot_calibration(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of ET-Agent's five dimensions: a panel each, bars for the stages, with 95 % intervals.

    report: as `report.calibration.calibration` makes it.
    """
    stages: Mapping[str, Any] = report["stages"]
    figure = Figure(figsize=(3.6 * len(DIMENSIONS), 4.8), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(DIMENSIONS))
    for panel, (measure, title, meaning) in zip(panels, DIMENSIONS, strict=True):
        _style(panel, title, meaning)
        for side, (sampling, colour) in zip((-1, 1), COLOURS.items(), strict=True):
            estimates = [stage[sampling][measure] for stage in stages.values()]
            _bars(
                panel, estimates, 0.2 * side, colour, sampling, "{:.0f}" if measure == "reasoning_tokens" else "{:.2f}"
            )
        panel.set_xticks(range(len(stages)), stages, fontsize=11)
        panel.set_ylim(0, 1.12 * panel.dataLim.y1 if measure == "reasoning_tokens" else 1.12)
    questions = next(iter(stages.values()))["greedy"]["questions"]
    figure.suptitle(
        f"Behaviour on {questions} test questions, stage by stage",
        x=0.01,
        ha="left",
        fontsize=17,
        color=INK,
        weight="bold",
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper right", ncols=2, frameon=False, fontsize=12)
    figure.text(0.01, 0.015, "Lines are 95 % intervals; their unit is the question.", fontsize=9, color="#6b7a82")
    figure.tight_layout(rect=(0, 0.04, 1, 0.95), w_pad=1.5)
    figure.savefig(path)


def plot_training(phases: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Write a PNG of `CURVES` over the steps of the phases, one phase behind the other.

    phases: for each phase the rows of its metrics.jsonl, in order, steps counted from 0.  A curve that no
    row has is left out; ValueError if none is left.
    """
    rows = [row for phase in phases.values() for row in phase]
    curves = [(name, title) for name, title in CURVES if any(name in row for row in rows)]
    if not curves:
        raise ValueError(
            f"{path}: nothing to draw: no step of {', '.join(phases)} has one of {', '.join(n for n, _ in CURVES)}"
        )
    figure = Figure(figsize=(3.2 * len(curves), 3.8), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (name, title) in zip(panels, curves, strict=True):
        _style(panel, title, "")
        done = 0.0
        for (phase, steps), colour in zip(phases.items(), itertools.cycle(PHASE_COLOURS), strict=False):
            x = [done + row["step"] + 1 for row in steps]
            y = [row.get(name, math.nan) for row in steps]
            marker = "o" if len(rows) <= 60 else ""
            panel.plot(x, y, color=colour, marker=marker, markersize=4, label=phase)
            if done:
                panel.axvline(done + 0.5, color=PALE, linewidth=1, zorder=0)
            done = x[-1] if x else done
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.margins(y=0.15)
    figure.supxlabel("step", fontsize=11, color=INK)
    figure.suptitle("Behaviour calibration, step by step", x=0.01, ha="left", fontsize=17, color=INK, weight="bold")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="upper right", ncols=len(phases), frameon=False, fontsize=12
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97), w_pad=1.5)
    figure.savefig(path)


def _style(panel: Axes, title: str, meaning: str) -> None:
    panel.set_title(title, loc="left", fontsize=13, color=INK, weight="bold", pad=20 if meaning else 8)
    panel.text(0, 1.025, meaning, transform=panel.transAxes, fontsize=10, color="#6b7a82")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(PALE)
    panel.tick_params(length=0, colors=INK)
    panel.grid(axis="y", color=PALE, linewidth=0.7)
    panel.set_axisbelow(True)


def _bars(
    panel: Axes, estimates: Sequence[Mapping[str, Any]], shift: float, colour: str, label: str, number: str
) -> None:
    """A bar for each estimate at 0, 1, …, moved by `shift`, with its interval and its value."""
    for position, estimate in enumerate(estimates):
        mean, (low, high) = estimate["mean"], estimate["ci95"]
        x = position + shift
        panel.bar(x, mean, width=0.38, color=colour, label=label if position == 0 else None)
        if low is not None and high is not None:
            panel.plot([x, x], [low, high], color=INK, linewidth=1.4)
        top = mean if high is None else high
        panel.annotate(
            number.format(mean), (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=8, color=INK
        )
