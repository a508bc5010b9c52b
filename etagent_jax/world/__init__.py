"""The built-in offline world: facts, questions about them, and documents that hold the answers.

Everything follows from one seed.  The splits share no entity and no product, so nothing that is
learnt or chosen on one gives away an answer of another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

from etagent_jax.trajectory import Question
from etagent_jax.world.corpus import descriptions, write_documents
from etagent_jax.world.entities import SYLLABLES, Country, Split, make_splits
from etagent_jax.world.questions import draw_questions

TOOLS = ("search", "python")
SYSTEM_PROMPT = "Answer with tools."


@dataclass(frozen=True)
class World:
    """splits: by name, `train`, `validation` and `test`.  syllables: all that names may be made of."""

    seed: int
    splits: Mapping[str, Split] = field(repr=False)
    syllables: tuple[str, ...] = field(default=SYLLABLES, repr=False)

    @classmethod
    def make(cls, seed: int, countries: int = 500) -> Self:
        """A world of `countries`, each with its capital: 60 % for training, 16 % validation, 24 % test."""
        return cls(seed, make_splits(seed, countries))

    @property
    def countries(self) -> tuple[Country, ...]:
        return tuple(country for split in self.splits.values() for country in split.countries)

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise ValueError(f"split must be one of {', '.join(self.splits)}, got {name!r}")
        return self.splits[name]

    def questions(self, split: str, count: int, seed: int) -> list[Question]:
        """`count` distinct questions of a split, given : arithmetic : one_hop : two_hops : compute = 2:3:2:3:3.

        Raises ValueError when the split has too few of a kind.
        """
        return draw_questions(self.split(split), count, seed)

    def documents(self) -> list[str]:
        """The corpus for local search, one line each; the top document of `capital of zantor` holds that fact."""
        return write_documents(self.countries)

    @cached_property
    def found(self) -> Mapping[str, str]:
        """Query → what top-1 search answers, for a fact's query and for the bare name of a country or city."""
        found = {fact.query: fact.sentence for country in self.countries for fact in country.facts}
        for country in self.countries:
            found[country.name], found[country.capital] = descriptions(country)
        return found
