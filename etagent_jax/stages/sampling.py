"""Rollouts of a stage, shared out among the processes, each trajectory on disk as it finishes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from etagent_jax import distributed
from etagent_jax.data.store import TrajectoryLog
from etagent_jax.rollout.agent import Agent
from etagent_jax.rollout.collector import collect_all
from etagent_jax.trajectory import Group, Question, Trajectory


async def sample_share(
    config: ConfigDict, agent: Agent, questions: Sequence[Question], samples: int, file: Path, *,
    tag: str, temperature: float, top_p: float = 1.0,
) -> list[Group]:  # fmt: skip
    """`samples` trajectories of each question of this process's share (`distributed.my_share`), in their order.

    They are written to `own_log(file)`; those that any process has written there, in a run that was stopped, are
    not sampled again.
    """
    mine = distributed.my_share(questions)
    finished = {t.id: t for t in read_all(file)}
    distributed.barrier()  # nobody appends to what another still reads
    with own_log(file) as log, progress(len(mine), tag) as bar:
        return await distributed.together(
            collect_all(
                agent, mine, samples, tag=tag, seed=config.seed, temperature=temperature, top_p=top_p,
                concurrency=config.rollout.concurrency, finished=finished, on_trajectory=log.append,
                on_group=lambda _: bar.update(),
            )
        )  # fmt: skip


async def sample_groups(
    config: ConfigDict, agent: Agent, questions: Sequence[Question], samples: int, file: Path, *,
    tag: str, temperature: float, top_p: float = 1.0,
) -> list[Group]:  # fmt: skip
    """The groups of all questions, in their order: every process samples its share, then all have all.

    So what is made of them, a batch or a report, is the same on every process, however many there are.
    """
    mine = await sample_share(
        config, agent, questions, samples, file, tag=tag, temperature=temperature, top_p=top_p
    )  # fmt: skip
    share = distributed.my_share(range(len(questions)))
    return gather_groups(list(zip(share, mine, strict=True)), questions.__getitem__)


def gather_groups(mine: Sequence[tuple[int, Group]], question: Callable[[int], Question]) -> list[Group]:
    """The groups of all processes by their indices, on every one; `question` gives that of an index.

    ValueError if the processes do not mean the same question by an index.
    """
    groups = dict(distributed.gather_shares(list(mine), _to_json, _from_json))
    for index, group in groups.items():
        if group.question != question(index):
            raise ValueError(f"question {group.question.id} is not the same on all hosts: "
                             "they must read the same question files")  # fmt: skip
    return [groups[index] for index in sorted(groups)]


def own_log(file: Path) -> TrajectoryLog:
    """Where this process appends: `file`; for process i, if not the first, a file beside it that ends in .i.jsonl."""
    i = jax.process_index()
    return TrajectoryLog(file.with_suffix(f".{i}{file.suffix}") if i else file)


def read_all(file: Path) -> list[Trajectory]:
    """What all processes have written to their logs of this name, those of earlier runs with more processes too."""
    files = [file, *sorted(file.parent.glob(f"{file.stem}.*{file.suffix}"))]
    return [trajectory for file in files for trajectory in TrajectoryLog(file).read()]


def progress(total: int, description: str) -> tqdm:
    """A bar over questions, on the terminal of the first process."""
    return tqdm(
        total=total, desc=description, unit="question", disable=None if distributed.is_first() else True, leave=False
    )


def _to_json(indexed: tuple[int, Group]) -> list[Any]:
    return [indexed[0], [trajectory.to_json() for trajectory in indexed[1].trajectories]]


def _from_json(row: list[Any]) -> tuple[int, Group]:
    trajectories = tuple(map(Trajectory.from_json, row[1]))
    return row[0], Group(trajectories[0].question, trajectories)
