"""ET-Agent's own recipe: three rounds of {sample → Pareto selection → GRPO}, no phases.

    python -m etagent_jax.train --config=configs/paper.py                  # its shape on the tiny world
    python -m etagent_jax.train --config=configs/paper.py:qwen2.5-7b       # its numbers (arXiv 2601.06860)

Each round selects 8,000 of 20,000 questions by the variance of calls and of correctness over 8
samples, then trains 3 epochs of 64 questions × 16 rollouts with σ_tool 0.2 and σ_len 0.5, which
decay over the round; each starts from the last one's weights.
"""

from ml_collections import ConfigDict

from configs import phase2, sft


def get_config(preset: str = "tiny") -> ConfigDict:
    calibration = phase2.get_config(preset).phase2
    config = sft.get_config(preset)
    config.run = "runs/paper" if preset == "tiny" else "runs/paper-qwen2.5-7b"
    config.stages += ("rounds",)
    config.rounds = calibration
    config.rounds.update({"rounds": 3, "steps": 5 if preset == "tiny" else 375})
    config.rounds.branching.initial = 4 if preset == "tiny" else 8
    config.rounds.reward.update({"variant": "paper", "sigma_tool": 0.2, "sigma_length": 0.5, "decay": True})
    return config
