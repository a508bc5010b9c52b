"""Stage `sft`: fine-tune on the flywheel's trajectories; tool results bear no loss.

    python -m etagent_jax.train --config=configs/sft.py

About 10 seconds on two cores with the tiny preset.
"""

from ml_collections import ConfigDict

from configs import flywheel
from configs.shared import choose


def get_config(preset: str = "tiny") -> ConfigDict:
    config = flywheel.get_config(preset)
    config.stages += ("sft",)
    config.sft = choose(
        preset,
        tiny={
            "epochs": 2, "rows": 8, "length": 256, "micro_batches": 4, "checkpoint_every": 50,
            "optimizer": {"name": "adamw", "learning_rate": 1e-4, "schedule": "cosine", "warmup_ratio": 0.1},
        },
        qwen={
            "epochs": 3, "rows": 32, "length": 10_000, "micro_batches": -1, "checkpoint_every": 50,
            "optimizer": {"name": "adamw", "learning_rate": 5e-6, "schedule": "cosine", "warmup_ratio": 0.1,
                          "weight_decay": 0.0},
        },
    )  # fmt: skip
    return config
