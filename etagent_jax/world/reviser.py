"""A rule-based stand-in for the flywheel's reviser, for the questions of the built-in world."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from etagent_jax import protocol
from etagent_jax.chat import Message
from etagent_jax.world import TOOLS
from etagent_jax.world.solver import ideal_step

_THINK_BLOCK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_RESULT_BLOCK = re.compile(r"<result>(.*)</result>\s*$", re.DOTALL)
_NO_STEP = "Step: no"


@dataclass(frozen=True, slots=True)
class _Step:
    """A step as it was shown.  result: None in the last one.  ideal: what the solver would have written instead."""

    written: str
    result: str | None
    ideal: str
    useful: bool


class RuleBasedReviser:
    """Answers the flywheel's requests as an LLM would, by rules: it *stands in* for one and is none.

    It reads the request's text only: which task its heading sets, the question, the numbered
    steps.  Its judgement is the world's solver, which knows no answers, only the templates of the
    questions and what the results shown say.  A call is useful if its result changes what the solver
    would do next; the first one that is not (a repetition, a verification, a call on a question that
    states its answer, code that prints nothing) is redundant.  The first step that is neither a
    useful call nor the solver's answer is flawed.  What it does not understand it declines in a sentence.
    """

    async def complete(self, messages: Sequence[Message]) -> str:
        """The reply to a request made by `flywheel.prompts.messages`."""
        if len(messages) < 2:
            return "I need a task and a trajectory to look at."
        task = messages[0]["content"].partition("\n")[0].lower()
        try:
            steps = _read_steps(messages[1]["content"])
        except ValueError as error:
            return f"I only know the questions of the built-in world: {error}."
        if "redundant" in task:
            return _revision(steps, "This call brings nothing new.", [s.result is not None for s in steps])
        if "flawed" in task and "correct" in task:
            return _revision(steps, "This is not what is needed next.", [True] * len(steps))
        if "flawed" in task:
            number = _first_useless(steps, [True] * len(steps))
            return f"Step: {number}\nAnalysis: This is not what is needed next." if number else _NO_STEP
        if "rewrite the thinking" in task:
            thoughts = itertools.chain.from_iterable(map(_short_thoughts, steps))
            return "\n".join(f"Think {number}: {thought}" for number, thought in enumerate(thoughts, start=1))
        return "I do not know this task."


def _read_steps(shown: str) -> list[_Step]:
    """The steps shown, judged one after the other; ValueError if the question is not of this world."""
    head, *texts = re.split(r"\n\n### Step \d+\n", shown)
    question = head.partition("Question:\n")[2].strip()
    results: list[str] = []
    steps: list[_Step] = []
    for text in texts:
        block = _RESULT_BLOCK.search(text)
        ideal = ideal_step(question, results)
        if block is None:
            answer = protocol.extract_answer([text])
            useful = answer is not None and answer == protocol.extract_answer([ideal])
            steps.append(_Step(text, None, ideal, useful))
        else:
            useful = ideal_step(question, [*results, block[1]]) != ideal
            steps.append(_Step(text[: block.start()], block[1], ideal, useful))
            if useful:
                results.append(block[1])
    return steps


def _first_useless(steps: Sequence[_Step], looked_at: Sequence[bool]) -> int | None:
    """The number, from 1, of the first step that is `looked_at` and not useful."""
    pairs = enumerate(zip(steps, looked_at, strict=True), start=1)
    return next((number for number, (step, look) in pairs if look and not step.useful), None)


def _revision(steps: Sequence[_Step], analysis: str, looked_at: Sequence[bool]) -> str:
    number = _first_useless(steps, looked_at)
    if number is None:
        return _NO_STEP
    return f"Step: {number}\nAnalysis: {analysis}\nCorrected step:\n{steps[number - 1].ideal}"


def _short_thoughts(step: _Step) -> list[str]:
    """For each think block its last sentence; for the one before what the solver would do too, the solver's thought."""
    thoughts = [re.split(r"(?<=[.!?])\s+", text.strip())[-1] for text in _THINK_BLOCK.findall(step.written)]
    same_kind = (step.result is None) == (protocol.ending_call(step.ideal, TOOLS) is None)
    if thoughts and step.useful and same_kind:
        thoughts[-1] = _THINK_BLOCK.findall(step.ideal)[-1]
    return thoughts
