"""The smallest TPU slice on which each model's steps fit, and what bounds them there: the tables of docs/scaling.md.

    python -m benchmarks.scaling --results scaling.jsonl                 # compiles what is not in the file yet
    python -m benchmarks.scaling --results scaling.jsonl --models qwen2.5-7b --generations v5e

No TPU is needed, but libtpu is (requirements-tpu.txt), and minutes for each compilation.  Batches are of 32 rows, or
of one a device on larger slices, one row a device at a time, layers recomputed ("full"), parameters over all
devices; where that does not fit, a tensor axis of 2 and 4 is tried before the next larger slice.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from etagent_jax.learner.mesh import make_mesh
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.learner.step import Learner
from etagent_jax.model.shapes import SHAPES
from etagent_jax.planning import devices
from etagent_jax.planning.plan import GIB, exact_memory, make_plan, saved_activations
from etagent_jax.planning.steps import Kind, Step

ROWS, LENGTH = 32, 8192
MODELS = ("qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b")
KINDS: tuple[Kind, ...] = ("sft", "policy")


def step(model: str, topology: str, tensor: int, kind: Kind) -> Step:
    found = devices.find(topology)
    shards = len(found) // tensor
    learner = Learner(
        SHAPES[model], OptimizerConfig(1e-5, 1000), mesh=make_mesh(1, shards, tensor, found),
        micro_batches=-(-ROWS // shards), remat="full",
    )  # fmt: skip
    return Step(kind, kind, learner, learner.whole_rows(ROWS), LENGTH)


def places(model: str, generation: str) -> Iterator[tuple[str, int]]:
    """Slices by size, with tensor axes, that hold at least what needs no compiling to be known."""
    for shape in devices.SLICES[generation]:
        topology = f"{generation}:{shape}"
        available = devices.memory_of(devices.find(topology)[0]) or 0
        for tensor in (1, 2, 4):
            if SHAPES[model].num_kv_heads % tensor == 0:
                this = step(model, topology, tensor, "sft")
                if sum(exact_memory(this).values()) + saved_activations(this) <= available:
                    yield topology, tensor


def search(model: str, generation: str, done: dict[tuple, dict]) -> Iterator[dict]:
    """New records of one place after the other, up to the first on which both steps fit."""
    for topology, tensor in places(model, generation):
        for kind in KINDS:
            key = model, topology, tensor, kind
            if key not in done:
                plan = make_plan(step(*key))
                done[key] = {"model": model, "topology": topology, "tensor": tensor, **asdict(plan),
                             "fits": plan.fits, "bound": plan.bound, "mfu": plan.mfu}  # fmt: skip
                yield done[key]
            if not done[key]["fits"]:
                break
        else:
            return


def table(done: dict[tuple, dict]) -> str:
    """Markdown: of every model and generation the smallest slice on which both steps fit."""
    columns = ("model", "slice", "fsdp × tensor", "step", "parameters", "optimizer", "gradients", "activations",
               "all", "of", "compute s", "memory s", "network s", "bound by", "MFU at most")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * 4 + "|--:" * 9 + "|---|--:|"]
    for model, topology, tensor in sorted({key[:3] for key in done}, key=order):
        records = [done.get((model, topology, tensor, kind)) for kind in KINDS]
        rows = {kind: row(record) for kind, record in zip(KINDS, records, strict=True) if record and record["fits"]}
        if len(rows) == len(KINDS):
            kinds = {", ".join(KINDS): rows["sft"]} if rows["sft"] == rows["policy"] else rows
            lines += [f"| {model} | {topology} | {left} | {kind} | {right} |" for kind, (left, right) in kinds.items()]
    return "\n".join(lines)


def order(place: tuple[str, str, int]) -> tuple[int, int]:
    return list(SHAPES).index(place[0]), list(devices.SLICES).index(place[1].partition(":")[0])


def row(record: dict) -> tuple[str, str]:
    """The cells before and after the one that names the step."""
    memory = [record["memory"][kind] for kind in ("parameters", "optimizer", "gradients", "activations")]
    memory += [sum(record["memory"].values()), record["available"]]
    cells = [f"{n / GIB:.2f}" for n in memory]
    cells += [f"{record['seconds'][name]:.2f}" for name in ("compute", "memory", "network")]
    return f"{record['mesh']['fsdp']} × {record['mesh']['tensor']}", " | ".join(
        [*cells, record["bound"], f"{record['mfu']:.0%}"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=MODELS)
    parser.add_argument("--generations", nargs="*", choices=devices.SLICES, default=tuple(devices.SLICES))
    a = parser.parse_args()
    lines = a.results.read_text().splitlines() if a.results.exists() else []
    records = [json.loads(line) for line in lines]
    done = {(r["model"], r["topology"], r["tensor"], r["kind"]): r for r in records}
    with a.results.open("a") as out:
        for model in a.models:
            for generation in a.generations:
                for record in search(model, generation, done):
                    out.write(json.dumps(record) + "\n")
                    out.flush()
    print(table(done))


if __name__ == "__main__":
    main()
