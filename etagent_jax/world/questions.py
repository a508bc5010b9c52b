"""The five kinds of questions and how a split's distinct ones are drawn.

Every question of a kind has a number within its split, from which it is written, so the same id
always means the same question, whatever the draw.
"""

import math

import numpy as np

from etagent_jax.trajectory import Question, QuestionKind
from etagent_jax.world.entities import CITY_RELATIONS, NUMBER_RELATIONS, RELATIONS, Split
from etagent_jax.world.solver import evaluate

PROPORTIONS = {"given": 2, "arithmetic": 3, "one_hop": 2, "two_hops": 3, "compute": 3}
DEMONSTRATED = {**PROPORTIONS, "given": 4}
"""What demonstrations are about: copying out of the question is the slowest thing to learn."""
MATHEMATICS = ("arithmetic", "compute")

_FACTORS = range(11, 100)  # of a looked-up number
_ADDENDS = range(2, 10)  # to a product


def _dimensions(split: Split, category: str) -> tuple[int, ...]:
    countries = len(split.countries)
    return {
        "given": (countries, len(RELATIONS)),
        "arithmetic": (len(split.factors), 2, len(_ADDENDS)),
        "one_hop": (countries, len(RELATIONS)),
        "two_hops": (countries, len(CITY_RELATIONS)),
        "compute": (countries, len(NUMBER_RELATIONS), 2, len(_FACTORS)),
    }[category]


def number_of_questions(split: Split, category: str) -> int:
    """How many distinct questions of this kind the split has."""
    return math.prod(_dimensions(split, category))


def nth_question(split: Split, category: str, number: int) -> Question:
    """Question `number`, from 0 to number_of_questions - 1."""
    first, *rest = (int(i) for i in np.unravel_index(number, _dimensions(split, category)))
    if category == "arithmetic":
        a, b = split.factors[first]
        expression = f"{a} * {b} {'+-'[rest[0]]} {_ADDENDS[rest[1]]}"
        text, answer = f"What is {expression}?", str(evaluate(expression))
    else:
        country = split.countries[first]
        relation = {"two_hops": CITY_RELATIONS, "compute": NUMBER_RELATIONS}.get(category, RELATIONS)[rest[0]]
        fact = country.fact(relation)
        text, answer = f"What is the {fact.query}?", fact.value
        if category == "given":
            text = f"{fact.sentence} {text}"
        elif category == "two_hops":
            text = f"What is the {relation} of the capital of {country.name}?"
        elif category == "compute":
            factor, value = _FACTORS[rest[2]], int(fact.value)
            if rest[1] == 0:
                text, answer = f"What is {factor} times the {fact.query}?", str(factor * value)
            else:
                text, answer = f"What is the {fact.query} plus {factor}?", str(value + factor)
    kind: QuestionKind = "mathematics" if category in MATHEMATICS else "qa"
    return Question(f"{split.name}-{category}-{number:05d}", text, (answer,), kind, category)


def _counts(total: int) -> dict[str, int]:
    """`total` divided by PROPORTIONS, largest remainders rounded up."""
    exact = {category: total * share / sum(PROPORTIONS.values()) for category, share in PROPORTIONS.items()}
    counts = {category: int(value) for category, value in exact.items()}
    by_remainder = sorted(exact, key=lambda category: counts[category] - exact[category])
    for category in by_remainder[: total - sum(counts.values())]:
        counts[category] += 1
    return counts


def draw_questions(split: Split, count: int, seed: int) -> list[Question]:
    """`count` distinct questions in PROPORTIONS, in random order; ValueError if the split has too few of a kind."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    counts = _counts(count)
    for category, wanted in counts.items():
        there = number_of_questions(split, category)
        if wanted > there:
            raise ValueError(
                f"{count} distinct {split.name} questions need {wanted} of kind {category}, but this world has "
                f"{there}: ask for fewer, or make a world of more countries"
            )
    rng = np.random.default_rng([seed, *split.name.encode()])
    drawn = [
        nth_question(split, category, number)
        for category, wanted in counts.items()
        for number in rng.choice(number_of_questions(split, category), size=wanted, replace=False).tolist()
    ]
    return [drawn[i] for i in rng.permutation(count)]


def any_question(split: Split, rng: np.random.Generator) -> Question:
    """One random question to demonstrate, its kind in the proportions DEMONSTRATED."""
    shares = np.array(list(DEMONSTRATED.values()))
    category = list(DEMONSTRATED)[rng.choice(len(shares), p=shares / shares.sum())]
    return nth_question(split, category, int(rng.integers(number_of_questions(split, category))))
