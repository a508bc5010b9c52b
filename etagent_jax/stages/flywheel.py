"""Stage `flywheel`: pools of trajectories grown from the base model's own, and fine-tuning data chosen from them."""

import collections

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

SELECTED = "selected.jsonl"


def score(trajectory: Trajectory) -> float:
    return correctness(trajectory.question, trajectory.answer)


def make_reviser(config: ConfigDict) -> Chat:
    """The reviser's endpoint; without a URL, the rule-based stand-in of the built-in world."""
    settings = config.reviser
    if not settings.url:
        return RuleBasedReviser()
    return ChatEndpoint(
        settings.url, settings.model, temperature=settings.temperature, max_tokens=settings.max_tokens,
        concurrency=settings.concurrency,
    )  # fmt: skip


def flywheel_config(config: ConfigDict) -> FlywheelConfig:
    c = config.flywheel
    return FlywheelConfig(initial=c.initial, rounds=c.rounds, seconds=c.seconds)


async def run(config: ConfigDict, directory: StageDirectory) -> dict[str, float]:
    c = config.flywheel
    questions = setup.questions(config, "train", c.questions, "flywheel")
    log = TrajectoryLog(directory.trajectories / "flywheel.jsonl")
    finished = list(log.read())
    pools: dict[str, Pool] = {}
    async with setup.rollout_parts(config, setup.parent_model(config, "flywheel")) as parts:
        context = Context(
            agent=setup.make_agent(config, parts.policy, parts.tokenizer, parts.tools),
            continuer=setup.make_agent(config, parts.policy, parts.tokenizer, parts.tools, c.extra_calls),
            reviser=make_reviser(config),
            hints=tuple(HINTS) if config.questions.source == "world" else setup.HINTS,
            temperature=c.temperature,
        )
        growing = run_flywheel(
            questions, context, flywheel_config(config), seed=config.seed, score=score, is_correct=is_correct,
            on_trajectory=log.append, finished=finished, concurrency=config.rollout.concurrency,
        )  # fmt: skip
        with tqdm(total=len(questions), desc="flywheel", unit="question", disable=None) as bar:
            async for pool in growing:
                pools[pool.question.id] = pool
                bar.update()
                bar.set_postfix(trajectories=sum(len(p.trajectories) for p in pools.values()), refresh=False)
    log.close()

    in_order = [pools[question.id] for question in questions]
    chosen = select_for_sft(in_order, score, is_correct, pattern, c.per_question)
    if not chosen:
        raise ValueError("the flywheel found no trajectory fit for fine-tuning: all are wrong, badly formed, or failed")
    selected = directory.path / SELECTED
    selected.unlink(missing_ok=True)
    with TrajectoryLog(selected) as out:
        for trajectory in chosen:
            out.append(trajectory)
    summary = summarise(in_order, chosen)
    refusals = {f"{operator}: {reason}": n for (operator, reason), n in count_refusals(in_order).items()}
    write_json_atomic(
        directory.path / "pools.json", {**summary, "refusals": refusals, "unparsed": dict(context.unparsed)}
    )
    print(
        f"flywheel: {summary['trajectories']} trajectories of {len(questions)} questions, "
        f"{summary['correct']:.0%} correct (of the first samples {summary['correct_first']:.0%}), {len(chosen)} chosen"
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
        "chosen": len(chosen), "questions_chosen": len({t.question.id for t in chosen}),
        **{f"made/{operator}": n for operator, n in made.items()},
        **{f"correct/{operator}": right[operator] / n for operator, n in made.items()},
    }  # fmt: skip
