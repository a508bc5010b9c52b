"""From a config to the things a stage works with: questions, tools, policy, agent."""

import contextlib
import functools
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from etagent_jax import protocol
from etagent_jax.data.questions import load_questions
from etagent_jax.learner import mesh
from etagent_jax.model import weights
from etagent_jax.policy.engine import Engine
from etagent_jax.policy.interface import Policy
from etagent_jax.rollout.agent import Agent, Budget
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.tools.interface import Tool
from etagent_jax.tools.python import PythonTool
from etagent_jax.tools.search import LocalSearch
from etagent_jax.trajectory import Question
from etagent_jax.world import World

HINTS = (
    "Wait, let me reconsider the question.",
    "Wait, let me check this with python.",
    "Wait, let me search for what is missing.",
)
"""What the flywheel's hint operators say to a real model; the built-in world has sentences of its own."""


@functools.lru_cache(maxsize=4)
def world_of(seed: int, countries: int) -> World:
    return World.make(seed, countries)


def world(config: ConfigDict) -> World:
    """The built-in world of this run."""
    return world_of(config.seed, config.questions.countries)


def questions(config: ConfigDict, split: str, count: int, stage: str) -> list[Question]:
    """Questions for a stage: `count` of them, or all of a file where count is 0.

    Each stage makes its own draw from the world; of a file, it takes its own order.
    """
    if config.questions.source == "world":
        return world(config).questions(split, count, stage_seed(config.seed, stage))
    found = load_questions(config.questions[split], kind=config.questions.kind or None)
    if count > len(found):
        raise ValueError(f"{config.questions[split]}: holds {len(found)} questions, {stage} needs {count}")
    order = np_rng(config.seed, stage).permutation(len(found))
    return [found[i] for i in order[: count or None]]


def stage_seed(seed: int, stage: str) -> int:
    """A seed of its own for each stage, the same on every machine."""
    return int(np_rng(seed, stage).integers(2**31))


def np_rng(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator that depends on the run's seed and on these names alone."""
    return np.random.default_rng([seed, *"/".join(map(str, names)).encode()])


def check_shared(config: ConfigDict) -> None:
    """Raise one clear sentence for shared settings that cannot work, before anything expensive is done."""
    if config.policy.backend != "embedded":
        raise ValueError(
            f"config.policy.backend is {config.policy.backend!r}, but a run generates with the embedded engine so far: "
            "give --config.policy.backend=embedded"
        )
    if "base" not in config.stages and not Path(config.model.path).is_dir():
        raise FileNotFoundError(
            f"config.model.path: {config.model.path} is no folder; download the model and give --config.model.path=…"
        )
    longest = config.model.get("max_position", config.policy.context)
    for name, value, least, most in (
        ("policy.slots", config.policy.slots, 1, None),
        ("policy.chunk", config.policy.chunk, 1, config.policy.context),
        ("policy.context", config.policy.context, 2, longest),
        ("rollout.concurrency", config.rollout.concurrency, 1, None),
    ):
        if value < least or (most is not None and value > most):
            raise ValueError(f"config.{name} must be in {least}..{'' if most is None else most}, got {value}")
    budget(config)
    make_tools(config)


def make_tools(config: ConfigDict) -> dict[str, Tool]:
    """The tools by name.  Raises for an unknown one, and for a corpus that is missing or empty."""
    tools: dict[str, Tool] = {}
    for name, settings in config.tools.items():
        if name == "python":
            tools[name] = PythonTool(**settings)
        elif name == "search":
            rest = {key: value for key, value in settings.items() if key != "corpus"}
            if settings.corpus or config.questions.source != "world":
                tools[name] = LocalSearch.from_file(settings.corpus, **rest)
            else:
                tools[name] = LocalSearch(world(config).documents(), **rest)
        else:
            raise ValueError(f"config.tools: unknown tool {name!r}; there are python and search")
    return tools


def budget(config: ConfigDict, extra_calls: int = 0) -> Budget:
    return Budget(
        calls_per_tool=config.rollout.calls_per_tool + extra_calls,
        calls=config.rollout.calls + extra_calls,
        context=config.policy.context,
        seconds=config.rollout.seconds,
    )


def make_agent(
    config: ConfigDict, policy: Policy, tokenizer: Tokenizer, tools: Mapping[str, Tool], extra_calls: int = 0
) -> Agent:
    """The agent of this run; `extra_calls` widens its budget, as corrected continuations need."""
    system_prompt = config.system_prompt or protocol.system_prompt({t.name: t.description for t in tools.values()})
    return Agent(policy, tokenizer, tools, system_prompt, budget(config, extra_calls))


def parent_model(config: ConfigDict, stage: str) -> Path | str:
    """Folder of the model that `stage` starts from: the stage before it that trains one, else config.model.path."""
    trained = [name for name in config.stages[: config.stages.index(stage)] if name != "flywheel"]
    return Path(config.run) / trained[-1] / "model" if trained else config.model.path


@dataclass
class RolloutParts:
    """What rollouts need, open until the stage is over."""

    policy: Engine
    tokenizer: Tokenizer
    tools: dict[str, Tool]


@contextlib.asynccontextmanager
async def rollout_parts(config: ConfigDict, model: Path | str) -> AsyncIterator[RolloutParts]:
    """The policy that serves `model`, its tokenizer and the tools; all closed at the end."""
    tokenizer = Tokenizer.load(model)
    tools = make_tools(config)
    engine = Engine(
        weights.load(model), tokenizer, slots=config.policy.slots, context=config.policy.context,
        chunk=config.policy.chunk,
    )  # fmt: skip
    try:
        yield RolloutParts(engine, tokenizer, tools)
    finally:
        engine.close()
        for tool in tools.values():
            await tool.close()


def make_mesh(config: ConfigDict) -> Mesh:
    return mesh.make_mesh(**config.mesh)
