"""Bytes that a compiled program moves between a device's main memory and its cores."""

from etagent_jax.planning.collectives import KINDS
from etagent_jax.planning.hlo import Computation, Instruction, Program, arrays, size

FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
        "partition-id", "opt-barrier")  # fmt: skip
NO_WORK = ("AllocateBuffer", "ConcatBitcast")
"""Custom calls of a TPU that name memory and move nothing."""


def traffic(program: Program) -> int:
    """What each device reads and writes in one step, every instruction's operands read once, its result written once.

    Arrays that the compiler keeps in fast memory cost nothing; slicing costs the slice, updating a slice
    twice that.  Nothing is known of caches, so for a GPU or CPU it is an upper bound.
    """
    return sum(
        times * _moved(program, computation, instruction)
        for computation, instruction, times in program.executed()
        if computation.name not in program.fused
        and instruction.opcode not in FREE
        and not instruction.opcode.endswith(("-start", "-update"))
        and not any(f'"{target}"' in instruction.attributes for target in NO_WORK)
    )


def _moved(program: Program, computation: Computation, instruction: Instruction) -> int:
    operands = [computation.instructions[name].shape for name in instruction.operands]
    match instruction.opcode:
        case "fusion":
            fusion = _called(program, instruction)
            read = sum(
                min(_read(program, fusion, parameter), _slow(shape))
                for parameter, shape in zip(_parameters(fusion), operands, strict=True)
            )
            return read + min(_written(program, fusion, fusion.root), _slow(instruction.shape))
        case "copy-done" | "slice-done":
            return size(instruction.shape)  # from main to fast memory, or back
        case "dynamic-slice" | "slice" | "gather":
            return 2 * _slow(instruction.shape)
        case "dynamic-update-slice":
            return 2 * _slow(operands[1])
    if instruction.opcode.endswith("-done"):
        return 2 * _slow(instruction.shape)
    return sum(map(_slow, operands)) + _slow(instruction.shape)


def _read(program: Program, fusion: Computation, value: Instruction) -> int:
    """Bytes that a fusion needs of a value: all of it, or only the slices it takes; none if it only hands it on."""
    taken = 0
    for user in fusion.instructions.values():
        if value.name not in user.operands:
            continue
        if user.opcode == "dynamic-slice":
            taken += size(user.shape)
        elif user.opcode == "bitcast":
            taken += _read(program, fusion, user)
        elif user.opcode == "fusion":
            inner = _called(program, user)
            uses = [p for p, name in zip(_parameters(inner), user.operands, strict=True) if name == value.name]
            taken += sum(_read(program, inner, parameter) for parameter in uses)
        elif not _hands_on(user) and not (user.opcode == "dynamic-update-slice" and user.operands[0] == value.name):
            return size(value.shape)
    return taken


def _written(program: Program, fusion: Computation, value: Instruction) -> int:
    """Bytes that a fusion writes for a value it returns; of an updated slice, the slice."""
    operands = [fusion.instructions[name] for name in value.operands if name in fusion.instructions]
    match value.opcode:
        case "tuple":
            return sum(_written(program, fusion, operand) for operand in operands)
        case "bitcast":
            return _written(program, fusion, operands[0])
        case "dynamic-update-slice":
            return size(operands[1].shape)
        case "fusion":
            inner = _called(program, value)
            return _written(program, inner, inner.root)
    return 0 if value.opcode == "parameter" or _hands_on(value) else size(value.shape)


def _hands_on(user: Instruction) -> bool:
    """Whether it only returns a value, or sends it; what travels is counted where it arrives."""
    return user.opcode == "tuple" or user.opcode in KINDS or "AsyncCollective" in user.attributes


def _called(program: Program, instruction: Instruction) -> Computation:
    return program.computations[instruction.attribute("calls") or ""]


def _parameters(computation: Computation) -> list[Instruction]:
    found = [i for i in computation.instructions.values() if i.opcode == "parameter"]
    return sorted(found, key=lambda i: int(i.arguments))


def _slow(shape: str) -> int:
    """Bytes of the arrays that lie in main memory."""
    return sum(n for n, in_main_memory in arrays(shape) if in_main_memory)
