"""Behaviour calibration, for `phase1`, `phase2` and the paper's rounds.

Each round: sample with the current policy, select questions by Pareto front, then steps of
{roll out groups → reward → policy gradient → new weights to the policy}.
"""

import asyncio
import contextlib
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from etagent_jax import distributed
from etagent_jax.learner.checkpoint import Checkpoints
from etagent_jax.learner.losses import PolicyLossConfig
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.learner.parking import park, unpark
from etagent_jax.learner.step import Learner
from etagent_jax.learner.sync import Publication, push_weights, tell_servers
from etagent_jax.model.folder import read_config
from etagent_jax.model.transformer import ModelConfig
from etagent_jax.policy.sglang import SGLangPolicy
from etagent_jax.scoring.rewards import RewardConfig, ScoredGroup, decayed_sigma, score_group
from etagent_jax.stages import setup
from etagent_jax.stages.directory import StageDirectory
from etagent_jax.stages.metrics import MetricsLog, Stopwatch, speed
from etagent_jax.stages.round import Position, Round
from etagent_jax.stages.selection import selected_questions
from etagent_jax.stages.updates import Updates
from etagent_jax.trajectory import Group


def policy_loss_config(section: ConfigDict) -> PolicyLossConfig:
    return PolicyLossConfig(**section.loss, temperature=section.temperature)


def optimizer_config(section: ConfigDict) -> OptimizerConfig:
    updates = section.rounds * section.steps * section.epochs * section.minibatches
    return OptimizerConfig(**section.optimizer, total_steps=updates)


def reward_config(section: ConfigDict, step: int) -> RewardConfig:
    """The reward at `step` (from 0) of a round; with `decay`, ET-Agent's schedule of both sigmas."""
    scale = decayed_sigma(1.0, step + 1, section.steps) if section.reward.decay else 1.0
    return RewardConfig(section.reward.variant, section.reward.sigma_tool * scale, section.reward.sigma_length * scale)


def check(config: ConfigDict, stage: str) -> None:
    """Raise one clear sentence for settings of the stage that cannot work."""
    c, context = config[stage], config.policy.context
    policy_loss_config(c), optimizer_config(c), reward_config(c, 0)
    least = dict.fromkeys(("rounds", "steps", "questions_per_step", "epochs", "minibatches", "checkpoint_every"), 1)
    least |= {f"selection.{name}": 1 for name in c.selection} | {f"stream.{name}": 0 for name in c.stream}
    least |= {"samples": 2, "tool_free": 0, "branching.initial": 0, "branching.window": 1}
    settings = setup.flatten(c.to_dict())
    for name, smallest in least.items():
        if settings[name] < smallest:
            raise ValueError(f"config.{stage}.{name} must be at least {smallest}, got {settings[name]}")
    if not 0 <= c.branching.probability <= 1:
        raise ValueError(f"config.{stage}.branching.probability must be in [0, 1], got {c.branching.probability}")
    if c.tool_free + c.branching.initial > c.samples:
        raise ValueError(f"config.{stage}: tool_free {c.tool_free} and branching.initial {c.branching.initial} are "
                         f"more than the {c.samples} samples of a group")  # fmt: skip
    if c.length < context:
        raise ValueError(f"config.{stage}.length {c.length} must hold a whole context of {context} tokens")
    if config.policy.colocated and c.stream.max_staleness:
        raise ValueError(f"config.{stage}.stream.max_staleness must be 0 with policy.colocated: "
                         "a server that has given its memory to the learner cannot generate")  # fmt: skip


def make_learner(config: ConfigDict, stage: str, model: ModelConfig, mesh: Mesh | None = None) -> Learner:
    """The stage's learner; see `setup.make_learner`."""
    c = config[stage]
    return setup.make_learner(config, stage, model, optimizer_config(c), policy_loss_config(c), mesh)


async def run(config: ConfigDict, directory: StageDirectory, stage: str) -> dict[str, float]:
    """Train from the parent's model for `rounds` × `steps` steps, with a checkpoint after each `checkpoint_every`.

    A run that was stopped resumes at its newest checkpoint.  With max_staleness 0 the steps since then are learned
    again and not sampled again: a step's batch follows from its trajectories, which are on disk, and the seed, so the
    weights become what they were, and what was missing of the last step is sampled with those.  (To the bit where the
    device computes the same sums in the same order; else to rounding, as between any two runs there.)
    """
    c = config[stage]
    steps = c.rounds * c.steps
    parent = setup.parent_model(config, stage)
    learner = make_learner(config, stage, read_config(parent))
    reference = learner.load_params(parent) if c.loss.kl_coefficient else None
    distributed.say(f"{stage}: {learner.summary}")
    checkpoints = Checkpoints(directory.checkpoints)
    done, state, extra = setup.resume(checkpoints, learner, lambda: learner.load_state(parent))
    saved = learned = done
    summary = extra.get("summary", {})
    position = Position.from_json(extra["position"]) if extra.get("position") else None
    update = Updates(learner, reference, c, directory.path / "skipped")
    has_spread = lambda group: score_group(group, reward_config(c, learned % c.steps)).has_spread

    async def save() -> None:
        nonlocal saved
        if learned > saved:
            extra = {"summary": summary, "position": ahead.position() if learned % c.steps else None}
            saving = asyncio.to_thread(checkpoints.save, learned, learner.changing(state), extra)
            await distributed.undisturbed(saving)
            saved = learned

    async with setup.rollout_parts(config, parent) as parts, contextlib.AsyncExitStack() as round_open:
        agent = setup.make_agent(config, parts.policy, parts.tokenizer, parts.tools)
        servers = parts.policy if isinstance(parts.policy, SGLangPolicy) else None
        published = Publication(directory.path / "weights", parts.tokenizer) if servers else None
        colocated = servers if config.policy.colocated else None
        if colocated:
            state = park(state, learner)
        with MetricsLog(directory.path, total_steps=steps, start_step=done, description=stage) as log:
            watch = Stopwatch()
            try:
                for step in range(done, steps):
                    with watch("sync"):
                        push = push_weights(learner, state.params, step, parts.policy, published)
                        await distributed.together(distributed.undisturbed(push))
                    if step in (done, step // c.steps * c.steps):
                        await round_open.aclose()
                        with watch("select"):
                            selected = await selected_questions(config, stage, directory, agent, step // c.steps)
                        ahead = Round(config, stage, directory, agent, selected, step, position, has_spread)
                        position = None
                        await round_open.enter_async_context(ahead)
                    with watch("rollout"):
                        groups, given_up = await ahead.groups(step)
                    with watch("reward"):
                        scored = score_groups(groups, reward_config(c, step % c.steps))
                    with watch("learn"):
                        if colocated:
                            await distributed.undisturbed(tell_servers(colocated.release_memory))
                            state = unpark(state, learner)
                        order = setup.np_rng(config.seed, stage, "minibatches", step)
                        learning = asyncio.to_thread(update, state, scored, order, step)
                        state, metrics = await distributed.undisturbed(learning)
                    learned = step + 1
                    seconds = watch.pop()
                    summary = {**rollout_metrics(scored, step), **given_up, **metrics, **seconds}
                    if servers:
                        summary |= {f"servers/{name}": n for name, n in vars(servers.statistics).items()}
                    sampling = sum(seconds.values()) if c.stream.max_staleness else seconds["seconds/rollout"]
                    summary["rollout_tokens_per_second"] = summary.pop("rollout_tokens") / sampling
                    log.log(step, summary, line(summary))
                    if learned % c.checkpoint_every == 0 or learned == steps:
                        with watch("checkpoint"):
                            await save()
                    if colocated:
                        with watch("sync"):
                            state = park(state, learner)
                            await distributed.undisturbed(tell_servers(colocated.resume_memory))
            except asyncio.CancelledError:
                await save()
                raise
        await round_open.aclose()
        if published:
            published.clear()
        setup.save_model(learner, state.params, parts.tokenizer, directory.model)
    checkpoints.close()
    return {"steps": steps, **{k: summary[k] for k in ("reward", "correctness", "calls") if k in summary}}


def score_groups(groups: Sequence[Group], config: RewardConfig) -> list[ScoredGroup]:
    """Scored by the first process for all: an answer that takes math-verify too long is wrong, and hosts differ in
    speed, but must train on the same rewards."""
    scored = [score_group(group, config) for group in groups] if distributed.is_first() else []
    rows = distributed.from_first([[x.tolist() for x in (s.correctness, s.rewards, s.advantages)] for s in scored])
    return [ScoredGroup(group, *map(np.array, row)) for group, row in zip(groups, rows, strict=True)]


def rollout_metrics(scored: Sequence[ScoredGroup], version: int) -> dict[str, float]:
    """Means over all rollouts of the step that updates weights of `version`; staleness in versions, over tokens."""
    trajectories = [t for group in scored for t in group.group.trajectories]
    versions = [np.array([v for s in t.segments for v in s.weight_versions]) for t in trajectories]
    ages = version - np.concatenate(versions)
    return {
        "reward": float(np.mean(np.concatenate([group.rewards for group in scored]))),
        "correctness": float(np.mean(np.concatenate([group.correctness for group in scored]))),
        "format_valid": float(np.mean([t.format_error is None for t in trajectories])),
        "calls": float(np.mean([len(t.calls) for t in trajectories])),
        "failed_calls": float(np.mean([sum(call.result.failed for call in t.calls) for t in trajectories])),
        "model_tokens": float(np.mean([t.model_tokens for t in trajectories])),
        "rollout_tokens": float(sum(t.model_tokens for t in trajectories)),
        "staleness": float(ages.mean()) if len(ages) else 0.0,
        "staleness_max": float(ages.max(initial=0)),
        "mixed_versions": float(np.mean([len(set(v.tolist())) > 1 for v in versions])),
    }


def line(m: dict[str, float]) -> str:
    """What a person watches, one line a step."""
    seconds = "  ".join(f"{k.removeprefix('seconds/')} {v:.1f}s" for k, v in m.items() if k.startswith("seconds/"))
    learned = (
        f"entropy {m['entropy']:.2f}  clipped {m['clip_fraction']:.1%}  gap {m['sampler_gap_mean']:.1e}  "
        f"learned {speed(m)}  "
        if "entropy" in m
        else "no update  "
    )
    return (
        f"reward {m['reward']:+.3f}  correct {m['correctness']:.3f}  calls {m['calls']:.2f}  "
        f"length {m['model_tokens']:.0f}  {learned}sampled {m['rollout_tokens_per_second']:,.0f} tokens/s  {seconds}"
    )
