"""Stand-ins for what the tests of the flywheel do not test: a policy that writes by a rule, tools that count calls."""

import re
from collections.abc import Callable, Mapping, Sequence

from etagent_jax.policy.interface import Completion, Sampling
from etagent_jax.rollout.agent import Agent, Budget
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.trajectory import Origin, Question, Segment, ToolCall, ToolResult, Trajectory
from etagent_jax.world import SYSTEM_PROMPT, TOOLS, World
from etagent_jax.world.demonstrations import respond
from etagent_jax.world.solver import ideal_step

VERSION = 7
LOGPROB = -0.25

Writer = Callable[[str, str, Sequence[str], str], str]
"""(session, question, results so far, text of the turn so far) → what is written next"""


def ideal_writer(session: str, question: str, results: Sequence[str], turn: str) -> str:
    """What the world's solver would write; in a think that is open already, without opening it."""
    step = ideal_step(question, results)
    return f" {step.removeprefix('<think>')}" if turn.rfind("<think>") > turn.rfind("</think>") else step


class WritingPolicy:
    """Not a language model: writes what `write` says, through the real tokenizer; keeps every prompt it was served."""

    def __init__(self, tokenizer: Tokenizer, write: Writer = ideal_writer):
        self.tokenizer, self.write = tokenizer, write
        self.served: list[tuple[str, tuple[int, ...]]] = []

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, session: str = "") -> Completion:
        self.served.append((session, tuple(token_ids)))
        _, _, chat = self.tokenizer.decode(token_ids).partition("<|im_start|>user\n")
        question, _, said = chat.partition("<|im_end|>\n<|im_start|>assistant\n")
        results = re.findall(r"<result>(.*?)</result>", said, flags=re.DOTALL)
        text = self.write(session, question, results, said.rpartition("</result>")[2])
        written = self.tokenizer.encode(text)[: sampling.max_new_tokens]
        finish = "stop" if text.endswith(sampling.stop) else "length"
        return Completion(written, (LOGPROB,) * len(written), finish, (VERSION,) * len(written))


class CountingTool:
    """Answers as the world's real tool does in demonstrations; keeps what it was asked."""

    description = "a stand-in"

    def __init__(self, name: str, world: World):
        self.name, self.world = name, world
        self.asked: list[str] = []

    async def run(self, text: str) -> ToolResult:
        self.asked.append(text)
        return respond(self.world, self.name, text)

    async def close(self) -> None:
        pass


def make_agent(tokenizer: Tokenizer, world: World, write: Writer = ideal_writer, calls: int = 10) -> Agent:
    tools = {name: CountingTool(name, world) for name in TOOLS}
    return Agent(WritingPolicy(tokenizer, write), tokenizer, tools, SYSTEM_PROMPT, Budget(calls, calls, 1024, 30.0))


def asked(agent: Agent) -> list[str]:
    """All calls that reached the agent's tools."""
    return [text for tool in agent.tools.values() for text in tool.asked]  # type: ignore[attr-defined]


def make_trajectory(
    tokenizer: Tokenizer, question: Question, parts: Sequence[str | tuple[str, str, str]], *, id: str = "base",
    finish: str = "answer", sources: Mapping[int, str] = {}, origin: Origin | None = None, status: str = "ok",
) -> Trajectory:  # fmt: skip
    """Texts become model segments (or of `sources[i]`), (tool, input, output) a tool segment."""
    segments = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            ids, source = tokenizer.encode(part), sources.get(i, "model")
            n = len(ids) if source == "model" else 0
            segments.append(Segment(source, ids, part, (LOGPROB,) * n, (VERSION,) * n))
        else:
            tool, text, output = part
            shown = f"<result>{output}</result>"
            call = ToolCall(tool, text, ToolResult(output, status))
            segments.append(Segment("tool", tokenizer.encode(shown), shown, call=call))
    prompt_ids = tokenizer.prompt(SYSTEM_PROMPT, question.text)
    return Trajectory(id, question, prompt_ids, tuple(segments), finish, 0, 1.0, TOOLS, origin=origin)
