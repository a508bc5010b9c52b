"""Planning without the devices: collectives against sums by hand, memory against shapes, the command line."""

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import jax
import pytest

from configs import phase2
from etagent_jax.learner.mesh import make_mesh
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.learner.step import Learner
from etagent_jax.model.shapes import SHAPES
from etagent_jax.model.transformer import ModelConfig, count_parameters
from etagent_jax.planning import devices
from etagent_jax.planning.collectives import collectives
from etagent_jax.planning.hlo import Program, size
from etagent_jax.planning.plan import exact_memory, make_plan, repeated_flops
from etagent_jax.planning.steps import Step, model_of
from etagent_jax.planning.traffic import traffic

MODEL = ModelConfig(64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)

LOOPS = """
HloModule loops

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p.1: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %p.1 = (s32[], bf16[16,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %two = s32[] constant(2)
  %next.1 = s32[] add(%i.1, %two)
  %x.1 = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %gathered = bf16[64,64]{1,0} all-gather(%x.1), replica_groups=[2,4]<=[8], dimensions={0}
  %reduced = bf16[64,64]{1,0} all-reduce(%gathered), replica_groups={{0,4},{1,5},{2,6},{3,7}}
  %scattered = bf16[16,64]{1,0} reduce-scatter(%reduced), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %out.1 = (s32[], bf16[16,64]{1,0}) tuple(%next.1, %scattered)
}

%inner_condition (p.2: (s32[], bf16[16,64])) -> pred[] {
  %p.2 = (s32[], bf16[16,64]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %ten = s32[] constant(10)
  ROOT %less.2 = pred[] compare(%i.2, %ten), direction=LT
}

%outer_body (p.3: (s32[], bf16[16,64], s32[])) -> (s32[], bf16[16,64], s32[]) {
  %p.3 = (s32[], bf16[16,64]{1,0}, s32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %n.3 = s32[] get-tuple-element(%p.3), index=2
  %x.3 = bf16[16,64]{1,0} get-tuple-element(%p.3), index=1
  %one = s32[] constant(1)
  %next.3 = s32[] add(%i.3, %one)
  %inner = (s32[], bf16[16,64]{1,0}) while(%start.3), condition=%inner_condition, body=%inner_body
  %four = s32[] constant(4)
  %start.3 = (s32[], bf16[16,64]{1,0}) tuple(%four, %x.3)
  %y.3 = bf16[16,64]{1,0} get-tuple-element(%inner), index=1
  %moved = (bf16[16,64]{1,0}, bf16[16,64]{1,0:S(1)}) collective-permute-start(%y.3), source_target_pairs={{0,4},{4,0}}
  %arrived = bf16[16,64]{1,0:S(1)} collective-permute-done(%moved)
  ROOT %out.3 = (s32[], bf16[16,64]{1,0}, s32[]) tuple(%next.3, %arrived, %n.3)
}

%outer_condition (p.4: (s32[], bf16[16,64], s32[])) -> pred[] {
  %p.4 = (s32[], bf16[16,64]{1,0}, s32[]) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %n.4 = s32[] get-tuple-element(%p.4), index=2
  ROOT %less.4 = pred[] compare(%i.4, %n.4), direction=LT
}

ENTRY %main (x: bf16[16,64], n: s32[]) -> (s32[], bf16[16,64], s32[]) {
  %x = bf16[16,64]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[16,64]{1,0}, s32[]) tuple(%zero, %x, %n)
  ROOT %outer = (s32[], bf16[16,64]{1,0}, s32[]) while(%start), condition=%outer_condition, body=%outer_body
}
"""
"""As a TPU prints it: no trip counts, memory spaces in the layouts.  The inner loop runs from 4 to 10 by 2."""


def test_collectives_in_nested_loops_are_counted_as_often_as_they_run() -> None:
    held, outer, inner = 16 * 64 * 2, 5, 3
    found = collectives(Program(LOOPS, dynamic_trips=outer), {"data": 2, "fsdp": 4})
    assert {(c.kind, c.axes): (c.count, c.sent) for c in found} == {
        ("all-gather", ("fsdp",)): (outer * inner, outer * inner * 3 * held),
        ("all-reduce", ("data",)): (outer * inner, outer * inner * 4 * held),
        ("reduce-scatter", ("fsdp",)): (outer * inner, outer * inner * 3 * held),
        ("collective-permute", ("data",)): (outer, outer * held),
    }


def test_traffic_leaves_out_what_stays_in_fast_memory() -> None:
    held = 16 * 64 * 2
    of_inner = (held + 4 * held) + (4 * held + 4 * held) + (4 * held + held)
    loop_counters = 5 * (3 * 12 + 4 * 9 + 12) + 6 * 9  # additions of two int32, comparisons that give a byte
    assert traffic(Program(LOOPS, dynamic_trips=5)) == 5 * 3 * of_inner + loop_counters


HIDDEN = """
HloModule hidden

%begin (w.1: bf16[8,64]) -> bf16[64,64] {
  %w.1 = bf16[8,64]{1,0} parameter(0)
  %g.1 = bf16[64,64]{1,0} all-gather(%w.1), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %begun = bf16[64,64]{1,0} custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (w.2: bf16[8,64], b.2: bf16[64,64], x.2: bf16[32,64]) -> (bf16[64,64], bf16[32,64]) {
  %w.2 = bf16[8,64]{1,0} parameter(0)
  %b.2 = bf16[64,64]{1,0} parameter(1)
  %g.2 = bf16[64,64]{1,0} all-gather(%w.2), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %x.2 = bf16[32,64]{1,0} parameter(2)
  %twice = bf16[32,64]{1,0} add(%x.2, %x.2)
  ROOT %both = (bf16[64,64]{1,0}, bf16[32,64]{1,0}) tuple(%g.2, %twice)
}

%all-reduce-scatter.1 (t.3: bf16[32,64]) -> bf16[4,64] {
  %t.3 = bf16[32,64]{1,0} parameter(0)
  %all = bf16[32,64]{1,0} all-reduce(%t.3), replica_groups={{0,1,2,3,4,5,6,7}}
  %zero.3 = s32[] constant(0)
  ROOT %mine = bf16[4,64]{1,0} dynamic-slice(%all, %zero.3, %zero.3), dynamic_slice_sizes={4,64}
}

ENTRY %main (w: bf16[8,64], x: bf16[32,64]) -> bf16[4,64] {
  %w = bf16[8,64]{1,0} parameter(0)
  %x = bf16[32,64]{1,0} parameter(1)
  %begin.1 = bf16[64,64]{1,0} fusion(%w), kind=kCustom, calls=%begin
  %meanwhile = (bf16[64,64]{1,0}, bf16[32,64]{1,0}) fusion(%w, %begin.1, %x), calls=%async_collective_fusion.1
  %sum = bf16[32,64]{1,0} get-tuple-element(%meanwhile), index=1
  ROOT %own = bf16[4,64]{1,0} fusion(%sum), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
"""How a TPU hides a gather behind an addition, and writes a reduce-scatter."""


def test_collectives_that_a_tpu_hides_in_fusions_are_counted_once() -> None:
    found = collectives(Program(HIDDEN), {"fsdp": 8})
    assert [(c.kind, c.axes, c.count, c.sent) for c in found] == [
        ("all-gather", ("fsdp",), 1, 7 * 8 * 64 * 2),
        ("reduce-scatter", ("fsdp",), 1, 7 * 4 * 64 * 2),
    ]


def test_shapes_have_the_size_of_all_their_arrays() -> None:
    assert size("(f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[4]{0}, pred[], s4[3])") == 24 + 8 + 1 + 2


REAL_PROGRAM = """
import jax, jax.numpy as jnp, json
from jax.sharding import PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 8)
from etagent_jax.learner.mesh import make_mesh
from etagent_jax.planning.collectives import collectives
from etagent_jax.planning.hlo import Program
mesh = make_mesh(2, 4, 1)

def on_a_device(weight, x, n):
    def layer(x, _):
        summed = jax.lax.psum(x @ weight, "data")
        own = jax.lax.psum_scatter(jnp.tanh(summed), "fsdp", scatter_dimension=0, tiled=True)
        moved = jax.lax.ppermute(own, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)])
        return jax.lax.all_gather(moved, ("data", "fsdp"), tiled=True)[::2], None
    return jax.lax.fori_loop(0, n, lambda i, x: jax.lax.scan(layer, x, None, length=3)[0], x)

run = jax.jit(jax.shard_map(on_a_device, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((64, 64), "float32"), ((16, 64), "float32"), ((), "int32"))]
program = Program(run.lower(*shapes).compile().as_text(), dynamic_trips=5)
print(json.dumps([[c.kind, c.axes, c.count, c.sent] for c in collectives(program, dict(mesh.shape))]))
"""


def test_collectives_of_a_program_that_xla_compiled_are_those_that_were_written() -> None:
    ran = run_python("-c", REAL_PROGRAM)
    found = {(kind, tuple(axes)): (count, sent) for kind, axes, count, sent in json.loads(ran.stdout)}
    x, own, times = 16 * 64 * 4, 4 * 64 * 4, 15
    assert found == {
        ("all-reduce", ("data",)): (times, times * 2 * x // 2),
        ("reduce-scatter", ("fsdp",)): (times, times * x * 3 // 4),
        ("collective-permute", ("fsdp",)): (times, times * own),
        ("all-gather", ("data", "fsdp")): (times, times * own * 7),
    }


def make_step(kind: Any = "sft", **options: Any) -> Step:
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    learner = Learner(MODEL, OptimizerConfig(1e-3, 10), mesh=mesh, micro_batches=2, **options)
    return Step(kind, kind, learner, 4, 16)


def test_memory_by_kind_is_that_of_the_shapes_and_sums_to_what_xla_allocates() -> None:
    step = make_step()
    parameters = 4 * count_parameters(MODEL)
    exact = exact_memory(step)
    assert exact == {
        "parameters": parameters,
        "optimizer": 2 * parameters + 2 * 4,  # two moments, and two counters
        "gradients": parameters,
        "batch": 4 * 16 * (5 * 4 + 1),
    }
    plan, stats = make_plan(step), step.lower().compile().memory_analysis()
    assert plan.fits
    assert sum(plan.memory.values()) == (
        stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
        - stats.alias_size_in_bytes + stats.generated_code_size_in_bytes
    )  # fmt: skip


def test_a_step_that_needs_more_than_there_is_does_not_fit_and_says_how_much() -> None:
    plan = make_plan(make_step(), available=2**18)
    assert not plan.fits
    assert f"needs {sum(plan.memory.values()) / 2**30:.2f} GiB" in plan.problem


@pytest.mark.parametrize(("remat", "layers", "attention"), [("none", 0, 0), ("dots", 0, 1), ("full", 1, 1)])
def test_recomputation_costs_the_products_of_the_forward_pass_again(remat: Any, layers: int, attention: int) -> None:
    tokens, pairs, width = 10, 55, MODEL.num_heads * MODEL.head_dim
    of_a_layer = 2 * MODEL.hidden_size * width * 2 + 2 * MODEL.hidden_size * (width // 2) * 2
    of_a_layer += 3 * 2 * MODEL.hidden_size * MODEL.intermediate_size
    logits = 2 * tokens * MODEL.hidden_size * MODEL.vocab_size
    expected = logits + layers * 3 * tokens * of_a_layer + attention * 3 * 4 * pairs * width
    assert repeated_flops(MODEL, tokens, pairs, remat) == expected


@pytest.mark.parametrize(("name", "parameters"), [
    ("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-7b", 7_615_616_512),
    ("qwen2.5-14b", 14_770_033_664), ("qwen2.5-32b", 32_763_876_352), ("qwen3-8b", 8_190_735_360),
    ("llama3.1-8b", 8_030_261_248),
])  # fmt: skip
def test_published_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert count_parameters(SHAPES[name]) == parameters


@pytest.mark.parametrize("topology", ["v5e", "v5e:4", "cpu:0", "cpu:x", "a100:8", "v9:2x2"])
def test_an_unknown_topology_is_refused_with_examples(topology: str) -> None:
    with pytest.raises(ValueError, match=r"give a TPU slice as in v5e:4x8"):
        devices.find(topology)


def test_without_libtpu_a_tpu_slice_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-tpu.txt"):
        devices.find("v5e:4x4")


def test_any_tensor_axis_that_divides_can_be_laid_out_on_a_slice() -> None:
    pytest.importorskip("libtpu")
    program = "from etagent_jax.learner.mesh import make_mesh; from etagent_jax.planning import devices\n"
    program += "for t in (1, 2, 4, 8): print(make_mesh(1, -1, t, devices.find('v6e:8x8')).shape['fsdp'])"
    ran = run_python("-c", program)
    assert ran.stdout.split() == ["64", "32", "16", "8"], ran.stderr


def test_larger_slices_are_of_the_same_generation() -> None:
    assert devices.larger("v5e:4x8") == ["v5e:8x8", "v5e:8x16", "v5e:16x16"]
    assert devices.larger("v5p:8x8x8") == []
    assert devices.larger("cpu:8") == []


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def run_compile(*flags: str) -> dict[str, Any]:
    ran = run_python("-m", "etagent_jax.compile", "--json", *flags)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.slow
def test_the_command_plans_both_steps_of_the_tiny_config() -> None:
    plan = run_compile("--config=configs/phase2.py", "--topology=cpu:2", "--config.mesh.fsdp=2")
    assert plan["fits"]
    assert [step["kind"] for step in plan["steps"]] == ["sft", "policy"]
    for step in plan["steps"]:
        assert step["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}
        gathered = [c for c in step["collectives"] if c["kind"] == "all-gather" and c["axes"] == ["fsdp"]]
        assert gathered[0]["sent"] > step["micro_batches"] * step["memory"]["parameters"]


@pytest.mark.slow
def test_advice_makes_it_fit_when_its_flags_are_given() -> None:
    asked = ("--config=configs/phase2.py", "--memory_gib=0.2", "--config.phase2.micro_batches=1")
    plan = run_compile("--topology=cpu:4", *asked)
    assert not plan["fits"]
    flags = plan["advice"]["flags"]
    again = run_compile(*asked, *flags)
    assert again["fits"]
    assert [s["memory"] for s in again["steps"]] == [s["memory"] for s in plan["advice"]["steps"]]


def test_a_wrong_command_is_one_sentence() -> None:
    ran = run_python("-m", "etagent_jax.compile", "--config=configs/phase2.py:qwen2.5-7b", "--topology=v5e")
    assert ran.returncode == 1
    assert "topology 'v5e' is not known" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_model_that_is_not_downloaded_is_planned_by_the_name_of_its_path() -> None:
    config = phase2.get_config("qwen2.5-7b")
    assert model_of(config) == SHAPES["qwen2.5-7b"]
    assert model_of(config, "qwen3-8b") == SHAPES["qwen3-8b"]
    with pytest.raises(ValueError, match=r"--model=gpt-2: is not one of qwen2.5-0.5b"):
        model_of(config, "gpt-2")
    config.model.path = "org/unknown"
    with pytest.raises(ValueError, match=r"org/unknown is no folder, and no shape is known by that name"):
        model_of(config)


@pytest.mark.slow
def test_a_step_compiles_for_tpus_that_are_not_there() -> None:
    pytest.importorskip("libtpu")
    program = textwrap.dedent("""
        import dataclasses, json
        from etagent_jax.learner.mesh import make_mesh
        from etagent_jax.learner.optimizer import OptimizerConfig
        from etagent_jax.learner.step import Learner
        from etagent_jax.model.shapes import SHAPES
        from etagent_jax.planning import devices
        from etagent_jax.planning.plan import make_plan
        from etagent_jax.planning.steps import Step
        model = dataclasses.replace(SHAPES["qwen2.5-0.5b"], num_layers=4)
        mesh = make_mesh(1, 8, 1, devices.find("v5e:2x4"))
        learner = Learner(model, OptimizerConfig(1e-5, 10), mesh=mesh, micro_batches=2, remat="full")
        print(json.dumps(dataclasses.asdict(make_plan(Step("sft", "sft", learner, 16, 1024, "full")))))
    """)
    ran = run_python("-c", program)
    assert ran.returncode == 0, ran.stderr
    plan = json.loads(ran.stdout)
    assert plan["device"] == "TPU v5 lite"
    assert plan["problem"] == ""
    assert sum(plan["memory"].values()) < plan["available"]
    layers = 4 * (2 * 896 * (14 + 2) * 64 + 3 * 896 * 4864)  # parameters, in bfloat16 when they travel
    sent = sum(c["sent"] for c in plan["collectives"] if c["axes"] == ["fsdp"])
    assert sent > 2 * 2 * layers * 2 * 7 / 8  # two micro-batches, each at least forward and gradients
