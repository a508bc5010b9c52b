"""SGLang's answers to `/generate`, read as completions or scores."""

import math
from typing import Any

from etagent_jax.policy.interface import Completion, Finish, Scores

LAUNCHED = -1
"""The version of weights that a server was launched with, or given by others: older than any of ours."""

VERSIONS = 10**6
"""More than a life of a run has."""

FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "abort"}


def version_name(version: int, life: int) -> str:
    """What a server is told as the name of a version: no other life of any run gives the same."""
    return str(life * VERSIONS + version)


def version_number(name: str, life: int) -> int:
    """The version that a server means; LAUNCHED for `default` and for those of other lives.

    ValueError for other words.
    """
    if name == "default":
        return LAUNCHED
    if not name.isdecimal():
        raise ValueError(f"weight version {name!r} is not a number")
    of, version = divmod(int(name), VERSIONS)
    return version if of == life else LAUNCHED


def read_completion(meta: dict[str, Any], life: int) -> tuple[Completion, int]:
    """A completion from `meta_info`, and the oldest version that had a part in it.

    LookupError, TypeError or ValueError if it makes no sense.
    """
    count = meta["completion_tokens"]
    # Some servers repeat entries before the last `count`.
    rows = meta["output_token_logprobs"][-count:] if count else []
    ids, logprobs = tuple(int(row[1]) for row in rows), tuple(float(row[0]) for row in rows)
    if not all(map(math.isfinite, logprobs)):
        raise ValueError("a log-probability is not finite")
    spans = meta.get("weight_versions") or [{"version": _served(meta), "start": 0, "end": count}]
    versions = [version_number(span["version"], life) for span in spans for _ in range(span["start"], span["end"])]
    oldest = min(versions, default=version_number(_served(meta), life))
    finish = FINISHES[meta["finish_reason"]["type"]]
    numbers = tuple(max(version, 0) for version in versions)
    return Completion(ids, logprobs, finish, numbers, cached_tokens=int(meta.get("cached_tokens", 0))), oldest


def read_scores(meta: dict[str, Any], count: int, life: int) -> tuple[Scores, int]:
    """The scores of `count` tokens from `meta_info`, and the version that gave them; errors as `read_completion`'s."""
    rows = meta["input_token_logprobs"]
    if len(rows) != count:
        raise ValueError(f"{len(rows)} input_token_logprobs for {count} tokens")
    version = version_number(_served(meta), life)
    return Scores(tuple(float(row[0]) for row in rows[1:]), max(version, 0)), version


def _served(meta: dict[str, Any]) -> str:
    return str(meta.get("weight_version", "default"))
