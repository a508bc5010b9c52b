"""Stage `phase2`: calibration that narrows to the best behaviour: the full efficiency reward, decaying.

    python -m etagent_jax.train --config=configs/phase2.py                 # the whole chain, tiny: 8 minutes
    python -m etagent_jax.train --config=configs/phase2.py:qwen2.5-7b      # the published numbers

Stages that are finished are not run again; missing ones are run first.
"""

from ml_collections import ConfigDict

from configs import phase1
from configs.shared import choose


def get_config(preset: str = "tiny") -> ConfigDict:
    config = phase1.get_config(preset)
    config.stages += ("phase2",)
    config.phase2 = config.phase1.copy_and_resolve_references()
    config.phase2.branching.initial = 0
    config.phase2.update(
        choose(
            preset,
            tiny={
                "steps": 10,
                "reward": {"variant": "sign_preserving", "sigma_tool": 1.5, "sigma_length": 0.7, "decay": True},
                "optimizer": {"name": "muon", "learning_rate": 3e-4},
            },
            qwen={"reward": {"variant": "paper", "sigma_tool": 0.2, "sigma_length": 0.5, "decay": True}},
        )
    )
    return config
