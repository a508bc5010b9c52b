"""Evaluate: every stage's model on untouched test questions, greedy and sampled, and the report.

    python -m etagent_jax.evaluate --config=configs/evaluate.py[:preset] [--config.FIELD=VALUE …]

Prints a table and writes <run>/report/calibration.{json,md,png}.  Trajectories already sampled are
not sampled again.
"""

from absl import flags
from ml_collections import ConfigDict

from etagent_jax import command

flags.adopt_module_key_flags(command)


async def main(config: ConfigDict) -> None:
    from etagent_jax import distributed
    from etagent_jax.stages import evaluate

    report = await evaluate.run(config)
    distributed.say(f"report: {report / 'calibration.md'}")


if __name__ == "__main__":
    command.run(main)
