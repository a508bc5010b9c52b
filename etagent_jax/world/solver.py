"""The ideal next step for a question of the built-in world, from its text and the results so far alone."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from etagent_jax.protocol import ANSWER, THINK, closing, opening
from etagent_jax.world.entities import RELATIONS

GIVEN_THOUGHT = "The question says it."
COMPUTE_THOUGHT = "I compute it with python."
KNOWN_THOUGHT = "Now I know it."


def need_thought(query: str) -> str:
    return f"I need the {query}."


_RELATION = f"({'|'.join(RELATIONS)})"
_GIVEN = re.compile(rf"The {_RELATION} of ([a-z]+) is (\w+)\. What is the \1 of \2\?")
_ARITHMETIC = re.compile(r"What is (\d+ \* \d+ [+-] \d+)\?")
_ONE_HOP = re.compile(rf"What is the {_RELATION} of ([a-z]+)\?")
_TWO_HOPS = re.compile(rf"What is the {_RELATION} of the {_RELATION} of ([a-z]+)\?")
_TIMES = re.compile(rf"What is (\d+) times the {_RELATION} of ([a-z]+)\?")
_PLUS = re.compile(rf"What is the {_RELATION} of ([a-z]+) plus (\d+)\?")
_FACT = re.compile(rf"The {_RELATION} of ([a-z]+) is (\w+)\.")


@dataclass(frozen=True, slots=True)
class Task:
    """What a question asks for.

    given: the answer, if the question states it.  entity, relations: where a lookup starts and
    what to look up, one after the other.  expression: what to compute then; `{}` is the number found.
    """

    given: str = ""
    entity: str = ""
    relations: tuple[str, ...] = ()
    expression: str = ""


def read_question(text: str) -> Task:
    """Parse a question by its template; ValueError if it is none of this world's."""
    text = text.strip()
    if match := _GIVEN.fullmatch(text):
        return Task(given=match[3])
    if match := _ARITHMETIC.fullmatch(text):
        return Task(expression=match[1])
    if match := _ONE_HOP.fullmatch(text):
        return Task(entity=match[2], relations=(match[1],))
    if match := _TWO_HOPS.fullmatch(text):
        return Task(entity=match[3], relations=(match[2], match[1]))
    if match := _TIMES.fullmatch(text):
        return Task(entity=match[3], relations=(match[2],), expression=f"{match[1]} * {{}}")
    if match := _PLUS.fullmatch(text):
        return Task(entity=match[2], relations=(match[1],), expression=f"{{}} + {match[3]}")
    raise ValueError(f"not a question of the built-in world: {text!r}")


def evaluate(expression: str) -> int:
    """Value of sums and differences of products of integers, such as `34 * 27 + 8`."""
    terms = re.findall(r"([+-]?)\s*(\d+(?:\s*\*\s*\d+)*)", expression)
    return sum((-1 if sign == "-" else 1) * math.prod(map(int, product.split("*"))) for sign, product in terms)


def think(thought: str) -> str:
    return f"{opening(THINK)}{thought}{closing(THINK)}"


def call(thought: str, tool: str, text: str) -> str:
    """A step that ends in a call."""
    return f"{think(thought)}{opening(tool)}{text}{closing(tool)}"


def answer(thought: str, value: str) -> str:
    """A last step."""
    return f"{think(thought)}{opening(ANSWER)}\\boxed{{{value}}}{closing(ANSWER)}"


def ideal_step(question_text: str, results: Sequence[str]) -> str:
    """The next step, shortly thought: a call that is still needed, or else the answer.

    results: what tools have returned so far.  Facts are read from there only; a number counts as
    computed only if it is the value asked for.  Raises ValueError if this is no world question.
    """
    task = read_question(question_text)
    if task.given:
        return answer(GIVEN_THOUGHT, task.given)
    known = {(m[1], m[2]): m[3] for result in results for m in _FACT.finditer(result)}
    value = task.entity
    for relation in task.relations:
        if (relation, value) not in known:
            query = f"{relation} of {value}"
            return call(need_thought(query), "search", query)
        value = known[relation, value]
    if not task.expression:
        return answer(KNOWN_THOUGHT, value)
    expression = task.expression.format(value)
    computed = str(evaluate(expression))
    if computed not in (result.strip() for result in results):
        return call(COMPUTE_THOUGHT, "python", f"print({expression})")
    return answer(KNOWN_THOUGHT, computed)


def least_calls(question_text: str) -> int:
    """The fewest calls that find the answer; ValueError if this is no world question."""
    task = read_question(question_text)
    return len(task.relations) + bool(task.expression)
