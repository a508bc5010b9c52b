"""Stage `base`: the tiny model, pre-trained from nothing on demonstrations of the built-in world."""

from collections.abc import Callable

from ml_collections import ConfigDict

from etagent_jax.data.packing import Batch, pack, sequence_from_trajectory
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.model.transformer import ModelConfig
from etagent_jax.stages import setup, supervised
from etagent_jax.stages.directory import StageDirectory
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.world.demonstrations import demonstrations, to_trajectory
from etagent_jax.world.vocabulary import make_tokenizer


def model_config(config: ConfigDict, tokenizer: Tokenizer) -> ModelConfig:
    """The tiny model's shape; the embedding is rounded up to a multiple of 64 rows."""
    shape = {key: value for key, value in config.model.items() if key != "path"}
    return ModelConfig(vocab_size=-(-tokenizer.vocab_size // 64) * 64, **shape)


def packed_demonstrations(config: ConfigDict, tokenizer: Tokenizer, flawed: bool) -> Batch:
    world, c = setup.world(config), config.base
    seed = setup.stage_seed(config.seed, "base")
    scripted = demonstrations(world, "train", c.demonstrations, seed, flawed)
    trajectories = (to_trajectory(d, tokenizer, config.system_prompt, f"{flawed}/{i}") for i, d in enumerate(scripted))
    return pack((sequence_from_trajectory(t, sources=("reviser",)) for t in trajectories), c.length, multiple=c.rows)


def curriculum(config: ConfigDict, tokenizer: Tokenizer) -> Callable[[int], Batch]:
    """Step → batch: clean demonstrations first, then the flawed mix."""
    c = config.base
    clean_steps = int(c.clean_fraction * c.optimizer.total_steps)
    clean, flawed = (
        supervised.epochs_of_rows(packed_demonstrations(config, tokenizer, is_flawed), c.rows, config.seed)
        for is_flawed in (False, True)
    )
    return lambda step: clean(step) if step < clean_steps else flawed(step - clean_steps)


async def run(config: ConfigDict, directory: StageDirectory) -> dict[str, float]:
    c = config.base
    tokenizer = Tokenizer(make_tokenizer(setup.world(config)))
    learner = setup.make_learner(config, "base", model_config(config, tokenizer), OptimizerConfig(**c.optimizer))
    metrics = await supervised.train(
        directory, learner, lambda: learner.init_state(config.seed), curriculum(config, tokenizer),
        c.optimizer.total_steps, tokenizer, c.checkpoint_every, "base",
    )  # fmt: skip
    return {"steps": c.optimizer.total_steps, "loss": metrics["loss"], "accuracy": metrics["accuracy"]}
