"""From a config to the things a stage works with: questions, tools, policy, agent."""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

import etagent_jax
from etagent_jax import distributed, protocol
from etagent_jax.data.questions import load_questions
from etagent_jax.learner import mesh as meshes
from etagent_jax.learner import trainable
from etagent_jax.learner.checkpoint import Checkpoints
from etagent_jax.learner.losses import PolicyLossConfig
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.learner.step import Learner, Params, TrainState
from etagent_jax.learner.sync import serve_folder
from etagent_jax.model import weights
from etagent_jax.model.folder import read_config
from etagent_jax.model.lora import Lora
from etagent_jax.model.transformer import ModelConfig
from etagent_jax.policy.engine import Engine
from etagent_jax.policy.interface import Policy
from etagent_jax.policy.sglang import SGLangPolicy
from etagent_jax.rollout.agent import Agent, Budget
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.tools.interface import Tool
from etagent_jax.tools.python import PythonTool
from etagent_jax.tools.search import LocalSearch
from etagent_jax.trajectory import Question
from etagent_jax.world import World


class WrongSettings(ValueError):
    """Settings that will be as wrong at the next start: a supervisor need not try them again."""


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
    if config.policy.backend not in ("embedded", "sglang"):
        raise ValueError(f"config.policy.backend must be embedded or sglang, got {config.policy.backend!r}")
    if config.policy.backend == "sglang" and not config.policy.url:
        raise ValueError("config.policy.url is empty: give the address of the SGLang server, or of several with commas "
                         "between them, or --config.policy.backend=embedded")  # fmt: skip
    if config.policy.colocated and config.policy.backend != "sglang":
        raise ValueError("config.policy.colocated is for SGLang servers: give --config.policy.backend=sglang as well")
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

    policy: Engine | SGLangPolicy
    tokenizer: Tokenizer
    tools: dict[str, Tool]


@contextlib.asynccontextmanager
async def rollout_parts(config: ConfigDict, model: Path | str) -> AsyncIterator[RolloutParts]:
    """The policy that serves `model`, its tokenizer and the tools; all closed at the end."""
    tokenizer = Tokenizer.load(model)
    async with contextlib.AsyncExitStack() as opened:
        tools = make_tools(config)
        for tool in tools.values():
            opened.push_async_callback(_close, tool)
        if config.policy.backend == "sglang":
            policy = make_client(config, model)
            opened.push_async_callback(_close, policy)
            await distributed.together(check_servers(config, policy, tokenizer, model))
            await distributed.together(distributed.undisturbed(serve_folder(policy, 0, Path(model).absolute())))
            yield RolloutParts(policy, tokenizer, tools)
        else:
            engine = Engine(
                weights.load(model), tokenizer, slots=config.policy.slots, context=config.policy.context,
                chunk=config.policy.chunk,
            )  # fmt: skip
            opened.callback(engine.close)
            yield RolloutParts(engine, tokenizer, tools)


async def _close(tool: Tool | SGLangPolicy) -> None:
    """A signal meanwhile is heard afterwards: all processes must end the stage alike."""
    await distributed.undisturbed(tool.close())


def make_client(config: ConfigDict, model: Path | str) -> SGLangPolicy:
    """A client of the config's servers, for a `model` folder's vocabulary.  The key is that of SGLANG_API_KEY.
    All processes call it."""
    p, life = config.policy, distributed.from_first(time.time_ns() // 10**8)
    return SGLangPolicy(
        p.url.split(","), api_key=os.environ.get("SGLANG_API_KEY"), vocab_size=read_config(model).vocab_size,
        timeout=p.timeout, patience=p.patience, concurrency=config.rollout.concurrency, life=life,
    )  # fmt: skip


async def check_servers(config: ConfigDict, client: SGLangPolicy, tokenizer: Tokenizer, model: Path | str) -> None:
    """Wait for the servers; SGLangError if one does not come, or serves another kind of model or tokenizer."""
    await client.wait_until_ready(config.policy.patience, distributed.say)
    await client.check(tokenizer, model)
    if (shortest := client.shortest_context) < config.policy.context:
        distributed.say(
            f"a server takes {shortest} tokens, fewer than config.policy.context {config.policy.context}: "
            "longer trajectories end as `length`; start it with a larger --context-length"
        )


def make_mesh(config: ConfigDict) -> Mesh:
    return meshes.make_mesh(**config.mesh)


def make_learner(
    config: ConfigDict, stage: str, model: ModelConfig, optimizer: OptimizerConfig,
    policy: PolicyLossConfig | None = None, mesh: Mesh | None = None,
) -> Learner:  # fmt: skip
    """The learner of a stage, on the config's mesh unless another is given.

    ValueError for what cannot work, from shapes alone: nothing is allocated yet.  LoRA and frozen parameters are for
    a model that is there already, so `base` has neither.
    """
    section, adapts = config[stage], stage != "base"
    mesh = make_mesh(config) if mesh is None else mesh
    try:
        learner = Learner(
            model, optimizer, policy=policy, mesh=mesh, micro_batches=micro_batches(section, mesh),
            remat=config.remat, attention=config.attention,
            lora=Lora(**config.lora) if adapts and config.lora.rank else None, frozen=config.frozen if adapts else (),
        )  # fmt: skip
        if "rows" in section:
            meshes.check_rows(section.rows, learner.micro_batches, mesh)
    except ValueError as error:
        raise ValueError(f"{stage}: {error}") from error
    return learner


def resume(
    checkpoints: Checkpoints, learner: Learner, initial: Callable[[], TrainState]
) -> tuple[int, TrainState, dict[str, Any]]:
    """Steps done, the state to go on from, and what was saved with it: of the newest checkpoint, else the initial one.

    Checkpoints hold `learner.changing`; what does not learn comes from `initial` again.
    """
    latest = checkpoints.latest()
    if latest is None:
        return 0, initial(), {}
    abstract = learner.changing(learner.abstract_state)
    began = _still(learner, learner.abstract_state)
    if began.params:
        began = _still(learner, initial())
    changing, extra = checkpoints.restore(latest, abstract)
    return latest, learner.resumed(changing, began), extra


def _still(learner: Learner, state: TrainState) -> TrainState:
    """Of a state only the parameters that do not learn, so that the memory of the others is free."""
    return replace(state, params=trainable.split(state.params, learner.learns)[1], opt_state=None)


def save_model(learner: Learner, params: Params, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face folder of a trained model.  All processes call it, each writes its share."""
    weights.save(learner.serving_params(params), learner.config, folder, tokenizer.eos_ids, tokenizer.pad_id)
    if distributed.is_first():
        tokenizer.save(folder)


def step_rows(section: ConfigDict) -> int:
    """Rows that an update of a stage needs: its own `rows`, or one for each trajectory of a minibatch, at worst."""
    if "rows" in section:
        return section.rows
    return -(-section.questions_per_step // section.minibatches) * section.samples


def micro_batches(section: ConfigDict, mesh: Mesh) -> int:
    """The micro-batches of a stage's update; for -1 as many as leave a device one row at a time."""
    if section.micro_batches != -1:
        return section.micro_batches
    return -(-step_rows(section) // (mesh.shape["data"] * mesh.shape["fsdp"]))


def check_processes(config: ConfigDict) -> None:
    """ValueError, on every process, unless all have the same config, code and run directory."""
    settings = {f"config.{name}": value for name, value in flatten(config.to_dict()).items() if name != "run"}
    code = hashlib.sha256()
    for file in sorted(Path(etagent_jax.__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    distributed.check_same({**settings, "the code": code.hexdigest()[:12], "jax": jax.__version__})
    distributed.check_same_directory(Path(config.run))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their names joined with dots."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for key, value in tree.items() for k, v in flatten(value, f"{prefix}.{key}" if prefix else key).items()
    }
