"""Which parameters of a model learn: all, the adapters of LoRA, or all but some that are frozen."""

import re
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Tree = dict[str, Any]
Paths = frozenset[tuple[str, ...]]


def learning_paths(params: Tree, adapters_only: bool, frozen: Sequence[str]) -> Paths:
    """Paths of the parameters that learn.  frozen: regular expressions that match a whole path, as in
    `layers/attention/query/kernel` or `embedding|layers/.*norm/scale`.

    ValueError for an expression that matches nothing, and if nothing is left to learn.
    """
    names = {path: "/".join(path) for path in flatten_dict(params)}
    for pattern in frozen:
        try:
            matches = [path for path, name in names.items() if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ValueError(f"frozen: {pattern!r} is not a regular expression ({error})") from error
        if not matches:
            raise ValueError(f"frozen: {pattern!r} matches no parameter; there are {', '.join(names.values())}")
    learns = frozenset(
        path
        for path, name in names.items()
        if not any(re.fullmatch(pattern, name) for pattern in frozen)
        and (path[-1].startswith("lora_") or not adapters_only)
    )
    if not learns:
        raise ValueError("frozen: nothing is left to learn")
    return learns


def split(params: Tree, learns: Paths) -> tuple[Tree, Tree]:
    """The parameters that learn, and the others."""
    flat = flatten_dict(params)
    return (
        unflatten_dict({path: leaf for path, leaf in flat.items() if path in learns}),
        unflatten_dict({path: leaf for path, leaf in flat.items() if path not in learns}),
    )


def join(one: Tree, other: Tree) -> Tree:
    """What `split` has parted."""
    return unflatten_dict(flatten_dict(one) | flatten_dict(other))
