"""What the rollout loop itself costs: turns per second of one core, against a policy and a tool that answer at once.

python -m benchmarks.rollout_loop [--questions=32 --samples=8 --turns=4 --tokens=100 --concurrency=128]

Through collector, agent and the tiny tokenizer; `in-process` with a policy that returns what was prepared, `over HTTP`
with the client of policy/sglang.py and a stub of a server in a process of its own, whose time does not count.  A turn
is a completion of so many tokens and, but for the last, a call.  A core's second is one of this process's CPU time.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from etagent_jax.policy.interface import Completion, Policy, Sampling
from etagent_jax.policy.sglang import SESSION_HEADER, SGLangPolicy
from etagent_jax.rollout.agent import Agent, Budget
from etagent_jax.rollout.collector import collect_all
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.trajectory import Question, ToolResult
from etagent_jax.world import SYSTEM_PROMPT, World
from etagent_jax.world.vocabulary import make_tokenizer

CALL, ANSWER = "</think><search>the capital of Mira</search>", "</think><answer>\\boxed{Mira}</answer>"


class PreparedPolicy:
    """Answers with `turns`, one after another."""

    def __init__(self, turns: Sequence[Sequence[int]]):
        self.completions = [Completion(tuple(ids), (-1.0,) * len(ids), "stop", (0,) * len(ids)) for ids in turns]
        self.written: Counter[str] = Counter()

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, session: str = "") -> Completion:
        self.written[session] += 1
        return self.completions[self.written[session] - 1]


class InstantTool:
    name, description = "search", "answers at once"

    async def run(self, text: str) -> ToolResult:
        return ToolResult("Mira is the capital of the country Tolo. " * 4, "ok")

    async def close(self) -> None: ...


def serve(turns: Sequence[Sequence[int]], connection: Connection) -> None:
    """Answer `/generate` as SGLang does, with `turns`, one after another; tell `connection` the port."""
    written: Counter[str] = Counter()
    answers = [
        json.dumps({
            "text": "", "output_ids": ids, "meta_info": {
                "id": "0", "finish_reason": {"type": "stop", "matched": None}, "prompt_tokens": 1,
                "completion_tokens": len(ids), "cached_tokens": 0, "weight_version": "default",
                "output_token_logprobs": [[-1.2345678, id, None] for id in ids],
            },
        })
        for ids in turns
    ]  # fmt: skip

    async def generate(request: Request) -> Response:
        session = request.headers[SESSION_HEADER]
        written[session] += 1
        return Response(answers[written[session] - 1], media_type="application/json")

    listening = socket.create_server(("127.0.0.1", 0))
    connection.send(listening.getsockname()[1])
    app = Starlette(routes=[Route("/generate", generate, methods=["POST"])])
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


@contextlib.contextmanager
def stub_server(turns: Sequence[Sequence[int]]) -> Iterator[str]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(turns, theirs))
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


def prepared_turns(tokenizer: Tokenizer, a: argparse.Namespace) -> list[list[int]]:
    head, filler = tokenizer.encode("<think>"), tokenizer.encode(" of ")
    tails = [tokenizer.encode(CALL)] * (a.turns - 1) + [tokenizer.encode(ANSWER)]
    return [[*head, *filler * (a.tokens - len(head) - len(tail)), *tail] for tail in tails]


async def turns_per_second(a: argparse.Namespace, policy: Policy, tokenizer: Tokenizer) -> list[float]:
    """Of one core, for each repetition."""
    agent = Agent(policy, tokenizer, {"search": InstantTool()}, SYSTEM_PROMPT, Budget(99, 99, 10**6, 600.0))
    questions = [Question(f"q{i}", f"What is the capital {i}?", ("Mira",), "qa", "loop") for i in range(a.questions)]
    rates = []
    for repetition in range(-1, a.repetitions):
        start = time.process_time()
        groups = await collect_all(
            agent, questions, a.samples, tag=str(repetition), seed=0, temperature=1.0, concurrency=a.concurrency,
            on_trajectory=lambda _: None,
        )  # fmt: skip
        seconds = time.process_time() - start
        turns = sum(len(trajectory.turns) for group in groups for trajectory in group.trajectories)
        assert turns == a.questions * a.samples * a.turns
        rates.append(turns / seconds)
    return rates[1:]


async def main_async(a: argparse.Namespace) -> None:
    tokenizer = Tokenizer(make_tokenizer(World.make(0)))
    turns = prepared_turns(tokenizer, a)
    print("| policy | turns/s of a core |\n| --- | --- |")
    report("in-process", await turns_per_second(a, PreparedPolicy(turns), tokenizer))
    with stub_server(turns) as url:
        async with SGLangPolicy(url, concurrency=a.concurrency) as policy:
            report("over HTTP", await turns_per_second(a, policy, tokenizer))


def report(name: str, rates: Sequence[float]) -> None:
    print(f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4, help="of a trajectory")
    parser.add_argument("--tokens", type=int, default=100, help="of a turn")
    parser.add_argument("--concurrency", type=int, default=128, help="rollouts, and requests, at once")
    parser.add_argument("--repetitions", type=int, default=5, help="the table has the median, and the range")
    asyncio.run(main_async(parser.parse_args()))


if __name__ == "__main__":
    main()
