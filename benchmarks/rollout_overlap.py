"""How long rollouts with slow tools hold up training: in lock-step, agent by agent, and ahead of the updates.

python -m benchmarks.rollout_overlap [--seeds=3 --updates=16 --questions=16 --samples=8 --slots=64 --train 0 20 60]

A server writes so many tokens per second for each of so many sequences at once, others wait their turn; prompts cost
nothing.  A trajectory is a script, drawn from the seed and its id: 3 calls in the mean (binomial of 6), turns of a
median of 150 tokens (log-normal, σ 0.7, 20 to 1,000), tools of a median of 1 s (log-normal, σ 1), some of which take
until the time-out.  The real agent writes these scripts through the real tokenizer; only time is simulated, by an
event loop whose clock jumps to the next timer, so that results are exact and do not depend on the machine.  With the
settings above it takes a minute and a half of CPU time.

- lock-step: all trajectories of a batch write a turn, then all tools run, then the next turn (ET-Agent's code).
- staleness s: each trajectory goes on when its own tool answers; groups come through GroupStream with max_staleness s.
- spare: of n groups more than are needed, those that run when the batch is full are cancelled.

The bound is a server and a loop that keep nothing waiting, for the groups that were used and the weights they began
with.  An update begins when (a) the one before has ended; (b) for each of its groups, since the weights of that group's
oldest token were there, there was time for the longest chain of one trajectory, turns and tools, without queueing;
(c) since any weights were there, there was time for all tokens of groups begun with those or newer, at full capacity.
"""

import argparse
import asyncio
import dataclasses
import functools
import itertools
import selectors
import statistics
import zlib
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np

from etagent_jax.policy.interface import Completion, Sampling
from etagent_jax.rollout.agent import Agent, Budget
from etagent_jax.rollout.groups import Rollouts, plain
from etagent_jax.rollout.stream import GroupStream, Planned, StreamBatch
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.trajectory import Group, Question, ToolResult
from etagent_jax.world import SYSTEM_PROMPT, World
from etagent_jax.world.vocabulary import make_tokenizer


class JumpingClock(selectors.SelectSelector):
    """Does not wait for a timer, but sets its own time to it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if not events:
            if timeout is None:
                raise RuntimeError("nothing is left that could happen: every task waits for another")
            self.now += timeout
        return events


class SimulatedTime(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = JumpingClock()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


def simulate(main: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=SimulatedTime) as runner:
        return runner.run(main)


@dataclasses.dataclass(frozen=True)
class Script:
    """tokens: of each turn.  tools: seconds of the calls between them."""

    tokens: tuple[int, ...]
    tools: tuple[float, ...]


class Server:
    """A policy that writes each trajectory's script at a fixed speed, for `slots` sequences at once."""

    def __init__(self, a: argparse.Namespace, seed: int, tokenizer: Tokenizer):
        self.a, self.seed, self.encode = a, seed, tokenizer.encode
        self.script = functools.cache(self.draw)
        self.version = 0
        self.slots = asyncio.Semaphore(a.slots)
        self.written: Counter[str] = Counter()

    def draw(self, id: str) -> Script:
        rng = np.random.default_rng((self.seed, zlib.crc32(id.encode())))
        calls = int(rng.binomial(6, 0.5))
        tokens = np.clip(rng.lognormal(np.log(150), 0.7, calls + 1), 20, 1000)
        seconds = np.minimum(rng.lognormal(0, 1, calls), self.a.timeout)
        seconds[rng.random(calls) < self.a.timeouts] = self.a.timeout
        return Script(tuple(tokens.astype(int).tolist()), tuple(seconds.tolist()))

    async def write(self, tokens: int) -> int:
        """Returns the version of the weights that began to write."""
        async with self.slots:
            version = self.version
            await asyncio.sleep(tokens / self.a.speed)
        return version

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, session: str = "") -> Completion:
        script, turn = self.script(session), self.written[session]
        self.written[session] += 1
        last = turn == len(script.tools)
        head = self.encode("<think>")
        tail = self.encode("</think><answer>it</answer>" if last else f"</think><search>{session} {turn}</search>")
        ids = head + self.encode(" of ") * (script.tokens[turn] - len(head) - len(tail)) + tail
        version = await self.write(script.tokens[turn])
        return Completion(ids, (-1.0,) * len(ids), "stop", (version,) * len(ids))


class SlowTool:
    name, description = "search", "takes as long as the script says"

    def __init__(self, server: Server):
        self.server = server

    async def run(self, text: str) -> ToolResult:
        id, turn = text.split()
        seconds = self.server.script(id).tools[int(turn)]
        await asyncio.sleep(seconds)
        return ToolResult("found", "timeout" if seconds == self.server.a.timeout else "ok", seconds)

    async def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """seconds: of all updates.  bound: what they would take with nothing kept waiting.  given_up: groups, as a share of
    those used."""

    seconds: float
    bound: float
    given_up: float


def planned(a: argparse.Namespace, index: int) -> Planned:
    ids = tuple(f"{index}/{i}" for i in range(a.samples))
    return Planned(index, Question(f"q{index}", "What is it?", ("it",), "qa", "simulated"), ids)


async def lock_step(a: argparse.Namespace, server: Server, train: float) -> float:
    for update in range(a.updates):
        groups = range(update * a.questions, (update + 1) * a.questions)
        live = [server.script(id) for index in groups for id in planned(a, index).ids]
        for turn in itertools.count():
            await asyncio.gather(*(server.write(script.tokens[turn]) for script in live))
            live = [script for script in live if turn < len(script.tools)]
            if not live:
                break
            await asyncio.gather(*(asyncio.sleep(script.tools[turn]) for script in live))
        await asyncio.sleep(train)
    return asyncio.get_running_loop().time()


async def streamed(
    a: argparse.Namespace, server: Server, tokenizer: Tokenizer, train: float, max_staleness: int, spare: int
) -> Outcome:
    agent = Agent(server, tokenizer, {"search": SlowTool(server)}, SYSTEM_PROMPT, Budget(6, 6, 10**6, 1e9))
    rollouts = Rollouts(0, 1.0, 1.0, asyncio.Semaphore(10**6), {}, lambda _: None)

    async def roll(group: Planned) -> Group:
        return await plain(agent, group.question, ids=group.ids, rollouts=rollouts)

    stream = GroupStream(
        roll, (planned(a, i) for i in itertools.count()), batch=a.questions, version=0, last=a.updates - 1,
        max_staleness=max_staleness, spare=spare,
    )  # fmt: skip
    batches = []
    for update in range(a.updates):
        batches.append(await stream.next_batch(update))
        await asyncio.sleep(train)
        server.version = update + 1
    seconds = asyncio.get_running_loop().time()
    await stream.close()
    given_up, used = sum(b.stale + b.aborted for b in batches), sum(len(b.groups) for b in batches)
    return Outcome(seconds, bound(a, server, train, batches), given_up / used)


def bound(a: argparse.Namespace, server: Server, train: float, batches: Sequence[StreamBatch]) -> float:
    """Seconds of all updates if nothing was kept waiting (see the top of this file)."""
    there = [0.0]  # when the weights of each version are
    work = np.zeros(len(batches))  # seconds of the whole server, by the version that the group began with
    for update, batch in enumerate(batches):
        begin = there[update]
        for group, staleness in zip(batch.groups, batch.staleness, strict=True):
            scripts = [server.script(trajectory.id) for trajectory in group.trajectories]
            longest = max(sum(script.tokens) / a.speed + sum(script.tools) for script in scripts)
            begin = max(begin, there[update - staleness] + longest)
            work[update - staleness] += sum(sum(script.tokens) for script in scripts) / a.speed / a.slots
        begin = max(begin, *(there[v] + work[v:].sum() for v in range(update + 1)))
        there.append(begin + train)
    return there[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--seeds", type=int, default=3, help="how many; the table has medians, and the range")
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--questions", type=int, default=16, help="groups an update")
    parser.add_argument("--samples", type=int, default=8, help="trajectories a group")
    parser.add_argument("--slots", type=int, default=64, help="sequences that the server writes at once")
    parser.add_argument("--speed", type=float, default=50, help="tokens a second of each sequence")
    parser.add_argument("--timeout", type=float, default=30, help="seconds after which a tool gives up")
    parser.add_argument("--timeouts", type=float, default=0.02, help="share of calls that take so long")
    parser.add_argument("--train", type=float, nargs="+", default=[0, 20, 60], help="the learner's seconds an update")
    a = parser.parse_args()
    tokenizer = Tokenizer(make_tokenizer(World.make(0)))
    seeds = range(a.seed, a.seed + a.seeds)

    print("| learner | rollouts | seconds | × lock-step | of the bound | groups given up |")
    print("| --- " * 6 + "|")
    modes = {"staleness 0": (0, 0), f"staleness 0, {a.questions // 4} spare": (0, a.questions // 4),
             "staleness 1": (1, 0), "staleness 2": (2, 0)}  # fmt: skip
    for train in a.train:
        locked = [simulate(lock_step(a, Server(a, seed, tokenizer), train)) for seed in seeds]
        print(f"| {train:g} s | lock-step | {spread(locked, '.0f')} | 1 | | |")
        for name, (max_staleness, spare) in modes.items():
            of = [
                simulate(streamed(a, Server(a, seed, tokenizer), tokenizer, train, max_staleness, spare))
                for seed in seeds
            ]
            faster = [slow / outcome.seconds for slow, outcome in zip(locked, of, strict=True)]
            print(
                f"| {train:g} s | {name} | {spread([o.seconds for o in of], '.0f')} | {spread(faster, '.2f')} | "
                f"{spread([o.bound / o.seconds for o in of], '.1%')} | {spread([o.given_up for o in of], '.1%')} |"
            )  # fmt: skip


def spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
