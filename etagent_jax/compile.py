"""Compile: the fine-tuning and policy steps of a config for a slice that need not be there, and what they need.

    python -m etagent_jax.compile --config=configs/phase2.py:qwen2.5-7b --topology=v5e:4x8 [--config.FIELD=VALUE …]

Topologies: TPU slices (v5e:4x8, v6e:4x4, v5p:2x2x2), cpu:8 (virtual devices) and here.  The model is that of
config.model.path if the folder is there; otherwise only its shape, by the path's name or by --model.  For
every step: memory of a device by kind, whether it fits, FLOPs, collectives, and bounds of the time by compute,
memory and network; docs/scaling.md says how to read them.  Where a step does not fit, changes are tried until
one does, and its flags are printed.  --json prints all of it as one JSON object.
"""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from etagent_jax import command

if TYPE_CHECKING:
    from etagent_jax.planning.plan import Plan

flags.declare_key_flag("config")
TOPOLOGY = flags.DEFINE_string(
    "topology", "here", "Devices to compile for: v5e:4x8, v6e:4x4, v5p:2x2x2, cpu:8 or here."
)
MODEL = flags.DEFINE_string("model", "", "Shape of a published model, for a path that is not downloaded: qwen2.5-7b.")
MEMORY = flags.DEFINE_float("memory_gib", None, "GiB of a device that a program may use, if not what is known of it.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")

GIB = 2**30


def main(config: ConfigDict) -> None:
    from etagent_jax.planning import devices
    from etagent_jax.planning.advice import advise
    from etagent_jax.planning.plan import make_plan
    from etagent_jax.planning.steps import model_of, steps_of

    topology, available = TOPOLOGY.value, MEMORY.value and MEMORY.value * GIB
    found = devices.find(topology)
    model = model_of(config, MODEL.value)
    problem, steps = "", []
    try:
        steps = steps_of(config, model, found)
    except ValueError as error:
        problem = str(error)
    plans = [make_plan(step, available) for step in steps]
    fits = not problem and all(plan.fits for plan in plans)
    if not JSON.value:
        print(f"{topology}: {len(found)} devices of kind {found[0].device_kind}")
        print("".join(map(describe, plans)) or f"\ncannot run: {problem}\n", flush=True)
    advice = None if fits else advise(config, model, topology, available, steps)
    if JSON.value:
        print(json.dumps({
            "topology": topology, "devices": len(found), "model": asdict(model), "fits": fits, "problem": problem,
            "steps": [as_json(plan) for plan in plans],
            "advice": advice and {"flags": advice.flags, "steps": [as_json(plan) for plan in advice.plans]},
        }, indent=1))  # fmt: skip
    elif advice is not None:
        print("It fits, as compiled, with\n  " + " ".join(advice.flags) + "\n" + "".join(map(describe, advice.plans)))
    elif not fits:
        print("None of the changes that were tried makes it fit: mesh, micro-batches, remat, the next larger slices.")


def as_json(plan: "Plan") -> dict[str, Any]:
    return asdict(plan) | {"fits": plan.fits, "bound": plan.bound, "mfu_ceiling": plan.mfu}


def describe(plan: "Plan") -> str:
    """A plan as a person reads it."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    memory = "  ".join(f"{kind} {size(n)}" for kind, n in plan.memory.items())
    total, limit = size(sum(plan.memory.values())), f" of {size(plan.available)}" if plan.available else ""
    lines = [
        f"\n{plan.stage}, {plan.kind} step: {plan.rows} rows of {plan.length} tokens, "
        f"micro-batches {plan.micro_batches}; mesh {mesh}",
        f"  memory of a device: {memory}; all {total}{limit}",
        f"  {'fits' if plan.fits else 'does not fit: ' + plan.problem}; compiled in {plan.compile_seconds:.0f} s",
        f"  TFLOPs a device: {plan.model_flops / 1e12:.3g} of the model, {plan.executed_flops / 1e12:.3g} executed",
    ]
    for c in plan.collectives:
        lines.append(
            f"  {c.kind} over {' and '.join(c.axes)}: {c.count} a step, in which a device sends {size(c.sent)}"
        )
    if plan.seconds and plan.mfu is not None:
        bounds = "  ".join(f"{name} {seconds:.3g}" for name, seconds in plan.seconds.items())
        lines.append(f"  seconds at least: {bounds}; bound by {plan.bound}, MFU at most {plan.mfu:.0%}")
    return "\n".join(lines) + "\n"


def size(n: float) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / 2**20:.2f} MiB"


if __name__ == "__main__":
    command.run_alone(main)
