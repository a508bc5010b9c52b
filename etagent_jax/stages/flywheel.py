"""Stage `flywheel`: pools of trajectories grown from the base model's own, and fine-tuning data chosen from them."""

import collections
import contextlib
from collections.abc import AsyncIterator

from ml_collections import ConfigDict
from tqdm import tqdm

from etagent_jax.chat import Chat, ChatEndpoint
from etagent_jax.data.store import TrajectoryLog, write_json_atomic
from etagent_jax.flywheel.operators import Context
from etagent_jax.flywheel.rounds import FlywheelConfig, Pool, count_refusals, run_flywheel
from etagent_jax.flywheel.sft_data import select_for_sft
from etagent_jax.scoring.answers import correctness, is_correct
from etagent_jax.scoring.behaviour import pattern
from etagent_jax.stages import setup
from etagent_jax.stages.directory import StageDirectory
from etagent_jax.trajectory import Trajectory
from etagent_jax.world.demonstrations import HINTS
from etagent_jax.world.reviser import RuleBasedReviser


def score(trajectory: Trajectory) -> float:
    return correctness(trajectory.question, trajectory.answer)


@contextlib.asynccontextmanager
async def reviser_of(config: ConfigDict) -> AsyncIterator[Chat]:
    """The reviser's endpoint, closed at the end; without a URL, the rule-based stand-in of the built-in world."""
    settings = config.reviser
    if not settings.url:
        yield RuleBasedReviser()
        return
    endpoint = ChatEndpoint(
        settings.url, settings.model, temperature=settings.temperature, max_tokens=settings.max_tokens,
        concurrency=settings.concurrency,
    )  # fmt: skip
    try:
        await endpoint.complete([{"role": "user", "content": "Answer with the word ready."}])
        yield endpoint
    finally:
        await endpoint.close()


def flywheel_config(section: ConfigDict) -> FlywheelConfig:
    return FlywheelConfig(initial=section.initial, rounds=section.rounds, seconds=section.seconds)


def check(section: ConfigDict) -> None:
    """Raise one clear sentence for settings of the stage that cannot work."""
    flywheel_config(section)
    for name in ("questions", "per_question"):
        if section[name] < 1:
            raise ValueError(f"config.flywheel.{name} must be at least 1, got {section[name]}")


async def run(config: ConfigDict, directory: StageDirectory) -> dict[str, float]:
    c = config.flywheel
    questions = setup.questions(config, "train", c.questions, "flywheel")
    pools: dict[str, Pool] = {}
    async with (
        setup.rollout_parts(config, setup.parent_model(config, "flywheel")) as parts,
        reviser_of(config) as reviser,
    ):
        context = Context(
            agent=setup.make_agent(config, parts.policy, parts.tokenizer, parts.tools),
            continuer=setup.make_agent(config, parts.policy, parts.tokenizer, parts.tools, c.extra_calls),
            reviser=reviser,
            hints=tuple(HINTS) if config.questions.source == "world" else setup.HINTS,
            temperature=c.temperature,
        )
        with (
            TrajectoryLog(directory.trajectories / "flywheel.jsonl") as log,
            tqdm(total=len(questions), desc="flywheel", unit="question", disable=None, leave=False) as bar,
        ):
            growing = run_flywheel(
                questions, context, flywheel_config(c), seed=config.seed, score=score, is_correct=is_correct,
                on_trajectory=log.append, finished=list(log.read()), concurrency=config.rollout.concurrency,
            )  # fmt: skip
            async with contextlib.aclosing(growing):
                async for pool in growing:
                    pools[pool.question.id] = pool
                    bar.update()

    in_order = [pools[question.id] for question in questions]
    chosen = select_for_sft(in_order, score, is_correct, pattern, c.per_question)
    if not chosen:
        raise ValueError("the flywheel found no trajectory fit for fine-tuning: all are wrong, badly formed, or failed")
    directory.selected.unlink(missing_ok=True)
    with TrajectoryLog(directory.selected) as out:
        for trajectory in chosen:
            out.append(trajectory)
    summary = summarise(in_order, chosen)
    refusals = {f"{operator}: {reason}": n for (operator, reason), n in count_refusals(in_order).items()}
    write_json_atomic(
        directory.path / "pools.json", {**summary, "refusals": refusals, "unparsed": dict(context.unparsed)}
    )
    print(
        f"flywheel: {summary['trajectories']} trajectories of {len(questions)} questions, "
        f"{summary['correct']:.0%} correct (of the first samples {summary['correct_first']:.0%}), "
        f"{len(chosen)} chosen, {summary['timed_out']} questions out of time"
    )
    return summary


def summarise(pools: list[Pool], chosen: list[Trajectory]) -> dict[str, float]:
    """Counts and shares for the stage's row, and how many trajectories each operator made and got right."""
    everything = [(pool, t) for pool in pools for t in pool.trajectories]
    first = [(pool, t) for pool, t in everything if t.origin is None]
    share = lambda some: sum(t.id in pool.correct for pool, t in some) / max(len(some), 1)
    made = collections.Counter(t.origin.operator for _, t in everything if t.origin)
    right = collections.Counter(t.origin.operator for pool, t in everything if t.origin and t.id in pool.correct)
    return {
        "trajectories": len(everything), "correct": share(everything), "correct_first": share(first),
        "timed_out": sum(pool.timed_out for pool in pools), "chosen": len(chosen),
        "questions_chosen": len({t.question.id for t in chosen}),
        **{f"made/{operator}": n for operator, n in made.items()},
        **{f"correct/{operator}": right[operator] / n for operator, n in made.items()},
    }  # fmt: skip
