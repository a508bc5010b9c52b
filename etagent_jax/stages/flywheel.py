"""Stage `flywheel`: pools of trajectories grown from the base model's own, and fine-tuning data chosen from them."""

import collections
import contextlib
import itertools
from collections.abc import AsyncIterator, Mapping

from ml_collections import ConfigDict

from etagent_jax import distributed
from etagent_jax.chat import Chat, ChatEndpoint
from etagent_jax.data.store import TrajectoryLog, write_json_atomic
from etagent_jax.flywheel.operators import Context
from etagent_jax.flywheel.rounds import FlywheelConfig, Pool, count_refusals, run_flywheel
from etagent_jax.flywheel.sft_data import select_for_sft
from etagent_jax.scoring.answers import correctness, is_correct
from etagent_jax.scoring.behaviour import pattern
from etagent_jax.stages import setup
from etagent_jax.stages.directory import StageDirectory
from etagent_jax.stages.sampling import own_log, progress, read_all
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
    questions = distributed.my_share(setup.questions(config, "train", c.questions, "flywheel"))
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
        file = directory.trajectories / "flywheel.jsonl"
        finished = read_all(file)
        distributed.barrier()  # nobody appends to what another still reads

        async def grow() -> None:
            with own_log(file) as log, progress(len(questions), "flywheel") as bar:
                growing = run_flywheel(
                    questions, context, flywheel_config(c), seed=config.seed, score=score, is_correct=is_correct,
                    on_trajectory=log.append, finished=finished, concurrency=config.rollout.concurrency,
                )  # fmt: skip
                async with contextlib.aclosing(growing):
                    async for pool in growing:
                        pools[pool.question.id] = pool
                        bar.update()

        await distributed.together(grow())

    in_order = [pools[question.id] for question in questions]
    of_question = [select_for_sft([pool], score, is_correct, pattern, c.per_question) for pool in in_order]
    chosen = list(itertools.chain(*distributed.gather_shares(
        of_question,
        lambda trajectories: [t.to_json() for t in trajectories],
        lambda rows: [Trajectory.from_json(row) for row in rows],
    )))  # fmt: skip
    if not chosen:
        raise ValueError("the flywheel found no trajectory fit for fine-tuning: all are wrong, badly formed, or failed")
    counts = collections.Counter[str]()
    for each in distributed.exchange(tally(in_order, context.unparsed)):
        counts.update(each)
    summary = summarise(counts, chosen)
    if distributed.is_first():
        directory.selected.unlink(missing_ok=True)
        with TrajectoryLog(directory.selected) as out:
            for trajectory in chosen:
                out.append(trajectory)
        write_json_atomic(directory.path / "pools.json", {**summary, "refusals": under(counts, "refused/"),
                                                          "unparsed": under(counts, "unparsed/")})  # fmt: skip
    distributed.say(
        f"flywheel: {summary['trajectories']} trajectories of {c.questions} questions, "
        f"{summary['correct']:.0%} correct (of the first samples {summary['correct_first']:.0%}), "
        f"{len(chosen)} chosen, {summary['timed_out']} questions out of time"
    )
    return summary


def tally(pools: list[Pool], unparsed: Mapping[str, int]) -> collections.Counter[str]:
    """What is to be told of some pools, and of the reviser's replies, as counts that can be added up."""
    counts = collections.Counter[str](timed_out=sum(pool.timed_out for pool in pools))
    for pool in pools:
        for trajectory in pool.trajectories:
            kind = "first" if trajectory.origin is None else trajectory.origin.operator
            counts[f"made/{kind}"] += 1
            counts[f"right/{kind}"] += trajectory.id in pool.correct
    counts.update({f"refused/{operator}: {reason}": n for (operator, reason), n in count_refusals(pools).items()})
    counts.update({f"unparsed/{kind}": n for kind, n in unparsed.items()})
    return counts


def under(counts: collections.Counter[str], prefix: str) -> dict[str, int]:
    """The counts whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): n for name, n in counts.items() if name.startswith(prefix)}


def summarise(counts: collections.Counter[str], chosen: list[Trajectory]) -> dict[str, float]:
    """Counts and shares for the stage's row, and how many trajectories each operator made and got right."""
    made, right = under(counts, "made/"), under(counts, "right/")
    total, first = sum(made.values()), made.pop("first", 0)
    return {
        "trajectories": total, "correct": sum(right.values()) / max(total, 1),
        "correct_first": right.get("first", 0) / max(first, 1),
        "timed_out": counts["timed_out"], "chosen": len(chosen),
        "questions_chosen": len({t.question.id for t in chosen}),
        **{f"made/{operator}": n for operator, n in made.items()},
        **{f"correct/{operator}": right[operator] / n for operator, n in made.items()},
    }  # fmt: skip
