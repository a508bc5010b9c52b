"""Which questions a round of calibration trains on, chosen group-wise by Pareto front."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from etagent_jax import distributed
from etagent_jax.data import pareto
from etagent_jax.data.store import write_json_atomic
from etagent_jax.rollout.agent import Agent
from etagent_jax.scoring.answers import correctness
from etagent_jax.stages import setup
from etagent_jax.stages.directory import StageDirectory
from etagent_jax.stages.sampling import sample_share
from etagent_jax.trajectory import Question


async def selected_questions(
    config: ConfigDict, stage: str, directory: StageDirectory, agent: Agent, round: int
) -> list[Question]:
    """The questions of a round, by the policy as it was at its start; chosen once, then read from disk."""
    questions = setup.questions(config, "train", config[stage].selection.questions, f"{stage}/{round}")
    by_id = {question.id: question for question in questions}
    path: Path = directory.path / f"selection-{round}.json"
    chosen = distributed.from_first(json.loads(path.read_text()) if path.is_file() else None)
    if chosen is None:
        chosen = await _select(config, stage, directory, agent, questions, f"selection-{round}")
        if distributed.is_first():
            write_json_atomic(path, chosen)
    return [by_id[id] for id in chosen["questions"]]


async def _select(
    config: ConfigDict, stage: str, directory: StageDirectory, agent: Agent, questions: Sequence[Question], name: str
) -> dict[str, Any]:
    """Which of `questions`, by id, and what was seen of all.  The processes share the sampling, and tell one another
    no more than each question's numbers."""
    c = config[stage].selection
    groups = await sample_share(
        config, agent, questions, c.samples, directory.trajectories / f"{name}.jsonl", tag=f"{stage}/{name}",
        temperature=config[stage].temperature,
    )  # fmt: skip
    scores = [np.array([correctness(t.question, t.answer) for t in g.trajectories]) for g in groups]
    s = pareto.question_statistics(groups, scores)
    mine = [s.tool_variance.tolist(), s.correctness_variance.tolist(), s.eligible.tolist(), map(list, scores)]
    rows = distributed.gather_shares(list(zip(*mine, strict=True)))
    tool_variance, correctness_variance, eligible, of_all = (list(column) for column in zip(*rows, strict=True))
    indices = pareto.select(np.array(tool_variance), np.array(correctness_variance), np.array(eligible), c.select)
    if not len(indices):
        raise ValueError(
            f"{stage}: of {len(questions)} questions none had both right and wrong rollouts among "
            f"{c.samples}; raise selection.samples or selection.questions, or take other questions"
        )
    return {
        "questions": [questions[i].id for i in indices], "sampled": len(questions), "eligible": sum(eligible),
        "correctness": float(np.mean(np.concatenate(of_all))),
    }  # fmt: skip
