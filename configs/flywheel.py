"""Stage `flywheel`: grow each question's pool of trajectories by six operators, in rounds.

    python -m etagent_jax.train --config=configs/flywheel.py

About 15 seconds on two cores with the tiny preset.  Its result is fine-tuning data that is
correct, short, and more varied in how it uses tools than what the model does by itself.
"""

from ml_collections import ConfigDict

from configs import base
from configs.shared import choose


def get_config(preset: str = "tiny") -> ConfigDict:
    config = base.get_config(preset)
    config.stages += ("flywheel",)
    config.flywheel = choose(
        preset,
        tiny={"questions": 128, "initial": 3, "rounds": 3, "seconds": 900.0, "temperature": 1.0, "per_question": 2,
              "extra_calls": 2},
        qwen={"questions": 20_000, "initial": 1, "rounds": 3, "seconds": 1800.0, "temperature": 1.0,
              "per_question": 2, "extra_calls": 4},
    )  # fmt: skip
    return config
