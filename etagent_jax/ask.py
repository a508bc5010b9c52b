"""Ask an agent one question and watch it think, call tools, read their results and answer.

    python -m etagent_jax.ask 'What is 37 times 46?'                        # the last stage of runs/quickstart
    python -m etagent_jax.ask 'What is 37 times 46?' --run=runs/quickstart/sft --temperature=1
    python -m etagent_jax.ask 'What is 37 times 46?' --url=http://localhost:30000 --model=DIR

The tiny model of the quickstart knows only the words of its built-in world: arithmetic, countries and
cities, as in the questions of its trajectories/.  With --url a server generates (etagent_jax.serve or
SGLang) and --model is needed for its tokenizer only; without a --run the agent then has python, and a
search over the built-in world.
"""

import argparse
import asyncio
import json
import os
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from etagent_jax.policy.interface import Completion, Policy, Sampling
    from etagent_jax.tokenizer import Tokenizer
    from etagent_jax.trajectory import Trajectory

QUICKSTART = Path("runs/quickstart")
MAX_CONTEXT = 4096
COLOURS = {
    "question": "default",
    "think": "bright_black",
    "result": "green",
    "answer": "bold bright_white",
    "text": "red",
}
CALL_COLOUR = "cyan"
WITHOUT_RUN = {
    "seed": 0,
    "questions": {"source": "world", "countries": 2000, "kind": ""},
    "system_prompt": "",  # made from the tools' descriptions
    "tools": {"search": {"corpus": "", "top_n": 3}, "python": {"timeout_seconds": 30.0}},
    "rollout": {"calls_per_tool": 6, "calls": 6, "seconds": 600.0},
}
"""The settings of a stage's config.json that an agent needs, for a model that belongs to no run."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m etagent_jax.ask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question")
    parser.add_argument(
        "--run", type=Path, help=f"a run, or one stage of it (default: {QUICKSTART}, unless there is a --model)"
    )
    parser.add_argument("--url", help="a server to generate with, instead of the run's own model")
    parser.add_argument("--api-key", help="what that server asks for")
    parser.add_argument("--model", type=Path, help="folder of model and tokenizer (default: the stage's)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    return parser.parse_args(arguments)


def find_stage(run: Path) -> Path:
    """The stage directory that `run` is, or the one in it that was finished last; FileNotFoundError without one."""
    if (run / "model").is_dir() and (run / "config.json").is_file():
        return run
    finished = [done for done in run.glob("*/DONE") if (done.parent / "model").is_dir()]
    if finished:
        return max(finished, key=lambda done: done.stat().st_mtime).parent
    raise FileNotFoundError(
        f"{run}: holds no finished stage with a model; "
        "run `bash launch/quickstart.sh` first, or give --run=… another run"
    )


class Watched:
    """A policy that shows what passes through it: what the program appended, then what was sampled."""

    def __init__(self, policy: "Policy", tokenizer: "Tokenizer", console: "Console"):
        self._policy, self._tokenizer, self._console = policy, tokenizer, console
        self._shown: int | None = None

    async def generate(self, token_ids: Sequence[int], sampling: "Sampling", session: str = "") -> "Completion":
        self._show(token_ids)
        completion = await self._policy.generate(token_ids, sampling, session)
        self._show((*token_ids, *completion.token_ids))
        return completion

    def show_rest(self, trajectory: "Trajectory") -> None:
        """Show what came after the last completion."""
        self._show(trajectory.token_ids)

    def _show(self, token_ids: Sequence[int]) -> None:
        if self._shown is not None:  # the first tokens to come by are the prompt
            show(self._tokenizer.decode(token_ids[self._shown :]), self._console)
        self._shown = len(token_ids)


def show(text: str, console: "Console") -> None:
    """Print the blocks of `text`, each with its tag before it; what stands outside blocks is `text`."""
    from rich.text import Text

    end = 0
    blocks: list[tuple[str, str]] = []
    for match in re.finditer(r"<(\w+)>(.*?)</\1>", text, re.DOTALL):
        blocks += [("text", text[end : match.start()]), (match.group(1), match.group(2))]
        end = match.end()
    for tag, body in [*blocks, ("text", text[end:])]:
        body = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", body).strip()
        if tag == "text" and not body:
            continue
        indented = body.replace("\n", "\n" + " " * 10)
        console.print(Text(f"{tag:>8}  ", "bold").append(indented, COLOURS.get(tag, CALL_COLOUR)), soft_wrap=True)


async def ask(options: argparse.Namespace) -> None:
    """Answer the question on the terminal."""
    from ml_collections import ConfigDict
    from rich.console import Console

    from etagent_jax.model import weights
    from etagent_jax.model.folder import read_config
    from etagent_jax.policy.engine import Engine
    from etagent_jax.policy.interface import Sampling
    from etagent_jax.policy.sglang import SGLangPolicy
    from etagent_jax.stages.setup import make_agent, make_tools
    from etagent_jax.tokenizer import Tokenizer
    from etagent_jax.trajectory import Question

    question = Question("ask", options.question, ("unknown",), "qa", "ask")
    Sampling(options.temperature, 1)
    if options.model and not options.run:
        folder, settings = options.model, WITHOUT_RUN
    else:
        stage = find_stage(options.run or QUICKSTART)
        folder, settings = options.model or stage / "model", json.loads((stage / "config.json").read_text())
    config = ConfigDict(settings)
    shape = read_config(folder)
    config.policy = {"context": min(shape.max_position, MAX_CONTEXT)}

    console = Console(highlight=False)
    tokenizer = Tokenizer.load(folder)
    tools = make_tools(config)
    policy: Engine | SGLangPolicy
    if options.url:
        policy = SGLangPolicy(options.url, api_key=options.api_key, vocab_size=shape.vocab_size)
    else:
        policy = Engine(weights.load(folder), tokenizer, slots=1, context=config.policy.context)
    try:
        watched = Watched(policy, tokenizer, console)
        agent = make_agent(config, watched, tokenizer, tools)
        show(f"<question>{options.question}</question>", console)
        trajectory = await agent.rollout(
            question, id="ask", seed=secrets.randbelow(2**31), temperature=options.temperature
        )
        watched.show_rest(trajectory)
        served = options.url or folder
        console.print(
            f"[dim]{served}: finish {trajectory.finish}, {len(trajectory.calls)} calls, "
            f"{trajectory.model_tokens} tokens, {trajectory.seconds:.1f} s[/dim]",
            soft_wrap=True,
        )
    finally:
        for tool in tools.values():
            await tool.close()
        if isinstance(policy, SGLangPolicy):
            await policy.close()
        else:
            policy.close()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        asyncio.run(ask(options))
    except (OSError, ValueError) as error:
        sys.exit(f"ask: {error}")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
