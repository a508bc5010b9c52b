"""Runs of the whole chain, killed and resumed, and what is refused before a run begins."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from configs import evaluate as evaluate_config
from configs import paper, phase2
from etagent_jax.learner.mesh import AXES, check_rows
from etagent_jax.model.folder import hugging_face_config
from etagent_jax.model.transformer import ModelConfig
from etagent_jax.stages import calibrate, chain, setup
from etagent_jax.stages.directory import StageDirectory
from tests.runs import ROOT, STAGES, command, copy_before, finish, start


@pytest.fixture
def run_before_phase2(finished_run, tmp_path) -> Path:
    return copy_before("phase2", finished_run, tmp_path / "resumed")


def weights_of(run: Path) -> bytes:
    return (run / "phase2" / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_chain_leaves_what_is_promised(finished_run):
    for stage in ("base", "sft", "phase1", "phase2"):
        assert {p.name for p in (finished_run / stage / "model").iterdir()} >= {
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip
    rows = [json.loads(line) for line in (finished_run / "phase2" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    updated = [row for row in rows if "loss" in row]
    assert updated
    assert max(row["sampler_gap_mean"] for row in updated) < 1e-4
    assert all(row["grad_norm"] > 0 for row in updated)
    assert (finished_run / "phase2" / "model" / "model.safetensors").read_bytes() != (
        finished_run / "sft" / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(finished_run):
    before = weights_of(finished_run)
    out = finish(start(command("train", "phase2", finished_run)))
    assert out.count("done before") == 5
    assert weights_of(finished_run) == before


@pytest.mark.slow
def test_killed_at_random_moments_phase2_ends_with_the_same_bits(finished_run, run_before_phase2):
    chance = random.Random(0)
    train = command("train", "phase2", run_before_phase2, "--config.phase2.checkpoint_every=2")
    trajectories = run_before_phase2 / "phase2" / "trajectories"
    kills = 0
    for _ in range(4):
        process = start(train)
        seen = sum(p.stat().st_size for p in trajectories.glob("*")) if trajectories.exists() else 0
        while process.poll() is None:  # wait for it to get on with its work, then kill it at any moment
            size = sum(p.stat().st_size for p in trajectories.glob("*")) if trajectories.exists() else 0
            if size > seen:
                time.sleep(chance.uniform(0, 1.5))
                break
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    finish(start(train))
    assert kills >= 2
    assert weights_of(run_before_phase2) == weights_of(finished_run)
    for name in ("selection-0.jsonl", "step-00000.jsonl", "step-00001.jsonl", "step-00002.jsonl"):
        once, again = (
            {row["id"]: [s["token_ids"] for s in row["segments"]] for row in map(json.loads, file.open())}
            for file in (run / "phase2" / "trajectories" / name for run in (finished_run, run_before_phase2))
        )
        assert once == again


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["base", "sft", "phase2"])
def test_killed_between_its_last_checkpoint_and_the_end_a_stage_still_finishes(stage, finished_run, tmp_path):
    run = tmp_path / "resumed"
    later = STAGES[STAGES.index(stage) + 1 :]
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns(*later))
    (run / stage / "DONE").unlink()
    shutil.rmtree(run / stage / "model")
    finish(start(command("train", stage, run)))
    again, once = ((r / stage / "model" / "model.safetensors").read_bytes() for r in (run, finished_run))
    assert again == once


@pytest.mark.slow
def test_sigterm_stops_at_a_checkpoint_with_status_zero(finished_run, run_before_phase2):
    process = start(command("train", "phase2", run_before_phase2))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("phase2 1/3"):
            process.send_signal(signal.SIGTERM)
            break
    assert "the same command goes on from here" in finish(process)
    assert not (run_before_phase2 / "phase2" / "DONE").exists()
    finish(start(command("train", "phase2", run_before_phase2)))
    assert weights_of(run_before_phase2) == weights_of(finished_run)


@pytest.mark.slow
def test_with_lora_only_kernels_change_and_the_model_has_them_merged(finished_run, tmp_path):
    run = copy_before("sft", finished_run, tmp_path / "adapted")
    finish(start(command("train", "sft", run, "--config.lora.rank=4", "--config.lora.targets=('query','down')")))
    before, after = (load_file(run / stage / "model" / "model.safetensors") for stage in ("base", "sft"))
    changed = {name for name, weight in after.items() if (weight != before[name]).any()}
    assert changed == {name for name in before if "q_proj.weight" in name or "down_proj.weight" in name}


@pytest.mark.slow
def test_evaluation_reports_every_stage_once(finished_run):
    flags = ("--config.evaluate.questions=26", "--config.evaluate.samples=2")
    finish(start(command("evaluate", "evaluate", finished_run, *flags)))
    report = json.loads((finished_run / "report" / "calibration.json").read_text())
    assert list(report["stages"]) == ["base", "sft", "phase1", "phase2"]
    for stage in report["stages"].values():
        assert set(stage["by_kind"]) == {"given", "arithmetic", "one_hop", "two_hops", "compute"}
        assert stage["greedy"]["questions"] == 26
        low, high = stage["sampled"]["correctness"]["ci95"]
        assert low <= stage["sampled"]["correctness"]["mean"] <= high
    assert (finished_run / "report" / "calibration.png").stat().st_size > 10_000
    sampled = (finished_run / "evaluate" / "trajectories" / "phase2-sampled.jsonl").read_bytes()
    finish(start(command("evaluate", "evaluate", finished_run, *flags)))
    assert (finished_run / "evaluate" / "trajectories" / "phase2-sampled.jsonl").read_bytes() == sampled


def config_in(folder: Path) -> ConfigDict:
    config = phase2.get_config()
    config.run = str(folder)
    return config


def test_a_directory_of_another_config_is_refused_with_the_fields(tmp_path):
    with StageDirectory(config_in(tmp_path), "phase1").opened():
        pass
    config = config_in(tmp_path)
    config.phase1.optimizer.learning_rate = 0.5
    config.model.hidden_size = 64
    config.phase2.steps = 99  # another stage's
    config.mesh.fsdp = 2  # how it runs, not what
    with pytest.raises(ValueError, match=r"model\.hidden_size was 128, now 64; phase1\.optimizer\.learning_rate") as e:
        chain.validate(config)
    assert "phase2" not in str(e.value)
    assert "mesh" not in str(e.value)


def test_a_stage_made_from_another_parent_is_refused(tmp_path):
    config = config_in(tmp_path)
    for stage in ("base", "flywheel", "sft"):
        directory = StageDirectory(config, stage)
        with directory.opened():
            directory.model.mkdir()
            (directory.model / "model.safetensors").write_bytes(stage.encode())
            directory.finish({"seconds": 1.0})
    chain.validate(config)
    sft = StageDirectory(config, "sft")
    (sft.model / "model.safetensors").write_bytes(b"other weights")
    with StageDirectory(config, "phase1").opened():
        sft.finish({"seconds": 1.0})
    with pytest.raises(ValueError, match=r"phase1 belongs to another config: made from\.sft was"):
        chain.validate(config)


def test_two_runs_do_not_work_on_one_stage(tmp_path):
    first, second = (StageDirectory(config_in(tmp_path), "base").opened() for _ in range(2))
    with first, pytest.raises(OSError, match="another run"), second:
        pass


def test_settings_that_cannot_work_are_refused_before_any_work(tmp_path):
    def refused(change, message):
        config = config_in(tmp_path)
        change(config)
        with pytest.raises((ValueError, OSError), match=message):
            chain.validate(config)

    refused(lambda c: c.tools.update({"telepathy": ConfigDict()}), "unknown tool 'telepathy'")
    refused(lambda c: c.phase1.loss.update(clip_low=2.0), "clip_low must be in")
    refused(lambda c: c.phase2.reward.update(variant="kind"), "reward variant 'kind'")
    refused(lambda c: c.base.optimizer.update(name="sgd"), "adamw or muon")
    refused(lambda c: c.flywheel.update(initial=0), "initial")
    refused(lambda c: c.rollout.update(calls=-1), "calls must be at least 0")
    refused(lambda c: c.policy.update(backend="telegraph"), "telegraph")
    refused(lambda c: c.tools.search.update(corpus=str(tmp_path / "none.txt")), r"none\.txt")
    refused(lambda c: c.sft.optimizer.update(schedule="foo"), "constant or cosine")
    refused(lambda c: c.sft.update(rows=6), "6 rows cannot be split into 4 micro-batches")
    refused(lambda c: c.phase1.selection.update(questions=10**7), "phase1|10000000")
    refused(lambda c: c.phase2.selection.update(select=0), r"phase2\.selection\.select must be at least 1")
    refused(lambda c: c.phase1.update(samples=1), r"phase1\.samples must be at least 2")
    refused(lambda c: c.policy.update(context=4096), r"policy\.context must be in")
    refused(lambda c: c.rollout.update(concurrency=0), r"rollout\.concurrency must be")
    refused(lambda c: c.mesh.update(data=3), "mesh")
    refused(lambda c: c.sft.update(micro_batches=0), "sft: .*micro_batches must be at least 1")
    refused(lambda c: c.phase1.update(checkpoint_every=0), r"phase1\.checkpoint_every must be at least 1")
    refused(lambda c: c.update(attention="flash"), "base: .*flash")
    refused(lambda c: c.update(frozen=("head/.*",)), "sft: frozen: 'head/.*' matches no parameter")
    refused(lambda c: c.lora.update(rank=2, targets=("feet",)), "sft: lora: targets must be some of")


@pytest.mark.slow
def test_a_mesh_that_does_not_divide_the_model_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    process = start(command("train", "phase2", tmp_path, "--config.mesh.data=1", "--config.mesh.fsdp=3"))
    _, error = process.communicate()
    assert process.returncode == 2  # which a supervisor does not try again
    assert "axis 'embed' of size 128 cannot be split over the mesh axis fsdp of size 3" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("stage", ["sft", "phase1", "phase2"])
def test_the_published_batches_divide_over_a_slice_that_has_a_row_for_each_device(stage, devices):
    section = phase2.get_config("qwen2.5-7b")[stage]
    mesh = AbstractMesh((1, devices, 1), AXES)
    rows, micro_batches = setup.step_rows(section), setup.micro_batches(section, mesh)
    assert rows == (32 if stage == "sft" else 64)  # as published
    if rows < devices:
        with pytest.raises(ValueError, match="32 rows cannot be split into 1 micro-batches over 64 devices"):
            check_rows(rows, micro_batches, mesh)
    else:
        check_rows(rows, micro_batches, mesh)
        assert micro_batches == rows // devices


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path, tokenizer):
    config = phase2.get_config("qwen2.5-7b")
    config.model.path = str(tmp_path / "model")
    config.policy.update(backend="embedded", context=64, chunk=16)
    (tmp_path / "corpus.txt").write_text("a fact\n")
    config.tools.search.corpus = str(tmp_path / "corpus.txt")
    tokenizer.save(config.model.path)
    shape = ModelConfig(64, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
    folder = Path(config.model.path)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(shape, eos_ids=(1,), pad_id=0)))
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model's embedding only 64"):
        chain.validate(config)


def test_a_broken_question_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "a?", "answer": "b"}\n{"question": "c?"}\n')
    config = config_in(tmp_path)
    (tmp_path / "corpus.txt").write_text("a fact\n")
    config.tools.search.corpus = str(tmp_path / "corpus.txt")
    config.questions.update(source="files", kind="qa", train=str(path))
    with pytest.raises(ValueError, match=r"questions\.jsonl.*2"):
        chain.validate(config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/phase2.py:huge"], "preset 'huge' is not one of: tiny, qwen2.5-7b"),
        (["--config=configs/phase2.py", "--config.phase2.stepz=3"], "stepz"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (["--config=configs/phase2.py", "--config.policy.backend=vllm"], "config.policy.backend"),
        (["--config=configs/phase2.py", "--config.policy.backend=sglang"], "config.policy.url"),
        (["--config=configs/phase2.py", "--config.policy.colocated=true"], "config.policy.colocated"),
        (["--config=configs/phase2.py:qwen2.5-7b"], "config.model.path"),
        ([], "--config=configs/phase2.py"),
    ],
)
def test_wrong_commands_fail_with_a_sentence(flags, message):
    process = subprocess.run(
        [sys.executable, "-m", "etagent_jax.train", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode != 0
    assert message in process.stderr
    assert "Traceback" not in process.stderr


def test_presets_and_the_paper_recipe():
    tiny, paper_tiny, published = phase2.get_config(), paper.get_config(), paper.get_config("qwen2.5-7b")
    assert tiny.stages == ("base", "flywheel", "sft", "phase1", "phase2")
    assert paper_tiny.stages == ("base", "flywheel", "sft", "rounds")
    rounds = published.rounds
    assert (rounds.rounds, rounds.selection.select, rounds.selection.samples) == (3, 8_000, 8)
    assert (rounds.questions_per_step, rounds.samples, rounds.steps) == (64, 16, 3 * 8_000 // 64)
    assert (rounds.reward.variant, rounds.reward.sigma_tool, rounds.reward.sigma_length) == ("paper", 0.2, 0.5)
    assert rounds.optimizer.learning_rate == 1e-6
    assert evaluate_config.get_config().evaluate.questions >= 400


def test_sigmas_decay_to_zero_over_a_round():
    section = phase2.get_config().phase2
    first, last = calibrate.reward_config(section, 0), calibrate.reward_config(section, section.steps - 1)
    assert (first.sigma_tool, first.sigma_length) == (1.5, 0.7)
    assert (last.sigma_tool, last.sigma_length) == (0, 0)
