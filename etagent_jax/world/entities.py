"""Names and facts: the countries of the built-in world, their capitals and people, divided into splits."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

# Consonant, vowel, consonant: no stretch of three letters inside a name but its own syllables has
# that form, so a name can be cut into syllables in one way only.
SYLLABLES = tuple(map("".join, itertools.product("bdgklmrt", "aeio", "ln")))

COUNTRY_RELATIONS = ("capital", "ruler", "population", "area")
CITY_RELATIONS = ("mayor", "founding year")
RELATIONS = COUNTRY_RELATIONS + CITY_RELATIONS
NUMBER_RELATIONS = ("population", "area", "founding year")

SPLIT_SHARES = {"train": 0.60, "validation": 0.16, "test": 0.24}
NAMES_PER_COUNTRY = 4  # country, capital, ruler, mayor
MIN_COUNTRIES, MAX_COUNTRIES = 20, 2 * len(SYLLABLES) ** 2 // NAMES_PER_COUNTRY


@dataclass(frozen=True, slots=True)
class Fact:
    relation: str
    subject: str
    value: str

    @property
    def query(self) -> str:
        """What to search for: `capital of zantor`."""
        return f"{self.relation} of {self.subject}"

    @property
    def sentence(self) -> str:
        return f"The {self.query} is {self.value}."


@dataclass(frozen=True, slots=True)
class Country:
    """A country with its capital; mayor and founding_year are the capital's."""

    name: str
    capital: str
    ruler: str
    population: int
    area: int
    mayor: str
    founding_year: int

    @property
    def facts(self) -> tuple[Fact, ...]:
        """One fact for each of RELATIONS, in that order."""
        of_country = zip(COUNTRY_RELATIONS, (self.capital, self.ruler, self.population, self.area), strict=True)
        of_city = zip(CITY_RELATIONS, (self.mayor, self.founding_year), strict=True)
        return (
            *(Fact(relation, self.name, str(value)) for relation, value in of_country),
            *(Fact(relation, self.capital, str(value)) for relation, value in of_city),
        )

    def fact(self, relation: str) -> Fact:
        return self.facts[RELATIONS.index(relation)]


@dataclass(frozen=True, slots=True)
class Split:
    """What the questions of one split are about: countries, and pairs of two-digit factors for arithmetic."""

    name: str
    countries: tuple[Country, ...]
    factors: tuple[tuple[int, int], ...]


def make_names(count: int, rng: np.random.Generator) -> list[str]:
    """`count` distinct names in random order, half of two syllables, half of three."""
    names = []
    for syllables, wanted in ((2, count // 2), (3, count - count // 2)):
        codes = rng.choice(len(SYLLABLES) ** syllables, size=wanted, replace=False)
        digits = np.unravel_index(codes, (len(SYLLABLES),) * syllables)
        names += ["".join(SYLLABLES[d] for d in code) for code in zip(*digits, strict=True)]
    assert len(set(names)) == count
    return [names[i] for i in rng.permutation(count)]


def _runs(count: int) -> dict[str, slice]:
    """Where each split's part of `count` things lies, by SPLIT_SHARES."""
    ends = [round(share * count) for share in itertools.accumulate(SPLIT_SHARES.values())]
    return {name: slice(a, b) for name, a, b in zip(SPLIT_SHARES, [0, *ends[:-1]], ends, strict=True)}


def make_splits(seed: int, countries: int) -> dict[str, Split]:
    """Random countries and factor pairs, divided by SPLIT_SHARES: no name and no product is in two splits."""
    if not MIN_COUNTRIES <= countries <= MAX_COUNTRIES:
        raise ValueError(f"countries must be between {MIN_COUNTRIES} and {MAX_COUNTRIES}, got {countries}")
    rng = np.random.default_rng(seed)
    names = make_names(NAMES_PER_COUNTRY * countries, rng)
    population, area = rng.integers(11, 1000, size=(2, countries)).tolist()
    founding_year = rng.integers(100, 1000, size=countries).tolist()
    made = []
    for i in range(countries):
        name, capital, ruler, mayor = names[NAMES_PER_COUNTRY * i : NAMES_PER_COUNTRY * (i + 1)]
        made.append(Country(name, capital, ruler, population[i], area[i], mayor, founding_year[i]))
    pairs = list(itertools.combinations(range(11, 100), 2))
    by_product: dict[int, list[tuple[int, int]]] = {}
    for i in rng.permutation(len(pairs)).tolist():
        by_product.setdefault(math.prod(pairs[i]), []).append(pairs[i])
    products = list(by_product.values())
    factors = {name: tuple(itertools.chain(*products[run])) for name, run in _runs(len(products)).items()}
    return {name: Split(name, tuple(made[run]), factors[name]) for name, run in _runs(countries).items()}
