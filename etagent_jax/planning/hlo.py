"""The text of a compiled program, read as computations whose instructions run a known number of times."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
        "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}  # fmt: skip
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    """One line: `%name = shape opcode(operands), attributes`.  arguments: what stands in the brackets."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def attribute(self, name: str) -> str | None:
        """The name of a computation, or a number, that stands after `name=`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(reversed([i for i in self.instructions.values() if i.is_root]))

    def constant(self, name: str) -> int | None:
        """The value of an integer constant, None if `name` is none."""
        found = self.instructions.get(name)
        if found is None or found.opcode != "constant" or not re.fullmatch(r"-?\d+", found.arguments):
            return None
        return int(found.arguments)

    def element(self, name: str) -> int | None:
        """Which element of its operand a get-tuple-element takes, None if `name` is none."""
        found = self.instructions.get(name)
        index = found.attribute("index") if found and found.opcode == "get-tuple-element" else None
        return None if index is None else int(index)


class Program:
    """dynamic_trips: how often the body of a loop runs whose bound is not in the program."""

    def __init__(self, text: str, dynamic_trips: int = 1):
        self.dynamic_trips = dynamic_trips
        self.computations: dict[str, Computation] = {}
        current = Computation("")
        for line in text.splitlines():
            if instruction := _instruction(line):
                current.instructions[instruction.name] = instruction
            elif header := COMPUTATION.match(line):
                current = self.computations[header.group(2)] = Computation(header.group(2))
                if header.group(1):
                    self.entry = header.group(2)
        self.times: Counter[str] = Counter()
        self.fused: set[str] = set()
        self._run(self.entry, 1)

    def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that runs, and how often, those inside of fusions included."""
        for name, times in self.times.items():
            for instruction in self.computations[name].instructions.values():
                yield self.computations[name], instruction, times

    def trips(self, caller: Computation, loop: Instruction) -> int:
        """How often the body of a `while` runs each time the loop is reached."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known.group(1))
        condition = self.computations[loop.attribute("condition") or ""]
        body = self.computations[loop.attribute("body") or ""]
        test = condition.root
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return self.dynamic_trips
        index, bound = condition.element(test.operands[0]), condition.constant(test.operands[1])
        if index is None or bound is None:
            return self.dynamic_trips
        initial = caller.instructions[loop.operands[0]]
        start = caller.constant(initial.operands[index]) if initial.opcode == "tuple" else None
        return -(-(bound - (start or 0)) // _stride(body, index))

    def _run(self, name: str, times: int) -> None:
        self.times[name] += times
        for instruction in self.computations[name].instructions.values():
            if instruction.opcode == "while":
                trips = self.trips(self.computations[name], instruction)
                self._run(instruction.attribute("condition") or "", times * (trips + 1))
                self._run(instruction.attribute("body") or "", times * trips)
            elif instruction.opcode in ("fusion", "call", "conditional", "async-start"):
                branches = BRANCHES.search(instruction.attributes)
                called = CALLED.findall(instruction.attributes)
                called += re.findall(r"%?([\w.\-]+)", branches.group(1)) if branches else []
                for callee in called:
                    if instruction.opcode == "fusion" or name in self.fused:
                        self.fused.add(callee)
                    self._run(callee, times)


def arrays(shape: str) -> Iterator[tuple[int, bool]]:
    """Bytes of each array of a shape or tuple of shapes, and whether it lies in the device's main memory."""
    for dtype, dimensions, layout in ARRAY.findall(shape):
        if dtype in BITS:
            size = BITS[dtype]
            for dimension in filter(None, dimensions.split(",")):
                size *= int(dimension)
            yield -(-size // 8), re.search(r"S\([1-9]", layout) is None


def size(shape: str) -> int:
    """Bytes of all arrays of a shape."""
    return sum(n for n, _ in arrays(shape))


def _stride(body: Computation, index: int) -> int:
    """What one run of a loop's body adds to element `index` of its state."""
    root = body.root
    if root.opcode == "tuple":
        step = body.instructions.get(root.operands[index])
        if step is not None and step.opcode == "add":
            values = [body.constant(name) for name in step.operands]
            elements = [body.element(name) for name in step.operands]
            if index in elements and any(values):
                return next(value for value in values if value)
    return 1


def _instruction(line: str) -> Instruction | None:
    match = INSTRUCTION.match(line)
    if match is None:
        return None
    is_root, name, rest = match.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opening = rest.find("(", end)
    if end <= 0 or opening < 0:
        return None
    closing = _closing(rest, opening)
    return Instruction(
        name, rest[:end], rest[end:opening].strip(), rest[opening + 1 : closing], rest[closing + 1 :], bool(is_root)
    )


def _closing(text: str, opening: int) -> int:
    """Where the bracket at `opening` is closed."""
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text)
