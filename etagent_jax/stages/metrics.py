"""What a long loop leaves and shows while it runs: metrics.jsonl, TensorBoard, lines, a bar, seconds per part."""

import contextlib
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from etagent_jax import distributed

FILE = "metrics.jsonl"


class MetricsLog:
    """The record of a loop of `total_steps` steps, counted from 0; use it as a context manager.

    In `folder`, made if need be: metrics.jsonl, a line for each logged step, and TensorBoard events.  On the
    screen: the lines on stdout, and on stderr, if that is a terminal, a bar with the rate and the time left.
    Of several processes only the first leaves and shows anything.

    start_step: the first step to be done now.  Lines of that and later steps, left by a run that was
    killed after its last checkpoint, are dropped, so that no step is there twice.
    """

    def __init__(self, folder: Path, *, total_steps: int, start_step: int, description: str) -> None:
        from tensorboardX import SummaryWriter  # slow to import, and needed only where something is trained

        if not 0 <= start_step <= total_steps:
            raise ValueError(f"{description}: start_step must be in 0..{total_steps}, got {start_step}")
        self._description, self._total_steps, self._next_step = description, total_steps, start_step
        self._writes = distributed.is_first()
        if not self._writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        if path.exists():
            _drop_steps_from(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder), purge_step=start_step)
        self._bar = tqdm(
            total=total_steps, initial=start_step, desc=description, unit="step", dynamic_ncols=True, disable=None
        )

    def log(self, step: int, metrics: Mapping[str, float], line: str | None) -> None:
        """Record `step`: on disk before this returns, `line` printed behind the step's number, the bar moved on.

        metrics: numbers on the host; turn device arrays into floats first.  A number that is not finite is
        written as null.  line: what a person should see of them, or None to print nothing.
        ValueError if `step` was logged before or lies outside the loop, or for a metric named step or time.
        """
        if not self._next_step <= step < self._total_steps:
            raise ValueError(
                f"{self._description}: logged step {step}, expected one in {self._next_step}..{self._total_steps - 1}"
            )
        if not metrics.keys().isdisjoint(("step", "time")):
            raise ValueError(
                f"{self._description}: a metric may not be named step or time; those two are recorded anyway"
            )
        before, self._next_step = self._next_step, step + 1
        if not self._writes:
            return
        values = {name: float(value) for name, value in metrics.items()}
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **row}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        if line is not None:
            width = len(str(self._total_steps))
            self._bar.write(f"{self._description} {step + 1:>{width}}/{self._total_steps}  {line}", file=sys.stdout)
            sys.stdout.flush()
        self._bar.update(step + 1 - before)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writes:
            self._bar.close()
            self._events.close()
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The logged steps of a metrics.jsonl, in order, each as {"step", "time" (Unix seconds), metric: number, …}.

    A number that was not finite is NaN.  A last line torn by a kill is left out.
    """
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in _read_lines(path)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ValueError(f"{path}, line {number}: not JSON ({error}); mend or remove the line") from error
    return lines


def _drop_steps_from(path: Path, start_step: int) -> None:
    """Rewrite `path` without lines of steps ≥ `start_step` and without a torn last line; all at once or not at all."""
    kept = [line for line in _read_lines(path) if line["step"] < start_step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def speed(metrics: Mapping[str, float]) -> str:
    """Tokens per second of the updates, and the model FLOPs utilisation where the device's peak is known."""
    utilisation = f", MFU {metrics['mfu']:.1%}" if "mfu" in metrics else ""
    return f"{metrics['tokens_per_second']:,.0f} tokens/s{utilisation}"


class Stopwatch:
    """Wall time per named part of a step: `with watch("rollout"): …`, any number of times, then `watch.pop()`.

    Work that JAX has only dispatched is not in the part that dispatched it, unless that part waits for it.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """Seconds since the last `pop`, as {"seconds/rollout": …}; starts anew."""
        seconds = {f"seconds/{part}": value for part, value in self._seconds.items()}
        self._seconds.clear()
        return seconds
