"""Evaluation: the model of every stage on untouched test questions, and the report on them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from etagent_jax.data.store import TrajectoryLog
from etagent_jax.report import calibration, plots
from etagent_jax.rollout.agent import Agent
from etagent_jax.rollout.collector import collect
from etagent_jax.scoring.answers import correctness
from etagent_jax.stages import setup
from etagent_jax.stages.directory import StageDirectory
from etagent_jax.stages.metrics import FILE as METRICS
from etagent_jax.stages.metrics import read_metrics
from etagent_jax.trajectory import Question, Trajectory


def check(config: ConfigDict) -> None:
    """Raise one clear sentence if a stage to be evaluated is not finished."""
    missing = [stage for stage in config.evaluate.stages if not StageDirectory(config, stage).done]
    if missing:
        raise FileNotFoundError(
            f"{config.run}: {', '.join(missing)} not finished; "
            "run python -m etagent_jax.train --config=configs/phase2.py first"
        )


async def run(config: ConfigDict) -> Path:
    """Evaluate, write the report and print its table; returns its folder.  What is done is not done again."""
    check(config)
    directory = StageDirectory(config, "evaluate")
    directory.check()
    directory.open()
    folder = Path(config.run) / "report"
    if not directory.done:
        report = await evaluate(config, directory)
        calibration.write(report, folder)
        plots.plot_calibration(report, folder / "calibration.png")
        calibrated = [stage for stage in config.stages if "reward" in config[stage]]
        steps = {stage: read_metrics(StageDirectory(config, stage).path / METRICS) for stage in calibrated}
        plots.plot_training(steps, folder / "training.png")
        directory.finish({"questions": config.evaluate.questions})
    calibration.console_table(json.loads((folder / "calibration.json").read_text()))
    return folder


async def evaluate(config: ConfigDict, directory: StageDirectory) -> dict[str, Any]:
    """The report's numbers: every stage, greedy and sampled, on the same questions."""
    c = config.evaluate
    questions = setup.questions(config, c.split, c.questions, "evaluate")
    results = {}
    for stage in c.stages:
        trial = Trial(config, stage, directory.trajectories, questions)
        async with setup.rollout_parts(config, StageDirectory(config, stage).model) as parts:
            agent = setup.make_agent(config, parts.policy, parts.tokenizer, parts.tools)
            results[stage] = calibration.StageResult(
                greedy=await trial.sample(agent, "greedy", 1, 0.0, 1.0),
                sampled=await trial.sample(agent, "sampled", c.samples, c.temperature, c.top_p),
            )
    return calibration.calibration(results)


@dataclass
class Trial:
    """One stage's trajectories on the questions, on disk as they finish."""

    config: ConfigDict
    stage: str
    folder: Path
    questions: Sequence[Question]

    async def sample(
        self, agent: Agent, name: str, samples: int, temperature: float, top_p: float
    ) -> list[tuple[Trajectory, float]]:
        """Trajectories with their correctness, in the order of the questions."""
        by_question: dict[str, list[tuple[Trajectory, float]]] = {}
        with TrajectoryLog(self.folder / f"{self.stage}-{name}.jsonl") as log:
            groups = collect(
                agent, self.questions, samples, tag=f"{self.stage}/{name}", seed=self.config.seed,
                temperature=temperature, top_p=top_p, concurrency=self.config.rollout.concurrency,
                finished={trajectory.id: trajectory for trajectory in log.read()}, on_trajectory=log.append,
            )  # fmt: skip
            with tqdm(total=len(self.questions), desc=f"{self.stage} {name}", unit="question", disable=None) as bar:
                async for group in groups:
                    by_question[group.question.id] = [
                        (t, correctness(t.question, t.answer)) for t in group.trajectories
                    ]
                    bar.update()
        return [pair for question in self.questions for pair in by_question[question.id]]
