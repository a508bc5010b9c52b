"""Rollouts of a stage: many groups at once, each trajectory on disk as it finishes, with a progress bar."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from etagent_jax.data.store import TrajectoryLog
from etagent_jax.rollout.agent import Agent
from etagent_jax.rollout.collector import collect_all
from etagent_jax.trajectory import Group, Question


async def sample_groups(
    config: ConfigDict, agent: Agent, questions: Sequence[Question], samples: int, file: Path, *,
    tag: str, temperature: float, top_p: float = 1.0,
) -> list[Group]:  # fmt: skip
    """`samples` trajectories of each question, in the order of the questions.

    They are written to `file`; those already there, from a run that was stopped, are not sampled again.
    """
    with (
        TrajectoryLog(file) as log,
        tqdm(total=len(questions), desc=tag, unit="question", disable=None, leave=False) as bar,
    ):
        return await collect_all(
            agent, questions, samples, tag=tag, seed=config.seed, temperature=temperature, top_p=top_p,
            concurrency=config.rollout.concurrency, finished={t.id: t for t in log.read()},
            on_trajectory=log.append, on_group=lambda _: bar.update(),
        )  # fmt: skip
