"""Evaluation: the model of every stage on untouched test questions, and the report on them."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from etagent_jax import distributed
from etagent_jax.report import calibration, plots
from etagent_jax.scoring.answers import correctness
from etagent_jax.stages import setup
from etagent_jax.stages.directory import StageDirectory
from etagent_jax.stages.metrics import FILE as METRICS
from etagent_jax.stages.metrics import read_metrics
from etagent_jax.stages.sampling import sample_groups
from etagent_jax.trajectory import Group, Trajectory


def check(config: ConfigDict) -> None:
    """Raise one clear sentence if a stage to be evaluated is not finished."""
    setup.check_shared(config)
    missing = [stage for stage in config.evaluate.stages if not StageDirectory(config, stage).done]
    if missing:
        raise FileNotFoundError(
            f"{config.run}: {', '.join(missing)} not finished; "
            "train it first: python -m etagent_jax.train with the same --config.run and preset"
        )


async def run(config: ConfigDict) -> Path:
    """Evaluate, write the report and print its table; returns its folder.  What is done is not done again."""
    setup.check_processes(config)
    check(config)
    directory = StageDirectory(config, "evaluate")
    directory.check()
    folder = Path(config.run) / "report"
    if not distributed.from_first(directory.done):
        with directory.opened():
            began, cpu_began = time.perf_counter(), time.process_time()
            report = await evaluate(config, directory)
            if distributed.is_first():
                write_report(config, report, folder)
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
            directory.finish({"seconds": seconds, "cpu_seconds": cpu_seconds})
    if distributed.is_first():
        calibration.console_table(json.loads((folder / "calibration.json").read_text()))
    return folder


def write_report(config: ConfigDict, report: dict[str, Any], folder: Path) -> None:
    calibration.write(report, folder)
    plots.plot_calibration(report, folder / "calibration.png")
    calibrated = [stage for stage in config.evaluate.stages if "reward" in config[stage]]
    if calibrated:
        steps = {stage: read_metrics(StageDirectory(config, stage).path / METRICS) for stage in calibrated}
        plots.plot_training(steps, folder / "training.png")


async def evaluate(config: ConfigDict, directory: StageDirectory) -> dict[str, Any]:
    """The report's numbers: every stage, greedy and sampled, on the same questions."""
    c = config.evaluate
    questions = setup.questions(config, c.split, c.questions, "evaluate")
    results = {}
    for stage in c.stages:
        async with setup.rollout_parts(config, StageDirectory(config, stage).model) as parts:
            agent = setup.make_agent(config, parts.policy, parts.tokenizer, parts.tools)
            greedy, sampled = [
                await sample_groups(
                    config, agent, questions, samples, directory.trajectories / f"{stage}-{name}.jsonl",
                    tag=f"{stage}/{name}", temperature=temperature, top_p=top_p,
                )
                for name, samples, temperature, top_p in (
                    ("greedy", 1, 0.0, 1.0),
                    ("sampled", c.samples, c.temperature, c.top_p),
                )
            ]  # fmt: skip
        results[stage] = calibration.StageResult(scored(greedy), scored(sampled))
    return calibration.calibration(results)


def scored(groups: Sequence[Group]) -> list[tuple[Trajectory, float]]:
    return [(t, correctness(t.question, t.answer)) for group in groups for t in group.trajectories]
