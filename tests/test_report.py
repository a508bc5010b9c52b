"""The report of the stages, its claims and pictures, and the record of a long loop."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from etagent_jax.report.calibration import StageResult, calibration, claims, console_table, markdown, write
from etagent_jax.report.plots import plot_calibration, plot_training
from etagent_jax.stages.metrics import MetricsLog, Stopwatch, read_metrics
from etagent_jax.trajectory import Question, Segment, ToolCall, ToolResult, Trajectory

MEASURES = {"correctness", "tool_calls", "efficiency", "format_valid", "successful_execution", "reasoning_tokens",
            "conciseness"}  # fmt: skip


def question(number: int, category: str) -> Question:
    return Question(f"{category}/{number}", "What is it?", ("a",), "qa", category)


def trajectory(of: Question, *, calls: int, tokens: int = 10, temperature: float = 0.0, number: int = 0) -> Trajectory:
    """So many clean calls, then an answer; `tokens` model tokens in all."""
    model = lambda text, n: Segment("model", (1,) * n, text, (0.0,) * n, (0,) * n)
    segments = []
    for i in range(calls):
        call = ToolCall("search", f"query {i}", ToolResult("x", "ok"))
        segments += [model(f"<think>so</think><search>query {i}</search>", 1)]
        segments += [Segment("tool", (2, 3), "<result>x</result>", call=call)]
    segments += [model("<think>so</think><answer>\\boxed{a}</answer>", tokens - calls)]
    name = f"{of.id}/{temperature}/{number}"
    return Trajectory(name, of, (1,), tuple(segments), "answer", 0, temperature, ("search",))


def stage(*, correct: int, calls: int, calls_on_given: int, tokens: int, patterns: int = 1) -> StageResult:
    """100 questions, half of them *given*, once greedily, twice sampled.

    The first `correct` of each half are right; with `patterns` 2, the second sample makes one call more.
    """
    greedy, sampled = [], []
    for category, usual in (("given", calls_on_given), ("one_hop", calls)):
        for i in range(50):
            of, right = question(i, category), float(i < correct)
            greedy.append((trajectory(of, calls=usual, tokens=tokens), right))
            for number in range(2):
                more = number * (patterns - 1)
                made = trajectory(of, calls=usual + more, tokens=tokens, temperature=1.0, number=number)
                sampled.append((made, right))
    return StageResult(greedy, sampled)


def good_run() -> dict[str, StageResult]:
    return {
        "base": stage(correct=10, calls=2, calls_on_given=2, tokens=50),
        "sft": stage(correct=25, calls=2, calls_on_given=1, tokens=50, patterns=2),
        "phase1": stage(correct=40, calls=1, calls_on_given=0, tokens=40),
        "phase2": stage(correct=48, calls=1, calls_on_given=0, tokens=20),
    }


def test_shape_of_calibration_json(tmp_path: Path) -> None:
    write(calibration(good_run()), tmp_path)
    report = json.loads((tmp_path / "calibration.json").read_text())
    assert set(report) == {"stages"}
    assert list(report["stages"]) == ["base", "sft", "phase1", "phase2"]
    for made in report["stages"].values():
        assert set(made) == {"greedy", "sampled", "by_kind", "distinct_correct_patterns", "samples_per_question",
                             "given_with_calls"}  # fmt: skip
        assert set(made["by_kind"]) == {"given", "one_hop"}
        assert made["samples_per_question"] == 2
        all_and_kinds = [(made, 100), *((kind, 50) for kind in made["by_kind"].values())]
        for holder, questions in all_and_kinds:
            for sampling in ("greedy", "sampled"):
                measures = dict(holder[sampling])
                assert measures.pop("questions") == questions
                assert set(measures) == MEASURES
                for estimate in measures.values():
                    assert set(estimate) == {"mean", "ci95"}
                    low, high = estimate["ci95"]
                    assert low <= estimate["mean"] <= high


def test_numbers_by_hand() -> None:
    base = calibration(good_run())["stages"]["base"]
    # 20 of 100 right; 2 calls for each: efficiency 0.2 / 2.  s = √(0.2 · 0.8 · 100 / 99), interval ± 1.96 s / 10.
    assert base["greedy"]["correctness"]["mean"] == pytest.approx(0.2)
    half = 1.959964 * math.sqrt(0.16 * 100 / 99) / 10
    assert base["greedy"]["correctness"]["ci95"] == pytest.approx([0.2 - half, 0.2 + half], abs=1e-6)
    assert base["greedy"]["efficiency"]["mean"] == pytest.approx(0.1)
    assert base["sampled"]["reasoning_tokens"] == {"mean": 50, "ci95": [50, 50]}
    assert base["given_with_calls"]["greedy"]["mean"] == 1
    sft = calibration(good_run())["stages"]["sft"]
    assert sft["by_kind"]["one_hop"]["sampled"]["tool_calls"]["mean"] == pytest.approx(2.5)
    assert sft["distinct_correct_patterns"]["mean"] == pytest.approx(1.0)  # two for the half that is right
    phase2 = calibration(good_run())["stages"]["phase2"]
    assert phase2["by_kind"]["given"]["greedy"]["tool_calls"]["mean"] == 0
    assert phase2["given_with_calls"]["sampled"]["mean"] == 0


def test_open_interval_of_a_single_question_is_null(tmp_path: Path) -> None:
    of = question(0, "one_hop")
    result = StageResult([(trajectory(of, calls=1), 1.0)], [(trajectory(of, calls=1, temperature=1.0), 1.0)])
    report = calibration({"base": result, "sft": result})
    write(report, tmp_path)
    read = json.loads((tmp_path / "calibration.json").read_text())
    assert read["stages"]["base"]["greedy"]["tool_calls"] == {"mean": 1, "ci95": [0, None]}
    assert "given_with_calls" not in read["stages"]["base"]
    assert "1.00 ± –" in (tmp_path / "calibration.md").read_text()
    assert not any(claim.holds for claim in claims(read))
    plot_calibration(read, tmp_path / "calibration.png")


def test_claims_hold_for_a_good_run() -> None:
    found = claims(calibration(good_run()))
    assert len(found) == 10
    assert [claim.text for claim in found if not claim.holds] == []


@pytest.mark.parametrize(
    ("name", "made", "said"),
    [
        ("sft", stage(correct=12, calls=2, calls_on_given=1, tokens=50), "Greedy correctness rises from base to sft"),
        ("sft", stage(correct=10, calls=2, calls_on_given=1, tokens=50), "More distinct correct tool-use patterns"),
        ("phase2", stage(correct=26, calls=1, calls_on_given=0, tokens=20), "Greedy correctness rises from sft to"),
        ("phase2", stage(correct=48, calls=1, calls_on_given=1, tokens=20), "Needless calls on *given*"),
        ("base", stage(correct=10, calls=2, calls_on_given=0, tokens=50), "Needless calls on *given*"),
        ("phase2", stage(correct=48, calls=1, calls_on_given=0, tokens=31), "Sampled reasoning tokens at most ×0.6"),
        ("phase2", stage(correct=12, calls=2, calls_on_given=1, tokens=20), "Sampled efficiency at least ×2"),
        ("phase2", stage(correct=40, calls=1, calls_on_given=0, tokens=40), "phase2 does visible work"),
        ("phase2", stage(correct=20, calls=1, calls_on_given=0, tokens=10), "phase2 does visible work"),
    ],
)
def test_a_claim_that_fails_is_said_to_fail(name: str, made: StageResult, said: str) -> None:
    report = calibration({**good_run(), name: made})
    failed = [claim.text for claim in claims(report) if not claim.holds]
    assert any(text.startswith(said) for text in failed), failed
    assert f"**DOES NOT HOLD** — {said}" in markdown(report)
    screen = io.StringIO()
    console_table(report, Console(file=screen, width=200))
    assert f"not: {said}" in screen.getvalue()


def test_claims_about_absent_stages_are_left_out() -> None:
    run = good_run()
    assert claims(calibration({"sft": run["sft"]})) == []
    assert {claim.text.split()[0] for claim in claims(calibration({"sft": run["sft"], "phase1": run["phase1"]}))} == {
        "phase1"
    }


def test_console_table_fits_80_columns() -> None:
    screen = io.StringIO()
    console_table(calibration(good_run()), Console(file=screen, width=80))
    assert "…" not in screen.getvalue()
    assert "0.960 ± 0.039" in screen.getvalue()
    assert "10 of 10 things to see hold." in screen.getvalue()


def test_stages_that_cannot_be_compared_are_refused() -> None:
    run = good_run()
    with pytest.raises(ValueError, match="no stages"):
        calibration({})
    with pytest.raises(ValueError, match="stage sft: there are no sampled trajectories"):
        calibration({**run, "sft": StageResult(run["sft"].greedy, [])})
    with pytest.raises(ValueError, match=r"stage sft: trajectory .* is counted as greedy, but its temperature is 1\.0"):
        calibration({**run, "sft": StageResult(run["sft"].sampled, run["sft"].sampled)})
    with pytest.raises(
        ValueError, match=r"stage phase1 answered question one_hop/49 1 times \(sampled\), stage base 2"
    ):
        calibration({**run, "phase1": StageResult(run["phase1"].greedy, run["phase1"].sampled[:-1])})
    with pytest.raises(ValueError, match="different questions"):
        calibration({"base": StageResult(run["base"].greedy[:-1], run["base"].sampled)})


def colours(path: Path) -> int:
    picture = imread(path)
    assert picture.shape[0] > 300
    assert picture.shape[1] > 800
    return len(np.unique((picture[..., :3] * 255).astype(np.int64) @ [1, 256, 65536]))


def test_pictures_are_drawn(tmp_path: Path) -> None:
    plot_calibration(calibration(good_run()), tmp_path / "calibration.png")
    assert colours(tmp_path / "calibration.png") > 50
    steps = [{"step": i, "time": 0.0, "reward": i / 10, "entropy": math.nan if i == 2 else 0.3} for i in range(4)]
    plot_training({"phase1": steps, "phase2": steps}, tmp_path / "training.png")
    assert colours(tmp_path / "training.png") > 20
    with pytest.raises(ValueError, match="nothing to draw: no step of phase1 has one of reward"):
        plot_training({"phase1": [{"step": 0, "loss": 1.0}]}, tmp_path / "none.png")


def run_loop(folder: Path, start: int, end: int, value: float) -> None:
    with MetricsLog(folder, total_steps=12, start_step=start, description="phase1") as log:
        for step in range(start, end):
            log.log(step, {"reward": value, "seconds/rollout": 0.5}, f"reward {value}")


def test_metrics_are_on_disk_at_once_and_in_order(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(tmp_path / "sft", total_steps=12, start_step=0, description="sft") as log:
        log.log(0, {"loss": np.float32(0.5), "gap": math.inf}, "loss 0.500")
        raw = json.loads((tmp_path / "sft" / "metrics.jsonl").read_text())
        assert raw.pop("time") > 1e9
        assert raw == {"step": 0, "loss": 0.5, "gap": None}
        log.log(9, {"loss": 0.25}, None)
        for step in (9, 12, -1):
            with pytest.raises(ValueError, match=f"sft: logged step {step}, expected one in 10..11"):
                log.log(step, {}, None)
        with pytest.raises(ValueError, match="may not be named step or time"):
            log.log(10, {"time": 1.0}, None)
    first, second = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert math.isnan(first["gap"])
    assert (second["step"], second["loss"]) == (9, 0.25)
    printed = capfd.readouterr()
    assert printed.out == "sft  1/12  loss 0.500\n"
    assert "step/s" not in printed.err  # no bar where there is no terminal
    with pytest.raises(ValueError, match=r"sft: start_step must be in 0\.\.12, got 13"):
        MetricsLog(tmp_path / "sft", total_steps=12, start_step=13, description="sft")


def test_resume_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run_loop(tmp_path, 0, 8, value=1.0)
    with path.open("a") as file:
        file.write('{"step": 8, "time": 17, "rew')
    assert [row["step"] for row in read_metrics(path)] == list(range(8))
    run_loop(tmp_path, 5, 12, value=2.0)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["reward"] for row in rows] == [1.0] * 5 + [2.0] * 7
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "time": 1}\n{"step": 1,\n{"step": 2, "time": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        MetricsLog(tmp_path, total_steps=4, start_step=2, description="sft")
    assert path.read_text().count("\n") == 3


def test_tensorboard_events_hold_the_metrics(tmp_path: Path) -> None:
    run_loop(tmp_path, 0, 2, value=1.0)
    events = b"".join(path.read_bytes() for path in tmp_path.glob("events.out.tfevents.*"))
    assert b"reward" in events
    assert b"seconds/rollout" in events


def test_stopwatch_sums_parts_and_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 2.0, 3.0, 10.0, 10.5, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    with watch("rollout"):
        pass
    with watch("train"):
        pass
    with pytest.raises(KeyError), watch("rollout"):
        raise KeyError
    assert watch.pop() == {"seconds/rollout": 2.5, "seconds/train": 1.0}
    assert watch.pop() == {}
    with watch("train"):
        pass
    assert watch.pop() == {"seconds/train": 1.0}
