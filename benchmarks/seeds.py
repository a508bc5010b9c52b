"""Several finished and evaluated runs side by side, as the Markdown tables of docs/evidence.md.

    for seed in 4 5 6; do
      bash launch/quickstart.sh --config.seed=$seed --config.run=runs/seed$seed
    done
    python -m benchmarks.seeds runs/seed4 runs/seed5 runs/seed6

Reads <run>/report/calibration.json and the stages' DONE files; computes nothing but the claims.
"""

import argparse
import json
from pathlib import Path

from etagent_jax.report.calibration import claims

COLUMNS = ("correctness", "efficiency", "tool_calls", "reasoning_tokens")


def estimate(value: dict, digits: int) -> str:
    low, high = value["ci95"]
    return f"{value['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def measures(run: Path, report: dict) -> list[str]:
    rows = []
    for stage, values in report["stages"].items():
        for mode in ("greedy", "sampled"):
            m = values[mode]
            cells = [estimate(m[name], 1 if name == "reasoning_tokens" else 3) for name in COLUMNS]
            given = estimate(values["given_with_calls"][mode], 2)
            patterns = estimate(values["distinct_correct_patterns"], 2) if mode == "sampled" else ""
            rows.append(f"| {run.name} | {stage} | {mode} | {' | '.join(cells)} | {given} | {patterns} |")
    return rows


def seconds(run: Path, stages: list[str]) -> str:
    spent = [json.loads((run / stage / "DONE").read_text())["summary"] for stage in stages]
    cells = [f"{s['seconds']:.0f} / {s['cpu_seconds']:.0f}" for s in spent]
    total = f"{sum(s['seconds'] for s in spent):.0f} / {sum(s['cpu_seconds'] for s in spent):.0f}"
    return f"| {run.name} | {' | '.join(cells)} | {total} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args().runs
    reports = {run: json.loads((run / "report" / "calibration.json").read_text()) for run in runs}

    print("| run | stage | | correctness | efficiency | tool calls | model tokens | *given* with a call | patterns |")
    print("| --- " * 9 + "|")
    for run, report in reports.items():
        print("\n".join(measures(run, report)))

    print("\n| claim | " + " | ".join(run.name for run in runs) + " |")
    print("| --- " * (len(runs) + 1) + "|")
    checked = {run: claims(report) for run, report in reports.items()}
    for i, claim in enumerate(checked[runs[0]]):
        print(f"| {claim.text} | " + " | ".join("holds" if checked[run][i].holds else "**no**" for run in runs) + " |")

    stages = ["base", "flywheel", "sft", "phase1", "phase2", "evaluate"]
    print("\n| wall s / CPU s | " + " | ".join(stages) + " | all |")
    print("| --- " * (len(stages) + 2) + "|")
    for run in runs:
        print(seconds(run, stages))


if __name__ == "__main__":
    main()
