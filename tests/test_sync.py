"""Publishing new weights: folders that appear whole, of which the last two are kept, and that every process agrees."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from etagent_jax.learner.step import Learner
from etagent_jax.learner.sync import Publication, push_weights
from etagent_jax.model import weights
from etagent_jax.model.lora import Lora
from etagent_jax.policy.interface import Sampling
from etagent_jax.policy.server import make_app
from etagent_jax.policy.sglang import SGLangError, SGLangPolicy
from etagent_jax.tokenizer import Tokenizer
from tests.learning import ADAMW, subprocess_environment
from tests.learning import CONFIG as SMALL
from tests.test_engine import CONFIG, make_engine, make_tokenizer, prompt
from tests.test_serving import running, save_model
from tests.test_weights import assert_same_bits


def published(publication: Publication) -> list[str]:
    return sorted(path.name for path in publication.folder.iterdir() if path.name != "tokenizer")


@pytest.fixture
def publication(tmp_path):
    return Publication(tmp_path / "weights", make_tokenizer())


def learner_of(config=CONFIG, **options) -> Learner:
    return Learner(config, ADAMW, **options)


# Folders ----------------------------------------------------------------------------------------------------------


def test_a_version_is_a_model_folder_like_any_other(publication):
    learner = learner_of()
    params = learner.init_state(0).params
    folder = publication.write(learner, params, 12)
    assert folder == publication.folder / "00000012"
    assert weights.read_config(folder) == learner.config
    assert Tokenizer.load(folder).encode("What") == make_tokenizer().encode("What")
    assert_same_bits(weights.load_params(folder, learner.config), params)


def test_adapters_are_merged_into_what_is_published(publication):
    learner = learner_of(SMALL, lora=Lora(rank=2, alpha=4.0))
    params = jax.tree.map(lambda x: x + 0.1, learner.init_state(0).params)  # fresh adapters change nothing
    folder = publication.write(learner, params, 1)
    assert_same_bits(weights.load_params(folder, learner.config), learner.serving_params(params))


def test_the_last_two_versions_are_kept_and_a_version_can_be_written_again(publication):
    learner = learner_of()
    old, new = (learner.init_state(seed).params for seed in (0, 1))
    for version in (8, 9, 10, 10):
        publication.write(learner, old, version)
    publication.write(learner, new, 10)
    publication.forget()
    assert published(publication) == ["00000009", "00000010"]
    assert_same_bits(weights.load_params(publication.folder / "00000010", learner.config), new)


def test_what_an_earlier_run_left_is_removed_and_nothing_else(publication):
    learner = learner_of()
    publication.write(learner, learner.init_state(0).params, 7)
    (publication.folder / ".00000008.unfinished").mkdir()
    (publication.folder / "notes").mkdir()
    again = Publication(publication.folder, make_tokenizer())
    assert published(again) == ["notes"]


KILLED = """
import itertools, os, signal, sys
from etagent_jax.model import shards
from tests.test_sync import *

publication, learner = Publication(sys.argv[1], make_tokenizer()), learner_of()
params = learner.init_state(0).params
publication.write(learner, params, 1)
write, left = np.ascontiguousarray, itertools.count(9, -1)
np.ascontiguousarray = lambda x: write(x) if next(left) else os.kill(os.getpid(), signal.SIGKILL)
publication.write(learner, params, 2)
"""


@pytest.mark.slow
def test_a_kill_while_a_version_is_written_leaves_the_one_before_whole(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, env=subprocess_environment()).returncode == -9
    assert sorted(path.name for path in tmp_path.iterdir()) == [".00000002.unfinished", "00000001", "tokenizer"]
    learner = learner_of()
    params = weights.load_params(tmp_path / "00000001", learner.config)
    assert_same_bits(params, learner.init_state(0).params)


# Servers ----------------------------------------------------------------------------------------------------------


async def test_servers_score_with_the_weights_of_the_learner_and_say_their_version(publication, tmp_path):
    engine, direct = make_engine(), make_engine()
    learner = learner_of()
    params = learner.init_state(3).params
    try:
        with running(make_app(engine, make_tokenizer(), str(save_model(tmp_path / "start")))) as url:
            async with SGLangPolicy(url, vocab_size=CONFIG.vocab_size, backoff=0.01) as policy:
                before = await policy.score(prompt(20))
                for version in (1, 2, 3):
                    await push_weights(learner, params, version, policy, publication)
                await push_weights(learner, params, 3, direct, None)
                scores = await policy.score(prompt(20))
                assert scores == await direct.score(prompt(20))
                assert scores.weight_version == 3
                assert not np.allclose(scores.logprobs, before.logprobs, atol=0.01)
                assert (await policy.model_info())["weight_version"] == "3"
        assert published(publication) == ["00000002", "00000003"]
    finally:
        engine.close()
        direct.close()


async def test_rollouts_go_on_while_weights_are_written(publication, tmp_path, monkeypatch):
    engine, learner = make_engine(), learner_of()
    writing, go_on = threading.Event(), threading.Event()
    original = weights.save

    def held_up(*arguments, **options):
        writing.set()
        assert go_on.wait(60)
        original(*arguments, **options)

    monkeypatch.setattr(weights, "save", held_up)
    try:
        with running(make_app(engine, make_tokenizer(), "start")) as url:
            async with SGLangPolicy(url, vocab_size=CONFIG.vocab_size) as policy:
                push = asyncio.create_task(push_weights(learner, learner.init_state(0).params, 1, policy, publication))
                await asyncio.to_thread(writing.wait)
                assert set((await policy.generate(prompt(9), Sampling(1.0, 8))).weight_versions) == {0}
                assert not push.done()
                go_on.set()
                await push
                assert set((await policy.generate(prompt(9), Sampling(1.0, 8))).weight_versions) == {1}
    finally:
        go_on.set()
        engine.close()


async def test_a_server_that_does_not_take_the_weights_is_an_error_and_no_version_is_removed(publication):
    engine, learner = make_engine(), learner_of(SMALL)  # not the model that is served
    params = learner.init_state(0).params
    for version in (1, 2):
        publication.write(learner, params, version)
    try:
        with running(make_app(engine, make_tokenizer(), "start")) as url:
            async with SGLangPolicy(url, backoff=0.01) as policy:
                with pytest.raises(SGLangError, match=r"00000003: .* the served model's"):
                    await push_weights(learner, params, 3, policy, publication)
        assert published(publication) == ["00000001", "00000002", "00000003"]
    finally:
        engine.close()


# Processes --------------------------------------------------------------------------------------------------------


PROCESSES = """
from etagent_jax.learner.mesh import make_mesh
from tests.test_sync import *

folder, port, count, rank = sys.argv[1], *map(int, sys.argv[2:])
jax.config.update("jax_num_cpu_devices", 4 // count)
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)

class Recorded:
    told = []
    async def update_weights(self, version, folder):
        assert json.loads((folder / "model.safetensors.index.json").read_text()) if count > 1 else True
        if version == 2:
            raise SGLangError("server 1 did not answer")
        self.told.append(["update", version])
    def expect(self, version, folder):
        self.told.append(["expect", version])

learner = learner_of(SMALL, mesh=make_mesh(1, 2, 2))
state, policy = learner.init_state(0), Recorded()
publication = Publication(folder, make_tokenizer())
asyncio.run(push_weights(learner, state.params, 1, policy, publication))
try:
    asyncio.run(push_weights(learner, state.params, 2, policy, publication))
except SGLangError as error:
    policy.told.append(str(error))
print(json.dumps(policy.told))
"""


def outputs(folder: Path, processes: int) -> list[list]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        subprocess.Popen([sys.executable, "-c", PROCESSES, *map(str, (folder, port, processes, rank))],
                         env=subprocess_environment(), stdout=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]  # fmt: skip
    told = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    return [json.loads(out.splitlines()[-1]) for out in told]


@pytest.mark.slow
def test_two_processes_publish_what_one_does_and_all_know_of_it(tmp_path):
    assert outputs(tmp_path / "one", 1) == [[["update", 1], "server 1 did not answer"]]
    assert outputs(tmp_path / "two", 2) == [
        [["update", 1], "server 1 did not answer"],
        [["expect", 1], "server 1 did not answer"],
    ]
    one, two = (tmp_path / name / "00000001" for name in ("one", "two"))
    assert_same_bits(weights.load_params(two, SMALL), weights.load_params(one, SMALL))
    assert {path.name for path in two.iterdir()} - {path.name for path in one.iterdir()} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    }  # fmt: skip
    sizes = [path.stat().st_size for path in two.glob("*.safetensors")]
    assert max(sizes) < 1.5 * min(sizes)
