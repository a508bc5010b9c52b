"""What to change in a config so that its steps fit, tried by compiling."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from etagent_jax.model.transformer import ModelConfig
from etagent_jax.planning import devices
from etagent_jax.planning.plan import Plan, exact_memory, make_plan, saved_activations
from etagent_jax.planning.steps import Step, stages_of, steps_of
from etagent_jax.stages import setup

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Advice:
    """A change under which all steps fit.  flags: of the command line, in place of those that did not."""

    flags: tuple[str, ...]
    plans: tuple[Plan, ...]


def advise(
    config: ConfigDict, model: ModelConfig, topology: str, available: float | None = None, failed: Sequence[Step] = ()
) -> Advice | None:
    """The first of `changes` under which every step fits; None if there is none.

    available: bytes of a device, in place of what is known of it.  failed: steps that do not fit, which no
    change leads back to.  What cannot fit by the bytes that are known without compiling is passed over.
    """
    tried = {tuple(step.layout for step in failed)}
    for candidate, overrides in changes(config, model, topology):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(overrides)
        try:
            steps = steps_of(changed, model, devices.find(candidate))
        except ValueError:  # the model's axes cannot be split so
            continue
        layout = tuple(step.layout for step in steps)
        plans = _plans_that_fit(steps, available) if layout not in tried else []
        tried.add(layout)
        if len(plans) == len(steps):
            moved = [f"--config.{name}={value}" for name, value in overrides.items() if value != _get(config, name)]
            return Advice((f"--topology={candidate}", *moved), tuple(plans))
    return None


def changes(config: ConfigDict, model: ModelConfig, topology: str) -> Iterator[tuple[str, Overrides]]:
    """Slices and changed fields of the config, the cheapest first.

    Parameters over all devices; one row a device at a time; layers computed again in the backward pass;
    a tensor axis; then the next larger slices with all of that.
    """
    mine = len(devices.find(topology))
    for one_row, remat in ((False, config.remat), (True, config.remat), (True, "full")):
        yield topology, _overrides(config, mine, 1, one_row, remat)
    for candidate in (topology, *devices.larger(topology)):
        count = len(devices.find(candidate))
        for tensor in (1, 2, 4, 8):
            tried = candidate == topology and tensor == 1
            if not tried and model.num_kv_heads % tensor == 0 and count % tensor == 0:
                yield candidate, _overrides(config, count, tensor, True, "full")


def _overrides(config: ConfigDict, count: int, tensor: int, one_row: bool, remat: str) -> Overrides:
    """Fields for a mesh of `count` devices without a data axis, with rows that can be shared over it."""
    shards = count // tensor
    found: Overrides = {"mesh.data": 1, "mesh.fsdp": shards, "mesh.tensor": tensor, "remat": remat}
    for stage in stages_of(config).values():
        c = config[stage]
        rows = setup.step_rows(c)
        at_most = -(-rows // shards)
        one_row_at_a_time = one_row or c.micro_batches in (-1, at_most)
        found[f"{stage}.micro_batches"] = -1 if one_row_at_a_time else min(c.micro_batches, at_most)
        parts = at_most if one_row_at_a_time else found[f"{stage}.micro_batches"]
        if "rows" in c:
            found[f"{stage}.rows"] = -(-rows // (parts * shards)) * parts * shards
    return found


def _plans_that_fit(steps: list[Step], available: float | None) -> list[Plan]:
    """Plans of the steps up to the first that does not fit."""
    plans: list[Plan] = []
    for step in steps:
        limit = available or devices.memory_of(step.learner.mesh.devices.flat[0])
        if limit and sum(exact_memory(step).values()) + saved_activations(step) > limit:
            break
        plan = make_plan(step, available)
        if not plan.fits:
            break
        plans.append(plan)
    return plans


def _get(config: ConfigDict, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value[part]
    return value
