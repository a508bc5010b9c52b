"""A run: its stages one after the other, each once, checked before any of them starts."""

import time
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from etagent_jax import distributed, protocol
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.model.folder import check_vocabulary, read_config
from etagent_jax.model.transformer import ModelConfig
from etagent_jax.stages import base, calibrate, flywheel, setup, sft
from etagent_jax.stages.directory import StageDirectory
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.world.vocabulary import make_tokenizer


def validate(config: ConfigDict) -> None:
    """Raise one clear sentence for settings that cannot work, before anything expensive is done."""
    if not config.stages:
        raise ValueError("the config has no stage to run")
    for stage in config.stages:
        StageDirectory(config, stage).check()
    setup.check_shared(config)
    model = first_model(config)
    for stage in config.stages:
        if StageDirectory(config, stage).done:
            continue
        section = config[stage]
        if stage == "flywheel":
            flywheel.check(section)
        elif "reward" in section:
            calibrate.check(config, stage)
            calibrate.make_learner(config, stage, model)
        else:
            optimizer = section.optimizer.to_dict()
            optimizer.pop("warmup_ratio", None)
            setup.make_learner(config, stage, model, OptimizerConfig(**{"total_steps": 1, **optimizer}))
        for count in (section.get("questions", 0), section.get("selection", {}).get("questions", 0)):
            if count:
                setup.questions(config, "train", count, stage)


def first_model(config: ConfigDict) -> ModelConfig:
    """The shape of the model that the chain starts from; all its stages share it.

    ValueError if the folder of that model does not fit its tokenizer or the config, or the tokenizer not our tags.
    """
    if "base" in config.stages:
        return base.model_config(config, Tokenizer(make_tokenizer(setup.world(config))))
    folder = config.model.path
    model = read_config(folder)
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(model, tokenizer.vocab_size, folder)
    tokenizer.check_writes(protocol.tags(config.tools))
    if config.policy.context > model.max_position:
        raise ValueError(
            f"config.policy.context is {config.policy.context}, but {folder} has {model.max_position} positions"
        )
    return model


async def run_chain(config: ConfigDict) -> None:
    """Run every stage of the config that is not finished yet."""
    setup.check_processes(config)
    try:
        validate(config)
    except (ValueError, FileNotFoundError) as error:
        raise setup.WrongSettings(str(error)) from error
    await check_servers(config)
    for stage in config.stages:
        directory = StageDirectory(config, stage)
        if distributed.from_first(directory.done):
            distributed.say(f"{stage}: done before, in {directory.path}")
            continue
        distributed.say(f"{stage}: starts, in {directory.path}")
        with directory.opened():
            began, cpu_began = time.perf_counter(), time.process_time()
            summary = await run_stage(config, stage, directory)
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
            directory.finish({**summary, "seconds": seconds, "cpu_seconds": cpu_seconds})
    if distributed.is_first():
        print_stages(config)


async def check_servers(config: ConfigDict) -> None:
    """Raise one clear sentence if servers that the run needs are not there; where the tiny model is not made yet, no
    server can serve it, and they are waited for when the first stage needs them."""
    model = Path(config.model.path) if "base" not in config.stages else StageDirectory(config, "base").model
    served = config.policy.backend == "sglang" and (model / "config.json").is_file()
    sampling = [stage for stage in config.stages if stage not in ("base", "sft")]
    if served and any(not StageDirectory(config, stage).done for stage in sampling):
        async with setup.make_client(config, model) as client:
            await distributed.together(setup.check_servers(config, client, Tokenizer.load(model), model))


async def run_stage(config: ConfigDict, stage: str, directory: StageDirectory) -> dict[str, float]:
    match stage:
        case "base":
            return await base.run(config, directory)
        case "flywheel":
            return await flywheel.run(config, directory)
        case "sft":
            return await sft.run(config, directory)
        case _:
            return await calibrate.run(config, directory, stage)


def print_stages(config: ConfigDict) -> None:
    """A table of the stages: how long each took, what it says of itself."""
    table = Table(title=f"Stages of {Path(config.run)}")
    for column in ("stage", "wall s", "CPU s", "what it did"):
        table.add_column(column, justify="left" if column in ("stage", "what it did") else "right")
    for stage in config.stages:
        summary = StageDirectory(config, stage).summary()
        told = ", ".join(
            f"{name} {value:,.3g}" if isinstance(value, float) else f"{name} {value:,}"
            for name, value in summary.items()
            if "seconds" not in name and "/" not in name
        )
        table.add_row(stage, f"{summary['seconds']:.0f}", f"{summary['cpu_seconds']:.0f}", told)
    Console().print(table)
