"""The documents that local search finds: one line for each fact, and one that says what a name stands for."""

from collections.abc import Iterable

from etagent_jax.world.entities import Country


def descriptions(country: Country) -> tuple[str, str]:
    """What search finds for a bare name: these are shorter than any fact, so BM25 ranks them first."""
    return f"{country.name} is a country.", f"{country.capital} is a city."


def write_documents(countries: Iterable[Country]) -> list[str]:
    """Six facts and two descriptions for each country."""
    return [
        line for country in countries for line in (*descriptions(country), *(fact.sentence for fact in country.facts))
    ]
