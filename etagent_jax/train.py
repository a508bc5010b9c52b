"""Train: run the stages of a config, those that are missing first.

    python -m etagent_jax.train --config=configs/phase2.py[:preset] [--config.FIELD=VALUE …]

Presets: tiny (the default: the built-in offline world, from nothing, on a laptop) and qwen2.5-7b.
Stages, each with its file in configs/: base → flywheel → sft → phase1 → phase2; paper.py holds
ET-Agent's own three rounds.  Fields go by dots: --config.seed=5 --config.run=runs/mine
--config.phase2.steps=20.  A finished stage is not run again; Ctrl-C or SIGTERM stops a run at a
checkpoint, and the same command resumes it.

On several hosts the same command is started on each; see --coordinator where they do not find one another, and
docs/clusters.md.
"""

from absl import flags
from ml_collections import ConfigDict

from etagent_jax import command

flags.adopt_module_key_flags(command)


async def main(config: ConfigDict) -> None:
    from etagent_jax.stages.chain import run_chain

    await run_chain(config)


if __name__ == "__main__":
    command.run(main)
