"""A run: its stages one after the other, each once, checked before any of them starts."""

import time
from pathlib import Path

from ml_collections import ConfigDict

from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.stages import base, calibrate, flywheel, setup, sft
from etagent_jax.stages.directory import StageDirectory


def validate(config: ConfigDict) -> None:
    """Raise one clear sentence for settings that cannot work, before anything expensive is done."""
    if not config.stages:
        raise ValueError("the config has no stage to run")
    for stage in config.stages:
        StageDirectory(config, stage).check()
    for name in config.tools:
        if name not in ("python", "search"):
            raise ValueError(f"config.tools: unknown tool {name!r}; there are python and search")
    if "base" in config.stages:
        OptimizerConfig(**config.base.optimizer)
    elif not Path(config.model.path).is_dir():
        raise FileNotFoundError(
            f"config.model.path: {config.model.path} is no folder; download the model and give --config.model.path=…"
        )
    if config.policy.backend != "embedded":
        raise ValueError(
            f"config.policy.backend is {config.policy.backend!r}: training generates with 'embedded' so far"
        )
    for stage in config.stages:
        if "reward" in config[stage]:
            calibrate.policy_loss_config(config[stage])
            calibrate.optimizer_config(config[stage])
            calibrate.reward_config(config[stage], 0)
    if "flywheel" in config.stages:
        flywheel.flywheel_config(config)
    setup.budget(config)
    if config.questions.source != "world":
        for stage, count in ((s, config[s].get("questions", 0)) for s in config.stages):
            setup.questions(config, "train", count, stage)


async def run_chain(config: ConfigDict) -> None:
    """Run every stage of the config that is not finished yet."""
    validate(config)
    for stage in config.stages:
        directory = StageDirectory(config, stage)
        if directory.done:
            print(f"{stage}: done before, in {directory.path}", flush=True)
            continue
        print(f"{stage}: starts, in {directory.path}", flush=True)
        directory.open()
        began = time.perf_counter()
        cpu_began = time.process_time()
        summary = await run_stage(config, stage, directory)
        seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu_began}
        directory.finish({**summary, **seconds})
        print(f"{stage}: done in {seconds['seconds']:.0f} s", flush=True)


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
