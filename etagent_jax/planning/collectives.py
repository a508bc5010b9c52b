"""The collectives of a compiled program: what each device sends, how often, along which axes of the mesh."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from etagent_jax.planning.hlo import Computation, Instruction, Program, size

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all",
         "collective-broadcast")  # fmt: skip
ENDS = '"AsyncCollectiveDone"'
Groups = list[list[int]]


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind along the same axes in one step.

    count: how many each device takes part in.  sent: bytes that each device sends.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    sent: int


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """mesh: sizes of its named axes, in order; the devices of the program are those of the mesh, in its order.

    Sent by each of n devices that hold b bytes before: (n-1) b for an all-gather, (n-1)/n b for a
    reduce-scatter or all-to-all, twice that for an all-reduce (it is one and the other), b for a permute.
    """
    counts: defaultdict[tuple[str, tuple[str, ...]], int] = defaultdict(int)
    sent: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for computation, instruction, times in program.executed():
        kind = _kind(program, computation, instruction)
        if kind is None:
            continue
        groups = _groups(instruction, int(np.prod(list(mesh.values()))))
        held = sum(size(computation.instructions[name].shape) for name in instruction.operands)
        n = max(len(group) for group in groups)
        if n > 1:
            key = kind, _axes(groups, mesh)
            counts[key] += times
            sent[key] += times * held * _hops(kind, n)
    return [Collective(*key, counts[key], round(sent[key])) for key in sorted(counts, key=lambda key: -sent[key])]


def _hops(kind: str, n: int) -> float:
    """Bytes sent for each byte held."""
    match kind:
        case "all-gather":
            return n - 1
        case "all-reduce":
            return 2 * (n - 1) / n
        case "collective-permute" | "collective-broadcast":
            return 1
        case _:
            return (n - 1) / n


def _kind(program: Program, computation: Computation, instruction: Instruction) -> str | None:
    """What the instruction sends; None for one that sends nothing, or whose sending was counted where it began.

    A TPU hides collectives in fusions: one that is started in a fusion stands again in those that go on with
    it and end it, and a reduce-scatter is an all-reduce of which only a slice is kept.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    if computation.name in program.fused:
        inside = computation.instructions.values()
        if computation.name.startswith("async_collective_fusion") or any(ENDS in i.attributes for i in inside):
            return None
        if computation.name.startswith("all-reduce-scatter"):
            return "reduce-scatter"
    return kind


def _groups(instruction: Instruction, devices: int) -> Groups:
    """Which devices take part together; for a permute those between which something travels."""
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return _lists(pairs.group(1) + "}")
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        chosen = re.findall(r"'(\w+)'", named.group(2))
        grid = np.arange(devices).reshape(list(sizes.values()))
        along = [list(sizes).index(axis) for axis in chosen]
        rest = [i for i in range(grid.ndim) if i not in along]
        return grid.transpose(rest + along).reshape(-1, int(np.prod([grid.shape[i] for i in along]))).tolist()
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        grid = np.arange(devices).reshape([int(n) for n in iota.group(3).split(",")])
        if iota.group(4):
            grid = grid.transpose([int(n) for n in iota.group(4).split(",")])
        return grid.reshape(int(iota.group(1)), int(iota.group(2))).tolist()
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", text)
    return _lists(listed.group(1)) if listed else [list(range(devices))]


def _lists(text: str) -> Groups:
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]


def _axes(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The fewest axes of the mesh along which the members of every group differ."""
    grid = np.indices(tuple(mesh.values())).reshape(len(mesh), -1)
    for count in range(len(mesh) + 1):
        for chosen in combinations(range(len(mesh)), count):
            others = [i for i in range(len(mesh)) if i not in chosen]
            if all((grid[others][:, group] == grid[others][:, group[:1]]).all() for group in groups):
                return tuple(list(mesh)[i] for i in chosen)
    raise AssertionError("all axes together join all devices")
