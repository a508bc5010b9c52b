"""Behaviour calibration, for `phase1`, `phase2` and the paper's rounds.

Each round: sample with the current policy, select questions by Pareto front, then steps of
{roll out groups → reward → policy gradient → new weights to the policy}.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from etagent_jax import distributed
from etagent_jax.data import pareto
from etagent_jax.data.packing import Batch, pack, sequence_from_trajectory
from etagent_jax.data.store import write_json_atomic
from etagent_jax.learner.checkpoint import Checkpoints
from etagent_jax.learner.losses import PolicyLossConfig
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.learner.step import Learner, Params, TrainState, check_finite
from etagent_jax.learner.sync import push_weights
from etagent_jax.learner.throughput import throughput
from etagent_jax.model.folder import read_config
from etagent_jax.model.transformer import ModelConfig
from etagent_jax.rollout.agent import Agent
from etagent_jax.scoring.answers import correctness
from etagent_jax.scoring.rewards import RewardConfig, ScoredGroup, decayed_sigma, score_group
from etagent_jax.stages import setup
from etagent_jax.stages.directory import StageDirectory
from etagent_jax.stages.metrics import MetricsLog, Stopwatch, speed
from etagent_jax.stages.sampling import sample_groups, sample_share
from etagent_jax.trajectory import Group, Question


def policy_loss_config(section: ConfigDict) -> PolicyLossConfig:
    return PolicyLossConfig(**section.loss, temperature=section.temperature)


def optimizer_config(section: ConfigDict) -> OptimizerConfig:
    updates = section.rounds * section.steps * section.epochs * section.minibatches
    return OptimizerConfig(**section.optimizer, total_steps=updates)


def reward_config(section: ConfigDict, step: int) -> RewardConfig:
    """The reward at `step` (from 0) of a round; with `decay`, ET-Agent's schedule of both sigmas."""
    scale = decayed_sigma(1.0, step + 1, section.steps) if section.reward.decay else 1.0
    return RewardConfig(section.reward.variant, section.reward.sigma_tool * scale, section.reward.sigma_length * scale)


def check(section: ConfigDict, stage: str, context: int) -> None:
    """Raise one clear sentence for settings of the stage that cannot work."""
    policy_loss_config(section), optimizer_config(section), reward_config(section, 0)
    positive = {name: section[name] for name in ("rounds", "steps", "questions_per_step", "epochs", "minibatches",
                                                 "checkpoint_every")}  # fmt: skip
    positive |= {f"selection.{name}": value for name, value in section.selection.items()}
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"config.{stage}.{name} must be at least 1, got {value}")
    if section.samples < 2:
        raise ValueError(f"config.{stage}.samples must be at least 2, a group to compare, got {section.samples}")
    if section.length < context:
        raise ValueError(f"config.{stage}.length {section.length} must hold a whole context of {context} tokens")


def make_learner(config: ConfigDict, stage: str, model: ModelConfig, mesh: Mesh | None = None) -> Learner:
    """The stage's learner; see `setup.make_learner`."""
    c = config[stage]
    return setup.make_learner(config, stage, model, optimizer_config(c), policy_loss_config(c), mesh)


async def run(config: ConfigDict, directory: StageDirectory, stage: str) -> dict[str, float]:
    """Train from the parent's model for `rounds` × `steps` steps, with a checkpoint after each `checkpoint_every`.

    A run that was stopped resumes at its newest checkpoint.  The steps since then are learned again and not sampled
    again: a step's batch follows from its trajectories, which are on disk, and the seed, so the weights become what
    they were, and what was missing of the last step is sampled with those.  (To the bit where the device computes the
    same sums in the same order; else to rounding, as between any two runs there.)
    """
    c = config[stage]
    steps = c.rounds * c.steps
    parent = setup.parent_model(config, stage)
    learner = make_learner(config, stage, read_config(parent))
    reference = learner.load_params(parent) if c.loss.kl_coefficient else None
    distributed.say(f"{stage}: {learner.summary}")
    checkpoints = Checkpoints(directory.checkpoints)
    done, state, summary = setup.resume(checkpoints, learner, lambda: learner.load_state(parent))
    saved = learned = done

    def save() -> None:
        nonlocal saved
        if learned > saved:
            checkpoints.save(learned, learner.changing(state), summary)
            saved = learned

    async with setup.rollout_parts(config, parent) as parts:
        agent = setup.make_agent(config, parts.policy, parts.tokenizer, parts.tools)
        trial = Trial(config, stage, directory, agent)
        with MetricsLog(directory.path, total_steps=steps, start_step=done, description=stage) as log:
            watch = Stopwatch()
            try:
                for step in range(done, steps):
                    with watch("sync"):
                        await distributed.together(push_weights(learner, state.params, step, parts.policy))
                    if step in (done, step // c.steps * c.steps):
                        with watch("select"):
                            selected = await trial.selected_questions(step // c.steps)
                    with watch("rollout"):
                        groups = await trial.groups_of_step(step, selected)
                    with watch("reward"):
                        scored = score_groups(groups, reward_config(c, step % c.steps))
                    with watch("learn"):
                        order = setup.np_rng(config.seed, stage, "minibatches", step)
                        state, metrics = learn(learner, state, reference, scored, c, order, step)
                    learned = step + 1
                    summary = {**rollout_metrics(scored), **metrics, **watch.pop()}
                    summary["rollout_tokens_per_second"] = summary.pop("rollout_tokens") / summary["seconds/rollout"]
                    log.log(step, summary, line(summary))
                    if learned % c.checkpoint_every == 0 or learned == steps:
                        with watch("checkpoint"):
                            save()
            except asyncio.CancelledError:
                save()
                raise
        setup.save_model(learner, state.params, parts.tokenizer, directory.model)
    checkpoints.close()
    return {"steps": steps, **{k: summary[k] for k in ("reward", "correctness", "calls") if k in summary}}


@dataclass
class Trial:
    """What is sampled for one calibration stage; everything finished is on disk and is not sampled again."""

    config: ConfigDict
    stage: str
    directory: StageDirectory
    agent: Agent

    async def selected_questions(self, round: int) -> list[Question]:
        """The questions of a round, chosen group-wise by Pareto front with the policy as it was at its start."""
        c = self.config[self.stage].selection
        questions = setup.questions(self.config, "train", c.questions, f"{self.stage}/{round}")
        by_id = {question.id: question for question in questions}
        path: Path = self.directory.path / f"selection-{round}.json"
        chosen = distributed.from_first(json.loads(path.read_text()) if path.is_file() else None)
        if chosen is None:
            chosen = await self._select(questions, round)
            if distributed.is_first():
                write_json_atomic(path, chosen)
        return [by_id[id] for id in chosen["questions"]]

    async def _select(self, questions: Sequence[Question], round: int) -> dict[str, Any]:
        """Which of `questions`, by id, and what was seen of all.  The processes share the sampling, and tell one
        another no more than each question's numbers."""
        c = self.config[self.stage].selection
        groups = await sample_share(questions=questions, samples=c.samples, **self._sampling(f"selection-{round}"))
        scores = [np.array([correctness(t.question, t.answer) for t in g.trajectories]) for g in groups]
        s = pareto.question_statistics(groups, scores)
        mine = [s.tool_variance.tolist(), s.correctness_variance.tolist(), s.eligible.tolist(), map(list, scores)]
        rows = distributed.gather_shares(list(zip(*mine, strict=True)))
        tool_variance, correctness_variance, eligible, of_all = (list(column) for column in zip(*rows, strict=True))
        indices = pareto.select(np.array(tool_variance), np.array(correctness_variance), np.array(eligible), c.select)
        if not len(indices):
            raise ValueError(
                f"{self.stage}: of {len(questions)} questions none had both right and wrong rollouts among "
                f"{c.samples}; raise selection.samples or selection.questions, or take other questions"
            )
        return {
            "questions": [questions[i].id for i in indices], "sampled": len(questions), "eligible": sum(eligible),
            "correctness": float(np.mean(np.concatenate(of_all))),
        }  # fmt: skip

    async def groups_of_step(self, step: int, selected: Sequence[Question]) -> list[Group]:
        """The groups of a step: the next questions of a seeded order, starting over when all had their turn."""
        c = self.config[self.stage]
        round, place = divmod(step, c.steps)
        size = min(c.questions_per_step, len(selected))
        start = place * size
        picked = []
        for i in range(start, start + size):
            epoch, at = divmod(i, len(selected))
            order = setup.np_rng(self.config.seed, self.stage, round, epoch).permutation(len(selected))
            picked.append(selected[order[at]])
        unique = list({question.id: question for question in picked}.values())
        return await sample_groups(questions=unique, samples=c.samples, **self._sampling(f"step-{step:05d}"))

    def _sampling(self, name: str) -> dict[str, Any]:
        """What all samplings of the stage have in common, and where those of this name go."""
        return {
            "config": self.config, "agent": self.agent, "file": self.directory.trajectories / f"{name}.jsonl",
            "tag": f"{self.stage}/{name}", "temperature": self.config[self.stage].temperature,
        }  # fmt: skip


def score_groups(groups: Sequence[Group], config: RewardConfig) -> list[ScoredGroup]:
    """Scored by the first process for all: an answer that takes math-verify too long is wrong, and hosts differ in
    speed, but must train on the same rewards."""
    scored = [score_group(group, config) for group in groups] if distributed.is_first() else []
    rows = distributed.from_first([[x.tolist() for x in (s.correctness, s.rewards, s.advantages)] for s in scored])
    return [ScoredGroup(group, *map(np.array, row)) for group, row in zip(groups, rows, strict=True)]


def learn(
    learner: Learner, state: TrainState, reference: Params | None, scored: Sequence[ScoredGroup], c: ConfigDict,
    rng: np.random.Generator, step: int,
) -> tuple[TrainState, dict[str, float]]:  # fmt: skip
    """The updates of one step: `epochs` passes over the groups with spread, in `minibatches` parts."""
    kept = [group for group in scored if group.has_spread]
    metrics: dict[str, float] = {"groups_without_spread": len(scored) - len(kept)}
    if not kept:
        return state, metrics
    order = rng.permutation(len(kept))
    parts = [part for part in np.array_split(order, c.minibatches) if len(part)]
    rows = learner.whole_rows(setup.step_rows(c))
    batches = [pack_groups([kept[i] for i in part], c.length, rows) for part in parts]
    old = [learner.score(state.params, batch)[0] for batch in batches]
    ref = [learner.score(reference, batch)[0] if reference is not None else None for batch in batches]
    jax.block_until_ready((old, ref))
    history: list[dict[str, jax.Array]] = []
    began = time.perf_counter()
    for _ in range(c.epochs):
        for batch, old_logprobs, ref_logprobs in zip(batches, old, ref, strict=True):
            state, device_metrics = learner.policy_step(state, batch, old_logprobs, ref_logprobs)
            history.append(device_metrics)
    updates = jax.device_get(history)
    seconds = time.perf_counter() - began
    for update in updates:
        check_finite(update, step)
        for name, value in update.items():
            metrics[name] = metrics.get(name, 0.0) + float(value) / len(history)
    largest_gap = max(float(update["sampler_gap_max"]) for update in updates)
    metrics |= {"entropy": float(updates[0]["entropy"]), "sampler_gap_max": largest_gap}
    return state, {**metrics, **throughput_of_all(learner, batches, c.epochs, seconds)}


def throughput_of_all(learner: Learner, batches: Sequence[Batch], epochs: int, seconds: float) -> dict[str, float]:
    """As `throughput`, of updates on all `batches`, each `epochs` times, in `seconds` together."""
    each = [throughput(learner, batch, seconds) for batch in batches]
    rates = {name: epochs * sum(one[name] for one in each) for name in each[0] if name != "memory_gib"}
    return {**rates, "memory_gib": max(one["memory_gib"] for one in each)}


def pack_groups(groups: Sequence[ScoredGroup], length: int, rows: int) -> Batch:
    """The trajectories of these groups with their advantages, loss on what the model sampled.

    Always `rows` rows, so that the step is compiled once; the learner skips the empty ones.
    """
    return pack(
        (
            sequence_from_trajectory(trajectory, sources=("model",), advantage=float(advantage))
            for group in groups
            for trajectory, advantage in zip(group.group.trajectories, group.advantages, strict=True)
        ),
        length,
        rows=rows,
    )


def rollout_metrics(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """Means over all rollouts of a step."""
    trajectories = [t for group in scored for t in group.group.trajectories]
    return {
        "reward": float(np.mean(np.concatenate([group.rewards for group in scored]))),
        "correctness": float(np.mean(np.concatenate([group.correctness for group in scored]))),
        "format_valid": float(np.mean([t.format_error is None for t in trajectories])),
        "calls": float(np.mean([len(t.calls) for t in trajectories])),
        "failed_calls": float(np.mean([sum(call.result.failed for call in t.calls) for t in trajectories])),
        "model_tokens": float(np.mean([t.model_tokens for t in trajectories])),
        "rollout_tokens": float(sum(t.model_tokens for t in trajectories)),
    }


def line(m: dict[str, float]) -> str:
    """What a person watches, one line a step."""
    seconds = "  ".join(f"{k.removeprefix('seconds/')} {v:.1f}s" for k, v in m.items() if k.startswith("seconds/"))
    learned = (
        f"entropy {m['entropy']:.2f}  clipped {m['clip_fraction']:.1%}  gap {m['sampler_gap_mean']:.1e}  "
        f"learned {speed(m)}  "
        if "entropy" in m
        else "no group with spread, no update  "
    )
    return (
        f"reward {m['reward']:+.3f}  correct {m['correctness']:.3f}  calls {m['calls']:.2f}  "
        f"length {m['model_tokens']:.0f}  {learned}sampled {m['rollout_tokens_per_second']:,.0f} tokens/s  {seconds}"
    )
