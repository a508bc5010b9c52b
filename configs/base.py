"""Stage `base`: pre-train the tiny model from nothing on scripted, flawed demonstrations.

    python -m etagent_jax.train --config=configs/base.py

About 5 minutes on two cores.  The result answers roughly a quarter of the questions, wastes calls
where none is needed and stops short where more are: the behaviour that the later stages calibrate.
A real model brings its own pre-training, so other presets have no such stage.
"""

from ml_collections import ConfigDict

from configs import shared


def get_config(preset: str = "tiny") -> ConfigDict:
    config = shared.get_config(preset)
    if preset != "tiny":
        return config
    config.stages += ("base",)
    config.base = {
        "demonstrations": 8000,  # of each sort, clean and flawed
        "clean_fraction": 0.45,  # of the steps, first, on clean demonstrations
        "rows": 8,
        "micro_batches": 4,
        "length": 256,
        "checkpoint_every": 250,
        "optimizer": {
            "name": "muon", "learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 30, "total_steps": 1500,
            "end_fraction": 0.1, "weight_decay": 0.01, "b2": 0.95,
        },
    }  # fmt: skip
    return config
