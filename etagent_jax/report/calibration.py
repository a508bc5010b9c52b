"""The evidence of calibration: measures of every stage on the same questions, what they show, and tables of them.

`calibration` makes the report, a dictionary that is written as calibration.json; everything else here (and
in `plots`) reads such a dictionary, so any of it can be made again from the file.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from etagent_jax.scoring.behaviour import Estimate, Scored, distinct_correct_patterns, mean_estimate, summarise

SAMPLINGS = ("greedy", "sampled")
NEEDS_NO_CALL = "given"  # the built-in world's category of questions that hold their own answer
TITLES = {
    "correctness": "correctness",
    "efficiency": "efficiency",
    "tool_calls": "tool calls",
    "reasoning_tokens": "reasoning tokens",
    "format_valid": "valid format",
    "successful_execution": "successful execution",
    "conciseness": "conciseness",
}
_DECIMALS = {"tool_calls": 2, "reasoning_tokens": 1}  # others: 3
_LESS_IS_BETTER = ("reasoning_tokens", "tool_calls")
MOST, ALMOST_NONE = 0.5, 0.1  # shares of `given` questions answered with a call: more than, less than

Measure = Mapping[str, Any]  # {"mean": number, "ci95": [low, high]}; an open end is None


@dataclass(frozen=True, slots=True)
class StageResult:
    """Trajectories of one stage's policy with their correctness: at temperature 0, and sampled."""

    greedy: Scored
    sampled: Scored


def calibration(stages: Mapping[str, StageResult]) -> dict[str, Any]:
    """The report of `stages`, from the first to the last, ready for JSON.

    {"stages": {stage: {"greedy": M, "sampled": M, "by_kind": {category: {"greedy": M, "sampled": M}},
    "distinct_correct_patterns": E, "samples_per_question": mean number}}}, where
    E = {"mean": number, "ci95": [low, high]} and M = {"questions": number, correctness: E, tool_calls: E, …}
    with the measures of `scoring.behaviour.summarise`.  An open end of an interval (a single question's) is
    None.  Where there are *given* questions, a stage also has "given_with_calls": {"greedy": E, "sampled": E},
    the share of them answered with a call.

    ValueError where greedy trajectories were sampled or the reverse, or where two stages did not answer the
    same questions equally often: they could not be compared.
    """
    if not stages:
        raise ValueError("there are no stages to report on")
    _check_comparable(stages)
    return {"stages": {name: _stage_report(result) for name, result in stages.items()}}


def _check_comparable(stages: Mapping[str, StageResult]) -> None:
    first = next(iter(stages))
    expected: dict[str, Counter[str]] = {}
    for stage, result in stages.items():
        for sampling in SAMPLINGS:
            scored: Scored = getattr(result, sampling)
            if not scored:
                raise ValueError(f"stage {stage}: there are no {sampling} trajectories; evaluate the stage again")
            for trajectory, _ in scored:
                if (trajectory.temperature == 0) != (sampling == "greedy"):
                    raise ValueError(
                        f"stage {stage}: trajectory {trajectory.id} is counted as {sampling}, "
                        f"but its temperature is {trajectory.temperature}"
                    )
            answered = Counter(trajectory.question.id for trajectory, _ in scored)
            for question in expected.setdefault(sampling, answered) | answered:
                if answered[question] != expected[sampling][question]:
                    raise ValueError(
                        f"stage {stage} answered question {question} {answered[question]} times ({sampling}), "
                        f"stage {first} {expected[sampling][question]} times; evaluate all stages on the same questions"
                    )
    if expected["greedy"].keys() != expected["sampled"].keys():
        raise ValueError(f"stage {first}: greedy and sampled trajectories answer different questions")


def _stage_report(result: StageResult) -> dict[str, Any]:
    by_kind: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for sampling in SAMPLINGS:
        for kind, scored in _by_kind(getattr(result, sampling)).items():
            by_kind[kind][sampling] = scored
    report = {
        **{sampling: _measures(getattr(result, sampling)) for sampling in SAMPLINGS},
        "by_kind": {
            kind: {sampling: _measures(scored) for sampling, scored in by_kind[kind].items()}
            for kind in sorted(by_kind)
        },
        "distinct_correct_patterns": _estimate(distinct_correct_patterns(result.sampled)),
        "samples_per_question": len(result.sampled) / len({t.question.id for t, _ in result.sampled}),
    }
    if NEEDS_NO_CALL in by_kind:
        given = by_kind[NEEDS_NO_CALL]
        report["given_with_calls"] = {sampling: _estimate(_share_with_calls(given[sampling])) for sampling in SAMPLINGS}
    return report


def _by_kind(scored: Scored) -> dict[str, list[tuple[Any, float]]]:
    kinds = defaultdict(list)
    for trajectory, correctness in scored:
        kinds[trajectory.question.category].append((trajectory, correctness))
    return kinds


def _measures(scored: Scored) -> dict[str, Any]:
    questions = {trajectory.question.id for trajectory, _ in scored}
    return {"questions": len(questions), **{name: _estimate(e) for name, e in summarise(scored).items()}}


def _share_with_calls(scored: Scored) -> Estimate:
    """Share of trajectories that call a tool, the question being the unit."""
    called: defaultdict[str, list[bool]] = defaultdict(list)
    for trajectory, _ in scored:
        called[trajectory.question.id].append(bool(trajectory.calls))
    return mean_estimate(np.array([np.mean(values) for values in called.values()]), share=True)


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"mean": estimate.mean, "ci95": [bound if math.isfinite(bound) else None for bound in estimate.ci95]}


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement about the stages, whether these numbers bear it out, and the numbers."""

    text: str
    holds: bool
    numbers: str


def claims(report: Mapping[str, Any]) -> list[Claim]:
    """What calibration should show, checked on `report`; a claim about a stage that is not there is left out.

    "Intervals apart" means that the 95 % intervals do not overlap, which is stricter than a test at 5 %.
    """
    stages = report["stages"]
    found = []
    for measure in ("correctness", "efficiency"):
        for before, after in (("base", "sft"), ("sft", "phase2")):
            if before in stages and after in stages:
                a, b = stages[before]["greedy"][measure], stages[after]["greedy"][measure]
                text = f"Greedy {measure} rises from {before} to {after}, intervals apart"
                found.append(Claim(text, _apart(a, b) and b["mean"] > a["mean"], _change(measure, a, b)))
    if {"base", "sft"} <= stages.keys():
        a, b = (stages[stage]["distinct_correct_patterns"] for stage in ("base", "sft"))
        text = "More distinct correct tool-use patterns per question from base to sft, intervals apart"
        found.append(Claim(text, _apart(a, b) and b["mean"] > a["mean"], _change("distinct_correct_patterns", a, b)))
    if {"base", "phase2"} <= stages.keys():
        if "given_with_calls" in stages["base"]:
            found.append(_given_claim(stages["base"], stages["phase2"]))
        a, b = stages["base"]["sampled"], stages["phase2"]["sampled"]
        for measure, factor in (("efficiency", 2.0), ("reasoning_tokens", 0.6)):
            before, after = a[measure]["mean"], b[measure]["mean"]
            holds = after >= factor * before if factor > 1 else after <= factor * before
            bound = f"at {'least' if factor > 1 else 'most'} ×{factor:g}"
            ratio = f"×{after / before:.2f}" if before else "from nothing"
            numbers = f"{_change(measure, a[measure], b[measure])}; {ratio}"
            found.append(Claim(f"Sampled {TITLES[measure]} {bound} from base to phase2", holds, numbers))
    for before, after in (("sft", "phase1"), ("phase1", "phase2")):
        if before in stages and after in stages:
            found.append(_work_claim(before, after, stages))
    return found


def _given_claim(base: Mapping[str, Any], phase2: Mapping[str, Any]) -> Claim:
    a, b = base["given_with_calls"]["greedy"], phase2["given_with_calls"]["greedy"]
    calls = [stage["by_kind"][NEEDS_NO_CALL]["greedy"]["tool_calls"] for stage in (base, phase2)]
    return Claim(
        "Needless calls on *given* questions go from most to almost none: greedily, a call is made on more than "
        f"{MOST:.0%} of them at base and on fewer than {ALMOST_NONE:.0%} at phase2",
        a["mean"] > MOST and b["mean"] < ALMOST_NONE,
        f"share with a call {_change('share', a, b)}; calls per question {_change('tool_calls', *calls)}",
    )


def _work_claim(before: str, after: str, stages: Mapping[str, Any]) -> Claim:
    moved: dict[bool, list[str]] = {True: [], False: []}
    correctness_fell = False
    for sampling in SAMPLINGS:
        for measure in ("correctness", "efficiency", "reasoning_tokens"):
            a, b = stages[before][sampling][measure], stages[after][sampling][measure]
            if _apart(a, b):
                better = (b["mean"] < a["mean"]) == (measure in _LESS_IS_BETTER)
                moved[better].append(
                    f"{sampling} {TITLES[measure]} {_with_interval(measure, a)} → {_with_interval(measure, b)}"
                )
                correctness_fell |= measure == "correctness" and not better
    numbers = [
        f"{word}: {'; '.join(moved[better])}" for better, word in ((True, "better"), (False, "worse")) if moved[better]
    ]
    return Claim(
        f"{after} does visible work: correctness, efficiency or reasoning tokens improve from {before}, intervals "
        "apart, and correctness does not fall",
        bool(moved[True]) and not correctness_fell,
        ". ".join(numbers) or "no interval is apart from the one before",
    )


def _apart(a: Measure, b: Measure) -> bool:
    """Whether the intervals share no value; an open end (None) reaches everything."""
    below = lambda x, y: x["ci95"][1] is not None and y["ci95"][0] is not None and x["ci95"][1] < y["ci95"][0]
    return below(a, b) or below(b, a)


def _change(measure: str, a: Measure, b: Measure) -> str:
    """Such as `0.310 [0.270, 0.350] → 0.840 [0.810, 0.870] (rises, intervals apart)`."""
    verb = "rises" if b["mean"] > a["mean"] else "falls" if b["mean"] < a["mean"] else "stays"
    intervals = "apart" if _apart(a, b) else "overlap"
    return f"{_with_interval(measure, a)} → {_with_interval(measure, b)} ({verb}, intervals {intervals})"


def _number(measure: str, value: float | None) -> str:
    return "–" if value is None else f"{value:.{_DECIMALS.get(measure, 3)}f}"


def _with_interval(measure: str, estimate: Measure) -> str:
    return f"{_number(measure, estimate['mean'])} [{', '.join(_number(measure, bound) for bound in estimate['ci95'])}]"


def _plus_minus(measure: str, estimate: Measure) -> str:
    """The mean and how far the farther end of the interval lies from it."""
    mean, (low, high) = estimate["mean"], estimate["ci95"]
    reach = None if None in (low, high) else max(mean - low, high - mean)
    return f"{_number(measure, mean)} ± {_number(measure, reach)}"


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people: tables of the stages, by kind of question, and whether each claim holds."""
    stages = report["stages"]
    first = next(iter(stages.values()))
    lines = [
        "# Calibration",
        "",
        f"Each stage answered the same {first['greedy']['questions']} questions once greedily and "
        f"{first['samples_per_question']:g} times sampled. ± is the farther end of the 95 % interval, whose unit is "
        "the question. Efficiency is correctness per call (correctness itself without a call); conciseness is the "
        "share of trajectories without a repeated or failed call; reasoning tokens are those that the model wrote.",
        "",
        "![The five dimensions of behaviour, for each stage](calibration.png)",
        "",
        "## Stages",
        "",
    ]
    measures = list(TITLES)
    for part in (measures[:4], measures[4:]):
        header = ["stage", *(f"{TITLES[m]}, {sampling}" for m in part for sampling in SAMPLINGS)]
        rows = [
            [name, *(_plus_minus(m, s[sampling][m]) for m in part for sampling in SAMPLINGS)]
            for name, s in stages.items()
        ]
        if part[0] == measures[4]:
            header.append("distinct correct patterns, sampled")
            for row, stage in zip(rows, stages.values(), strict=True):
                row.append(_plus_minus("distinct_correct_patterns", stage["distinct_correct_patterns"]))
        lines += [*_markdown_table(header, rows), ""]
    for measure in ("correctness", "tool_calls"):
        header = ["kind", *(f"{name}, {sampling}" for name in stages for sampling in SAMPLINGS)]
        rows = [
            [
                kind,
                *(
                    _plus_minus(measure, s["by_kind"][kind][sampling][measure])
                    for s in stages.values()
                    for sampling in SAMPLINGS
                ),
            ]
            for kind in first["by_kind"]
        ]
        lines += [f"## {TITLES[measure].capitalize()} by kind of question", "", *_markdown_table(header, rows), ""]
    if "given_with_calls" in first:
        header = [
            "stage",
            *(f"{what}, {sampling}" for what in ("share with a call", "calls per question") for sampling in SAMPLINGS),
        ]
        rows = [
            [
                name,
                *(_plus_minus("share", s["given_with_calls"][sampling]) for sampling in SAMPLINGS),
                *(
                    _plus_minus("tool_calls", s["by_kind"][NEEDS_NO_CALL][sampling]["tool_calls"])
                    for sampling in SAMPLINGS
                ),
            ]
            for name, s in stages.items()
        ]
        lines += ["## Calls on *given* questions, which need none", "", *_markdown_table(header, rows), ""]
    lines += [
        "## What to see",
        "",
        "Each line is computed from the numbers above; apart means that the intervals do not overlap.",
        "",
    ]
    lines += [f"- **{'holds' if c.holds else 'DOES NOT HOLD'}** — {c.text}. {c.numbers}." for c in claims(report)]
    return "\n".join(lines) + "\n"


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    row = lambda cells: f"| {' | '.join(cells)} |"
    return [row(header), row(["---", *["---:"] * (len(header) - 1)]), *map(row, rows)]


def write(report: Mapping[str, Any], folder: Path) -> None:
    """calibration.json and calibration.md in `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "calibration.md").write_text(markdown(report), encoding="utf-8")


def console_table(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the stages with their main measures, greedy above sampled, in 80 columns, and which claims fail."""
    console = console or Console()
    columns = {
        "correctness": "correctness",
        "efficiency": "efficiency",
        "tool_calls": "tool calls",
        "reasoning_tokens": "tokens",
    }
    table = Table(title="Behaviour on the test questions, mean ± 95 % interval")
    table.add_column("stage", style="bold", no_wrap=True)
    table.add_column("", no_wrap=True)
    for title in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    for name, stage in report["stages"].items():
        for sampling in SAMPLINGS:
            cells = [_plus_minus(measure, stage[sampling][measure]) for measure in columns]
            table.add_row(name if sampling == "greedy" else "", sampling, *cells, end_section=sampling == "sampled")
    console.print(table)
    found = claims(report)
    failed = [claim.text for claim in found if not claim.holds]
    console.print(f"{len(found) - len(failed)} of {len(found)} things to see hold.", highlight=False)
    for text in failed:
        console.print(f"  not: {text}", highlight=False, markup=False)
