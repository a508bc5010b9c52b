"""Evaluation: every stage's model on untouched test questions, greedy and sampled, with the report.

    python -m etagent_jax.evaluate --config=configs/evaluate.py

About two minutes on two cores with the tiny preset.  Writes report/calibration.{json,md,png}.
"""

from ml_collections import ConfigDict

from configs import phase2
from configs.shared import choose


def get_config(preset: str = "tiny") -> ConfigDict:
    config = phase2.get_config(preset)
    config.evaluate = choose(
        preset,
        tiny={"split": "test", "stages": ("base", "sft", "phase1", "phase2"), "questions": 480, "samples": 4,
              "temperature": 1.0, "top_p": 1.0},
        qwen={"split": "test", "stages": ("sft", "phase1", "phase2"), "questions": 0, "samples": 8,
              "temperature": 0.6, "top_p": 0.95},
    )  # fmt: skip
    return config
