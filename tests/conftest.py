"""What the tests share: the tiny world's real tokenizer, and hypothesis without time limits."""

import hypothesis
import pytest

from etagent_jax.tokenizer import Tokenizer
from etagent_jax.world import World
from etagent_jax.world.vocabulary import make_tokenizer

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer(World.make(0)))
