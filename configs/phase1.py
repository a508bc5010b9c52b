"""Stage `phase1`: calibration that widens and secures: correctness and format first, light efficiency terms.

    python -m etagent_jax.train --config=configs/phase1.py

About 40 seconds on two cores with the tiny preset.
"""

from ml_collections import ConfigDict

from configs import sft
from configs.shared import choose


def get_config(preset: str = "tiny") -> ConfigDict:
    config = sft.get_config(preset)
    config.stages += ("phase1",)
    config.phase1 = choose(
        preset,
        tiny={
            "rounds": 1, "steps": 4,
            "selection": {"questions": 256, "samples": 4, "select": 128},
            "questions_per_step": 16, "samples": 8, "temperature": 1.0, "tool_free": 0, "drop_void": False,
            "stream": {"max_staleness": 0, "spare": 0, "replacements": 0},
            "branching": {"initial": 0, "probability": 0.5, "weight": 0.2, "window": 20},
            "epochs": 2, "minibatches": 2, "micro_batches": 8, "length": 256, "checkpoint_every": 1,
            "reward": {"variant": "sign_preserving", "sigma_tool": 0.1, "sigma_length": 0.05, "decay": False},
            "loss": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "max_weight": 2.0,
                     "max_sequence_weight": 0.0, "kl_coefficient": 0.03},
            "optimizer": {"name": "muon", "learning_rate": 1e-4},
        },
        qwen={
            "rounds": 1, "steps": 375,
            "selection": {"questions": 20_000, "samples": 8, "select": 8_000},
            "questions_per_step": 64, "samples": 16, "temperature": 1.0, "tool_free": 0, "drop_void": False,
            "stream": {"max_staleness": 0, "spare": 0, "replacements": 0},
            "branching": {"initial": 8, "probability": 0.5, "weight": 0.2, "window": 20},
            "epochs": 1, "minibatches": 16, "micro_batches": -1, "length": 6096, "checkpoint_every": 10,
            "reward": {"variant": "paper", "sigma_tool": 0.1, "sigma_length": 0.05, "decay": False},
            "loss": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "max_weight": 2.0,
                     "max_sequence_weight": 0.0, "kl_coefficient": 0.0},
            "optimizer": {"name": "adamw", "learning_rate": 1e-6},
        },
    )  # fmt: skip
    return config
