"""The optimizer state on the host and back: the same bits in the same places, and steps go on from there."""

import socket
import subprocess
import sys

import pytest

from tests.learning import subprocess_environment

PROGRAM = """
import sys, jax
from etagent_jax.learner import mesh
from etagent_jax.learner.parking import park, unpark
from etagent_jax.learner.step import Learner
from tests.learning import *

port, count, rank = map(int, sys.argv[1:])
jax.config.update("jax_num_cpu_devices", 4 // count)
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)

def here(tree):
    return [[shard.data for shard in leaf.addressable_shards] for leaf in jax.tree.leaves(tree)]

learner = Learner(CONFIG, MUON, mesh=mesh.make_mesh(1, 2, 2))
straight = here(fine_tune(learner, 4)[0])
compilations = learner.compilations
state, _ = fine_tune(learner, 2)
before = [leaf for leaf in jax.tree.leaves(state.opt_state)]
bits = jax.tree.map(np.array, here(state.opt_state))

parked = park(state, learner)
assert all(leaf.is_deleted() for leaf in before)
assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(parked))
for leaf, old in zip(jax.tree.leaves(parked.opt_state), before, strict=True):
    assert leaf.sharding == old.sharding.with_memory_kind("pinned_host")
assert_same_bits(here(parked.opt_state), bits)

back = unpark(parked, learner)
assert all(leaf.is_deleted() for leaf in jax.tree.leaves(parked.opt_state))
assert [leaf.sharding for leaf in jax.tree.leaves(back.opt_state)] == [old.sharding for old in before]
assert_same_bits(here(back.opt_state), bits)
assert_same_bits(here(fine_tune(learner, 2, back)[0]), straight)
assert learner.compilations == compilations
"""


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_parked_state_comes_back_to_the_bit_and_no_step_is_compiled_anew(processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(port), str(processes), str(rank)],
                         env=subprocess_environment(), stderr=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]  # fmt: skip
    for process in running:
        said = process.communicate()[1]
        assert process.returncode == 0, said
