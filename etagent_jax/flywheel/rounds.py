"""The flywheel's rounds: each question's pool of trajectories grown by three operators at a time."""

import asyncio
import functools
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from etagent_jax.flywheel.operators import (
    Context,
    Refusal,
    global_refinement,
    re_rollout,
    redundancy_modification,
    self_correction,
    step_hint,
    trajectory_hint,
)
from etagent_jax.rollout.groups import trajectory_seed
from etagent_jax.trajectory import Question, Trajectory

ENHANCE = (re_rollout, redundancy_modification, global_refinement)
REFLECT = (self_correction, step_hint, trajectory_hint)

Score = Callable[[Trajectory], float]
IsCorrect = Callable[[Question, float], bool]
Report = Callable[[Trajectory], None]


@dataclass(frozen=True, slots=True)
class FlywheelConfig:
    """A pool holds at most `initial` + 3 · `rounds` trajectories.

    seconds: wall time for one question, None for no limit; when it is over, the question keeps what it has.
    """

    initial: int = 1
    rounds: int = 3
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.initial < 1 or self.rounds < 0:
            raise ValueError(
                f"the flywheel needs initial ≥ 1 and rounds ≥ 0, got initial={self.initial}, rounds={self.rounds}"
            )


@dataclass(slots=True)
class Pool:
    """One question's trajectories in the order of the plan, their scores by id, and what was refused.

    correct: ids of the correct ones.  timed_out: the question's time was over before its rounds were.
    """

    question: Question
    trajectories: list[Trajectory] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    correct: set[str] = field(default_factory=set)
    refusals: list[Refusal] = field(default_factory=list)
    timed_out: bool = False

    def best_first(self) -> list[Trajectory]:
        """Correct before incorrect, then the higher score, then fewer calls, then the earlier one."""
        return sorted(
            self.trajectories,
            key=lambda t: (t.id not in self.correct, -self.scores[t.id], len(t.calls)),
        )


def count_refusals(pools: Iterable[Pool]) -> Counter[tuple[str, str]]:
    """How often each operator refused for each reason."""
    return Counter((refusal.operator, refusal.reason) for pool in pools for refusal in pool.refusals)


def initial_ids(question: Question, config: FlywheelConfig) -> list[str]:
    return [f"flywheel/{question.id}/r0/sample-{i}" for i in range(config.initial)]


def round_id(question: Question, number: int, operator: str) -> str:
    return f"flywheel/{question.id}/r{number}/{operator}"


async def grow_pool(
    question: Question,
    context: Context,
    config: FlywheelConfig,
    *,
    seed: int,
    score: Score,
    is_correct: IsCorrect,
    on_trajectory: Report,
    finished: Sequence[Trajectory] = (),
) -> Pool:
    """Sample, then in each round take the best trajectory that was not a base before and apply its operators.

    `on_trajectory` is told of every new trajectory at once.  Those in `finished` whose ids are in
    the plan enter the pool as they are and are not made again; what was refused before is tried
    again.  With a deterministic policy and reviser, the same seed gives the same pool.
    """
    known = {t.id: t for t in finished if t.question.id == question.id}
    prompt_ids = context.agent.tokenizer.prompt(context.agent.system_prompt, question.text)
    for trajectory in known.values():
        if trajectory.question != question:
            raise ValueError(f"trajectory {trajectory.id} belongs to another question of the id {question.id}")
        if trajectory.prompt_ids != prompt_ids:
            raise ValueError(
                f"trajectory {trajectory.id} was made with another system prompt or tokenizer: "
                "start the flywheel in a new directory"
            )
    names = [operator.__name__ for operator in (*ENHANCE, *REFLECT)]
    plan = initial_ids(question, config)
    plan += [round_id(question, number, name) for number in range(1, config.rounds + 1) for name in names]
    place = {id: i for i, id in enumerate(plan)}
    pool = Pool(question)

    def add(trajectory: Trajectory) -> None:
        pool.trajectories.append(trajectory)
        pool.trajectories.sort(key=lambda t: place[t.id])
        pool.scores[trajectory.id] = score(trajectory)
        if is_correct(question, pool.scores[trajectory.id]):
            pool.correct.add(trajectory.id)

    async def make(id: str, run: Callable[[str, int], Awaitable[Trajectory | Refusal]]) -> None:
        if id in known:
            add(known[id])
            return
        made = await run(id, trajectory_seed(seed, id))
        if isinstance(made, Refusal):
            pool.refusals.append(made)
        else:
            on_trajectory(made)
            add(made)

    def sample(id: str, seed: int) -> Awaitable[Trajectory]:
        return context.agent.rollout(question, id=id, seed=seed, temperature=context.temperature, top_p=context.top_p)

    async def grow() -> None:
        await _side_by_side(make(id, sample) for id in initial_ids(question, config))
        bases: set[str] = set()
        for number in range(1, config.rounds + 1):
            base = _base(
                pool, bases, [known[id] for name in names if (id := round_id(question, number, name)) in known]
            )
            if base is None:
                return
            bases.add(base.id)
            operators = ENHANCE if base.id in pool.correct else REFLECT
            await _side_by_side(
                make(round_id(question, number, operator.__name__), functools.partial(operator, base, context))
                for operator in operators
            )

    deadline = asyncio.timeout(config.seconds)
    try:
        async with deadline:
            await grow()
    except TimeoutError:
        if not deadline.expired():
            raise
        pool.timed_out = True
    return pool


def _base(pool: Pool, used: set[str], done: Sequence[Trajectory]) -> Trajectory | None:
    """The base of the next round: the parent of what was `done` of it before a restart, else the best unused one."""
    parents = {t.origin.parent for t in done if t.origin is not None}
    unused = [t for t in pool.best_first() if t.id not in used]
    return next((t for t in unused if t.id in parents), next(iter(unused), None))


async def _side_by_side(coroutines: Iterable[Awaitable[None]]) -> None:
    """Run all at once; when one raises, the others are cancelled and the error goes on."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run_flywheel(
    questions: Sequence[Question],
    context: Context,
    config: FlywheelConfig,
    *,
    seed: int,
    score: Score,
    is_correct: IsCorrect,
    on_trajectory: Report,
    finished: Iterable[Trajectory] = (),
    concurrency: int = 64,
) -> AsyncGenerator[Pool, None]:
    """The pools of `questions`, each as soon as it is complete, at most `concurrency` growing at once.

    See `grow_pool`; an error in one question cancels the others and is raised here.  Leaving early:
    `aclose` the generator, which cancels what is growing.
    """
    if concurrency < 1:
        raise ValueError(f"flywheel: concurrency must be at least 1, got {concurrency}")
    if len({question.id for question in questions}) < len(questions):
        raise ValueError("flywheel: two questions have the same id")
    done_before: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in finished:
        done_before[trajectory.question.id].append(trajectory)
    waiting = iter(questions)
    growing: set[asyncio.Task[Pool]] = set()
    try:
        while True:
            while len(growing) < concurrency and (question := next(waiting, None)) is not None:
                growing.add(asyncio.create_task(grow_pool(
                    question, context, config, seed=seed, score=score, is_correct=is_correct,
                    on_trajectory=on_trajectory, finished=done_before[question.id],
                )))  # fmt: skip
            if not growing:
                return
            complete, _ = await asyncio.wait(growing, return_when=asyncio.FIRST_COMPLETED)
            for task in complete:
                growing.remove(task)
                yield task.result()
    finally:
        for task in growing:
            task.cancel()
        await asyncio.gather(*growing, return_exceptions=True)
