"""Stage `sft`: fine-tune on what the flywheel selected, the paper's action space exploration."""

import math

from ml_collections import ConfigDict

from etagent_jax.data.packing import pack, sequence_from_trajectory
from etagent_jax.data.store import TrajectoryLog
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.model.folder import read_config
from etagent_jax.stages import setup, supervised
from etagent_jax.stages.directory import StageDirectory
from etagent_jax.tokenizer import Tokenizer


async def run(config: ConfigDict, directory: StageDirectory) -> dict[str, float]:
    c = config.sft
    parent = setup.parent_model(config, "sft")
    tokenizer = Tokenizer.load(parent)
    chosen = list(TrajectoryLog(StageDirectory(config, "flywheel").selected).read())
    sequences = [sequence_from_trajectory(t, sources=("model", "reviser")) for t in chosen]
    batch = pack(sequences, c.length, multiple=c.rows)
    steps = c.epochs * len(batch.tokens) // c.rows
    settings = c.optimizer.to_dict()
    warmup_ratio = settings.pop("warmup_ratio")
    optimizer = OptimizerConfig(**settings, total_steps=steps, warmup_steps=math.ceil(warmup_ratio * (steps - 1)))
    learner = setup.make_learner(config, "sft", read_config(parent), optimizer)
    metrics = await supervised.train(
        directory, learner, lambda: learner.load_state(parent), supervised.epochs_of_rows(batch, c.rows, config.seed),
        steps, tokenizer, c.checkpoint_every, "sft",
    )  # fmt: skip
    return {"trajectories": len(chosen), "steps": steps, "loss": metrics["loss"], "accuracy": metrics["accuracy"]}
