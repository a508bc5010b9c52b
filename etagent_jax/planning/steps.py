"""The training steps of a config, as the stages build them, on devices that need not be there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
from ml_collections import ConfigDict

from etagent_jax.learner.mesh import make_mesh
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.learner.step import Learner
from etagent_jax.model.folder import read_config
from etagent_jax.model.shapes import SHAPES
from etagent_jax.model.transformer import ModelConfig
from etagent_jax.stages import calibrate, setup
from etagent_jax.stages.base import model_config
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.world.vocabulary import make_tokenizer

Kind = Literal["sft", "policy"]


@dataclass(frozen=True)
class Step:
    """One compiled step of a stage: its learner, and the shape of its batch."""

    stage: str
    kind: Kind
    learner: Learner
    rows: int
    length: int

    @property
    def layout(self) -> tuple:
        """All that changes may differ in."""
        mesh = tuple(self.learner.mesh.shape.values())
        learner = self.learner
        return self.kind, learner.mesh.devices.size, mesh, self.rows, learner.micro_batches, learner.remat

    def lower(self) -> jax.stages.Lowered:
        lower = self.learner.lower_sft_step if self.kind == "sft" else self.learner.lower_policy_step
        return lower(self.rows, self.length)


def model_of(config: ConfigDict, name: str = "") -> ModelConfig:
    """The model that the config trains; `name`: of a published shape, for a path that is not downloaded.

    ValueError lists the shapes that are known.
    """
    path = Path(config.model.path)
    if name:
        if name not in SHAPES:
            raise ValueError(f"--model={name}: is not one of {', '.join(SHAPES)}")
        return SHAPES[name]
    if "base" in config.stages:
        return model_config(config, Tokenizer(make_tokenizer(setup.world(config))))
    if path.is_dir():
        return read_config(path)
    known = path.name.lower().removesuffix("-instruct")
    if known not in SHAPES:
        raise ValueError(f"config.model.path: {path} is no folder, and no shape is known by that name; "
                         f"give --model, one of {', '.join(SHAPES)}")  # fmt: skip
    return SHAPES[known]


def stages_of(config: ConfigDict) -> dict[Kind, str]:
    """The last stage of the config that fine-tunes, and the last that calibrates.  ValueError if none trains."""
    found: dict[Kind, str] = {}
    for stage in config.stages:
        if stage != "flywheel":
            found["policy" if "reward" in config[stage] else "sft"] = stage
    if not found:
        raise ValueError("the config has no stage that trains: give one such as configs/phase2.py")
    return found


def steps_of(config: ConfigDict, model: ModelConfig, devices: Sequence[jax.Device]) -> list[Step]:
    """One step of each kind.  ValueError if mesh, rows and model do not go together."""
    return [_step(config, kind, stage, model, devices) for kind, stage in stages_of(config).items()]


def _step(config: ConfigDict, kind: Kind, stage: str, model: ModelConfig, devices: Sequence[jax.Device]) -> Step:
    c = config[stage]
    mesh = make_mesh(**config.mesh, devices=devices)
    if kind == "policy":
        learner = calibrate.make_learner(config, stage, model, mesh)
    else:
        settings = {name: value for name, value in c.optimizer.items() if name != "warmup_ratio"}
        optimizer = OptimizerConfig(**{"total_steps": 1000, **settings})
        learner = setup.make_learner(config, stage, model, optimizer, mesh=mesh)
    return Step(stage, kind, learner, learner.whole_rows(setup.step_rows(c)), c.length)
