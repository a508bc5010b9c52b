"""Which trajectories of the flywheel's pools become fine-tuning data.

Wanted: correct ones worth imitating, both short and different from one another in how they use
tools.  Everything the model or the reviser wrote in a chosen trajectory is trained on, so:

- a trajectory whose thinking was *reopened* by a hint is never chosen: what stands before the hint
  is the mistake that the hint repaired.  (A global refinement of it, which has neither, may be.)
- one that was *hinted* at the start of a step holds no mistake, and the hint is masked; but it
  shows what the model does when told to, so it is chosen only for questions that have nothing else.
"""

import itertools
from collections.abc import Callable, Iterable

from etagent_jax.flywheel.rounds import IsCorrect, Pool, Score
from etagent_jax.trajectory import Trajectory

_ASSISTANT = ("model", "reviser")


def hinted(trajectory: Trajectory) -> bool:
    """True if the model went on after words that the program put in its mouth."""
    return any(
        before.source == "program" and after.source in _ASSISTANT
        for before, after in itertools.pairwise(trajectory.segments)
    )


def reopened(trajectory: Trajectory) -> bool:
    """True if the program broke into what the model was writing, and the model went on after it."""
    triples = zip(trajectory.segments, trajectory.segments[1:], trajectory.segments[2:], strict=False)
    return any(
        before.source in _ASSISTANT and inserted.source == "program" and after.source in _ASSISTANT
        for before, inserted, after in triples
    )


def select_for_sft(
    pools: Iterable[Pool],
    score: Score,
    is_correct: IsCorrect,
    pattern: Callable[[Trajectory], str],
    per_question: int,
) -> list[Trajectory]:
    """At most `per_question` trajectories of each question, each with another tool-use pattern.

    pattern: the signature of how a trajectory uses tools; equal texts have equal signatures, so no
    text is chosen twice.  Only answered, correct, validly formatted ones without a failed call
    qualify.  First comes the one with the fewest calls (then the fewest tokens), then the best of
    every other pattern in the same order.
    """
    if per_question < 1:
        raise ValueError(f"per_question must be at least 1, got {per_question}")
    chosen: list[Trajectory] = []
    for pool in pools:
        good = [
            t
            for t in pool.trajectories
            if t.finish == "answer"
            and t.format_error is None
            and not any(call.result.failed for call in t.calls)
            and not reopened(t)
            and is_correct(pool.question, score(t))
        ]
        candidates = [t for t in good if not hinted(t)] or good
        best: dict[str, Trajectory] = {}
        for trajectory in sorted(candidates, key=lambda t: (len(t.calls), t.model_tokens, t.id)):
            best.setdefault(pattern(trajectory), trajectory)
        chosen += itertools.islice(best.values(), per_question)
    return chosen
