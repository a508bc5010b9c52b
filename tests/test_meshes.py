"""Meshes: where parameters lie, what does not divide, and that every mesh does what one device does."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from etagent_jax.learner import mesh
from etagent_jax.learner.step import Learner
from tests.learning import ADAMW, CONFIG, POLICY, calibrate, fine_tune, subprocess_environment

STEPS = 10


def test_parameters_lie_where_their_axes_say():
    kernel = jax.ShapeDtypeStruct((3, 8, 12), np.float32)
    there = mesh.parameter_shardings({"k": kernel}, {"k": P("layers", "embed", "mlp")},
                                     AbstractMesh((1, 4, 3), mesh.AXES))  # fmt: skip
    assert there["k"].spec == P(None, "fsdp", "tensor")
    with pytest.raises(ValueError, match=r"^k \(3, 8, 12\): its axis 'embed' of size 8 .* axis fsdp of size 3$"):
        mesh.parameter_shardings({"k": kernel}, {"k": P("layers", "embed", "mlp")},
                                 AbstractMesh((1, 3, 4), mesh.AXES))  # fmt: skip


def test_a_mesh_must_fit_the_devices():
    assert mesh.make_mesh().shape == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="data=3, fsdp=1, tensor=2: the sizes must multiply to the number of devices"):
        mesh.make_mesh(3, 1, 2)
    with pytest.raises(ValueError, match="one of them may be -1"):
        mesh.make_mesh(-1, -1, 1)


def test_a_tensor_axis_must_divide_the_heads():
    with pytest.raises(ValueError, match="a tensor axis of 4 does not divide the model's 2 key/value heads"):
        mesh.check_heads(CONFIG, AbstractMesh((1, 1, 4), mesh.AXES))


PROGRAM = """
import json, sys
from etagent_jax.learner import mesh
from etagent_jax.learner.checkpoint import Checkpoints
from etagent_jax.learner.step import Learner, used_micro_batches
from tests.learning import *

def learner(*axes, devices=8, micro_batches=1):
    there = mesh.make_mesh(*axes, devices=jax.devices()[:devices])
    return Learner(CONFIG, ADAMW, policy=POLICY, mesh=there, micro_batches=micro_batches)

out = {"by mesh": {}}
for axes in ((1, 2, 1), (2, 1, 2), (2, 2, 2), (1, 4, 2), (8, 1, 1)):
    made = learner(*axes, devices=int(np.prod(axes)), micro_batches=1 if axes[0] == 8 else 2)
    state, sft = fine_tune(made, STEPS)
    up = state.params["layers"]["feed_forward"]["up"]["kernel"].addressable_shards[0].data.shape
    policy = calibrate(made, STEPS // 2)[1]
    out["by mesh"]["%d %d %d" % axes] = {"sft": sft, "policy": policy, "compilations": made.compilations, "up": up}

state, first = fine_tune(learner(1, 4, 2), 5)
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(5, state, {})
other = learner(2, 1, 1, devices=2, micro_batches=4)
state, _ = checkpoints.restore(5, other.abstract_state)
padded = learner(1, 8, 1, micro_batches=8)
used = jax.jit(lambda batch: used_micro_batches(padded._split(batch)))
out["used of 8"] = int(used(padded.rows(pack(sequences(60), LENGTH, rows=64))))  # 23 rows hold tokens
out["resumed"] = first + fine_tune(other, 5, state)[1]
print(json.dumps(out))
""".replace("STEPS", str(STEPS))


@pytest.fixture(scope="module")
def on_meshes(tmp_path_factory) -> dict:
    """What runs on meshes of up to eight virtual devices came to, by mesh."""
    environment = subprocess_environment(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    folder = tmp_path_factory.mktemp("checkpoints")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_mesh_gives_the_losses_of_one_device(on_meshes):
    learner = Learner(CONFIG, ADAMW, policy=POLICY)
    sft, policy = fine_tune(learner, STEPS)[1], calibrate(learner, STEPS // 2)[1]
    for axes, result in on_meshes["by mesh"].items():
        np.testing.assert_allclose(result["sft"], sft, rtol=1e-5, err_msg=axes)
        np.testing.assert_allclose(result["policy"], policy, atol=1e-5, err_msg=axes)


@pytest.mark.slow
def test_no_step_is_compiled_twice_and_parameters_are_split(on_meshes):
    for axes, result in on_meshes["by mesh"].items():
        _, fsdp, tensor = map(int, axes.split())
        assert result["compilations"] == 3, axes  # sft_step, policy_step, score
        assert result["up"] == [2, 32 // fsdp, 48 // tensor]


@pytest.mark.slow
def test_micro_batches_of_padding_are_skipped_on_several_devices_too(on_meshes):
    assert on_meshes["used of 8"] == 3


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_goes_on_on_another(on_meshes):
    losses = fine_tune(Learner(CONFIG, ADAMW), STEPS)[1]
    np.testing.assert_allclose(on_meshes["resumed"], losses, rtol=1e-5)
