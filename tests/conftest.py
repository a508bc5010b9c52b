"""What the tests share: the tiny world's real tokenizer, one finished run, servers, and hypothesis without limits."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

from etagent_jax.tokenizer import Tokenizer
from etagent_jax.world import World
from etagent_jax.world.vocabulary import make_tokenizer
from tests import runs, servers

COMPILED = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Programs that several tests compile, here or in processes they start, are compiled once a session."""
    folder = config.stash[COMPILED] = tempfile.mkdtemp(prefix="etagent-compiled-")
    for name, value in (("compilation_cache_dir", folder), ("persistent_cache_min_compile_time_secs", 0.2)):
        os.environ[f"JAX_{name.upper()}"] = str(value)
        jax.config.update(f"jax_{name}", value)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[COMPILED], ignore_errors=True)


hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer(World.make(0)))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A small run of all stages by one process, never interrupted.  Copy it; do not change it."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    runs.finish(runs.start(runs.command("train", "phase2", run)))
    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> list[Path]:
    """Three folders of one shape and tokenizer, with other weights: `tests.servers.params(i)`."""
    folder = tmp_path_factory.mktemp("models")
    return [servers.save_model(folder / f"model{seed}", seed) for seed in range(3)]


@pytest.fixture(scope="session")
def real_server(models, tmp_path_factory) -> Iterator[servers.Server]:
    """SGLang itself, on the CPU.  Its tests are slow; the first one installs it where it is not there yet."""
    with servers.sglang(models, tmp_path_factory.mktemp("sglang")) as server:
        yield server


@pytest.fixture(scope="session")
def embedded_server(models, tmp_path_factory) -> Iterator[servers.Server]:
    with servers.embedded(models, tmp_path_factory.mktemp("embedded")) as server:
        yield server
