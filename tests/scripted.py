"""A policy that writes by a script through the real tokenizer, tools that answer every call alike, an agent of both."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from etagent_jax.policy.interface import Completion, Sampling
from etagent_jax.rollout.agent import Agent, Budget
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.trajectory import Question, ToolResult

SEARCH = "<think>I search</think><search>the capital</search>"
PYTHON = "<think>I compute</think><python>print(1)</python>"
ANSWER = "<think>done</think><answer>\\boxed{Mira}</answer>"
BUDGET = Budget(calls_per_tool=2, calls=3, context=400, seconds=60)
QUESTION = Question("q1", "What is the capital?", ("Mira",), "qa", "one_hop")


class ScriptedPolicy:
    """Writes `script(session, k)` as completion k of a session, up to the first stop string.

    It ends with the end-of-sequence token where the script holds no stop string.
    """

    def __init__(self, tokenizer: Tokenizer, script: Callable[[str, int], str]):
        self.tokenizer, self.script = tokenizer, script
        self.served: list[tuple[tuple[int, ...], Sampling, str]] = []
        self.counts: Counter[str] = Counter()

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, session: str = "") -> Completion:
        self.served.append((tuple(token_ids), sampling, session))
        text = self.script(session, self.counts[session])
        self.counts[session] += 1
        ids: list[int] = []
        finish = "length"
        for token in (*self.tokenizer.encode(text), *self.tokenizer.eos_ids):
            if len(ids) == sampling.max_new_tokens:
                break
            ids.append(token)
            written = self.tokenizer.decode(ids)
            if token in self.tokenizer.eos_ids or any(stop in written for stop in sampling.stop):
                finish = "stop"
                break
        return Completion(tuple(ids), (-0.5,) * len(ids), finish, (len(self.served),) * len(ids))


class FixedTool:
    """Answers every call alike, and counts those that run at the same time."""

    description = "answers every call alike"

    def __init__(self, name: str, output: str = "it is Mira", status: str = "ok", seconds: float = 0):
        self.name, self.output, self.status, self.seconds = name, output, status, seconds
        self.inputs: list[str] = []
        self.running = self.most_running = 0

    async def run(self, text: str) -> ToolResult:
        self.inputs.append(text)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(self.seconds)
        self.running -= 1
        return ToolResult(self.output, self.status)

    async def close(self) -> None: ...


def make_agent(tokenizer, *turns: str, budget: Budget = BUDGET, **tool) -> Agent:
    """An agent whose every session writes `turns`, one each completion, the last one again and again."""
    policy = ScriptedPolicy(tokenizer, lambda _, k: turns[min(k, len(turns) - 1)])
    tools = {name: FixedTool(name, **tool) for name in ("search", "python")}
    return Agent(policy, tokenizer, tools, "Answer with tools.", budget)
