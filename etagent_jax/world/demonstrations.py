"""Scripted demonstrations: clean ones, and a mix with the flaws that calibration is to remove.

The shares of the mix are measured: the most likely way is wrong or wasteful on every kind of
question, and a right way is common enough for training to find it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from etagent_jax import protocol
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.tools.python import EMPTY_OUTPUT
from etagent_jax.trajectory import Question, Segment, ToolCall, ToolResult, Trajectory
from etagent_jax.world import TOOLS, World
from etagent_jax.world.entities import RELATIONS, Split
from etagent_jax.world.questions import any_question
from etagent_jax.world.solver import (
    COMPUTE_THOUGHT,
    KNOWN_THOUGHT,
    answer,
    call,
    evaluate,
    ideal_step,
    need_thought,
    read_question,
)

GUESS_THOUGHT = "I guess."
CHECK_THOUGHT = "Let me check it again."
HEAD_THOUGHT = "I compute it in my head."
GIVE_UP_THOUGHT = "It did not work. I give up."
PRINT_THOUGHT = "I must print it."
LONG_THOUGHT = (
    "Let me think about this step by step. First I read the question again. Second I ask what I know and "
    "what I need. Third I ask which tool can help me. I can search or I can use python."
)
UNKNOWN = "unknown"
_THINK = protocol.opening(protocol.THINK)
# What the flywheel may write into a trajectory to make the agent think again; each with what it calls for.
HINTS = {
    "Wait, let me reconsider.": "",
    "Wait, let me search again.": protocol.opening("search"),
    "Wait, let me use python.": protocol.opening("python"),
}

LONG_SHARE = 0.58
RAISING_SHARE = 1 / 3  # of code without print: the next call then asks for a name that is gone
FLAWED_SHARES: Mapping[str, Mapping[str, float]] = {
    "given": {"right": 0.30, "search": 0.14, "search and verify": 0.48, "guess": 0.06, "reconsider": 0.02},
    "arithmetic": {"right": 0.07, "print late": 0.12, "verify": 0.15, "give up": 0.54, "guess": 0.10,
                   "reconsider": 0.02},
    "one_hop": {"right": 0.22, "vague query": 0.10, "verify": 0.55, "guess": 0.10, "reconsider": 0.03},
    "two_hops": {"right": 0.07, "verify": 0.17, "stop early": 0.54, "guess": 0.18, "reconsider": 0.04},
    "compute": {"right": 0.07, "verify": 0.17, "in the head": 0.52, "guess": 0.20, "reconsider": 0.04},
}  # fmt: skip
RECONSIDERED = {
    "given": ("guess",),
    "arithmetic": ("give up",),
    "one_hop": ("guess",),
    "two_hops": ("guess", "stop early"),
    "compute": ("guess", "in the head"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """One segment to be: written text, or a tool's result with its call."""

    source: Literal["reviser", "tool"]
    text: str
    call: ToolCall | None = None


@dataclass(frozen=True, slots=True)
class Demonstration:
    """plan: `right`, or the name of its flaw.  long: whether it starts with long thinking."""

    question: Question
    plan: str
    long: bool
    parts: tuple[Part, ...]


def demonstrations(world: World, split: str, count: int, seed: int, flawed: bool) -> Iterator[Demonstration]:
    """`count` demonstrations on random questions of a split, which may repeat.

    Clean ones take the fewest calls and think shortly; flawed ones follow FLAWED_SHARES and LONG_SHARE.
    """
    source = world.split(split)
    rng = np.random.default_rng([seed, flawed, *split.encode()])
    for _ in range(count):
        question = any_question(source, rng)
        plan, long = "right", False
        if flawed:
            shares = FLAWED_SHARES[question.category]
            plan = list(shares)[rng.choice(len(shares), p=list(shares.values()))]
            long = bool(rng.random() < LONG_SHARE)
        turns = _turns(plan, question, world, source, rng)
        if long:
            turns[0] = turns[0].replace(_THINK, f"{_THINK}{LONG_THOUGHT} ", 1)
        yield Demonstration(question, plan, long, tuple(_play(turns, world)))


def respond(world: World, tool: str, text: str) -> ToolResult:
    """What the real tool answers to a call that demonstrations make; ValueError for any other call."""
    if tool == "search" and text in world.found:
        return ToolResult(world.found[text], "ok")
    if tool == "python":
        if text == "print(x)":
            return ToolResult("NameError: name 'x' is not defined", "error")
        if re.fullmatch(r"x = [\d *+-]+", text):
            return ToolResult(EMPTY_OUTPUT, "empty")
        if match := re.fullmatch(r"print\(([\d *+-]+)\)", text):
            return ToolResult(str(evaluate(match[1])), "ok")
    raise ValueError(f"no demonstration makes this {tool} call: {text!r}")


def to_trajectory(demonstration: Demonstration, tokenizer: Tokenizer, system_prompt: str, id: str) -> Trajectory:
    """The demonstration as a rollout would have left it, each part encoded on its own."""
    question = demonstration.question
    segments = (Segment(part.source, tokenizer.encode(part.text), part.text, call=part.call)
                for part in demonstration.parts)  # fmt: skip
    prompt_ids = tokenizer.prompt(system_prompt, question.text)
    return Trajectory(id, question, prompt_ids, tuple(segments), "answer", seed=0, temperature=0.0, tools=TOOLS)


def _play(turns: list[str], world: World) -> Iterator[Part]:
    """The written turns and, after each call, what the tool answers."""
    for turn in turns:
        yield Part("reviser", turn)
        if (ending := protocol.ending_call(turn, TOOLS)) is not None:
            result = respond(world, *ending)
            yield Part("tool", protocol.render_result(result.output), ToolCall(*ending, result))


def _ideal_turns(question: Question, world: World) -> list[str]:
    turns: list[str] = []
    results: list[str] = []
    while True:
        turns.append(ideal_step(question.text, results))
        ending = protocol.ending_call(turns[-1], TOOLS)
        if ending is None:
            return turns
        results.append(respond(world, *ending).output)


def _turns(plan: str, question: Question, world: World, split: Split, rng: np.random.Generator) -> list[str]:
    """What the agent writes when it follows `plan`, cut at its calls."""
    right = _ideal_turns(question, world)
    last_call = protocol.ending_call(right[-2], TOOLS) if len(right) > 1 else ("", "")
    assert last_call is not None
    task = read_question(question.text)
    match plan:
        case "right":
            return right
        case "guess":
            return [answer(GUESS_THOUGHT, _wrong_value(question, split, rng))]
        case "verify":
            return [*right[:-1], call(CHECK_THOUGHT, *last_call), right[-1]]
        case "search" | "search and verify":
            query = question.text.partition(" is ")[0].removeprefix("The ")
            search = call(need_thought(query), "search", query)
            check = [call(CHECK_THOUGHT, "search", query)] if plan == "search and verify" else []
            return [search, *check, answer(KNOWN_THOUGHT, task.given)]
        case "vague query":
            return [call(f"I search for {task.entity}.", "search", task.entity), *right]
        case "stop early":
            return [right[0], answer(KNOWN_THOUGHT, last_call[1].split()[-1])]
        case "in the head":
            return [right[0], answer(HEAD_THOUGHT, _wrong_value(question, split, rng))]
        case "print late" | "give up":
            silent = [call(COMPUTE_THOUGHT, "python", f"x = {task.expression}")]
            if rng.random() < RAISING_SHARE:
                silent.append(call(PRINT_THOUGHT, "python", "print(x)"))
            if plan == "give up":
                return [*silent, answer(GIVE_UP_THOUGHT, UNKNOWN)]
            return [*silent, call(PRINT_THOUGHT, *last_call), right[-1]]
        case "reconsider":
            ways = RECONSIDERED[question.category]
            *kept, wrong = _turns(ways[rng.integers(len(ways))], question, world, split, rng)
            onward = right[len(kept) :]
            if question.category == "arithmetic":
                onward = [call(PRINT_THOUGHT, *last_call), right[-1]]
            hints = [hint for hint, tag in HINTS.items() if tag in onward[0]]
            hint = hints[rng.integers(len(hints))]
            if rng.random() < 0.5:
                hint = f"{wrong[len(_THINK) : wrong.index(protocol.closing(protocol.THINK))]} {hint}"
            return [*kept, onward[0].replace(_THINK, f"{_THINK}{hint} ", 1), *onward[1:]]
    raise AssertionError(f"no plan is called {plan}")


def _wrong_value(question: Question, split: Split, rng: np.random.Generator) -> str:
    """A value like the answer that is not the answer: another's name, or a number of as many digits."""
    value = right = question.answers[0]
    while value == right:
        if right.isdigit():
            value = str(rng.integers(10 ** (len(right) - 1), 10 ** len(right)))
        else:
            relation = next(r for r in RELATIONS if f"What is the {r} of" in question.text)
            value = split.countries[rng.integers(len(split.countries))].fact(relation).value
    return value
