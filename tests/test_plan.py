"""What a drift costs on each of several devices: foreseen, and compared with what is there."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
from checks import at_most, close, equal, refused
from manifoldflow import diagnostics, linalg
from manifoldflow.diagnostics import _program
from plan_programs import ITEM, NUM_EXAMPLES, WIDTH
from processes import finished, start, two_reports


@pytest.fixture(scope="module")
def report():
    return finished(start("plan_programs.py", "devices", num_devices=8))[0]


@pytest.fixture(scope="module")
def plans(report):
    return {int(count): plan for count, plan in report["plans"].items()}


def test_memory_is_what_the_compiler_takes_for_the_arrays_themselves(plans):
    for count, plan in plans.items():
        error = abs(plan["plan"] / plan["compiler"] - 1)
        at_most(f"|planned / compiled memory − 1| on {count} devices", error, 0.25)
        equal(f"bytes of arguments on the first of {count}", plan["arguments"], plan["there"])


def test_every_device_has_its_share_of_the_examples(plans):
    shares = {count: NUM_EXAMPLES * (4 + 1) * ITEM // count for count in (2, 4, 8)}
    equal("its own bytes", {n: p["cut"] for n, p in plans.items()}, {1: 0} | shares)
    single, many = plans[1]["operations"], plans[8]["operations"]
    at_most("operations on one of 8 devices, of those on one", many / single, 0.25)
    assert many / single > 1 / 8, "the factorisation is whole on every device"


def test_messages_are_counted_and_have_the_sizes_of_what_they_carry(plans):
    equal("on one device", plans[1]["planned messages"], {})
    # Both factors of every row, and the Gram matrix; a bias has the factor of its weight.
    factors = 4 + 2 * WIDTH + 2 * WIDTH + 1
    least = (NUM_EXAMPLES**2 + NUM_EXAMPLES * factors) * ITEM
    most = least + NUM_EXAMPLES * (1 + 10) * ITEM
    num_parameters = 4 * WIDTH + WIDTH + WIDTH**2 + WIDTH + WIDTH + 1
    for count in (2, 4, 8):
        plan = plans[count]
        assert least <= plan["gathered"] <= most, f"{least} ≤ {plan['gathered']} ≤ {most}"
        equal("whole sums over parameters", plan["summed"] // (num_parameters * ITEM), 3)
        # A loop that runs twice stands in the text once.
        for kind, number in plan["messages"].items():
            assert number <= plan["planned messages"][kind] <= 2 * number, plan
        assert f"on each of {count} devices" in plan["printed"], plan["printed"]
        assert "all-gather" in plan["printed"], plan["printed"]


def test_the_sharded_drift_is_lowered_for_nvidia_gpus(report):
    exported = report["exported"]
    equal("platforms", exported["platforms"], ["cuda"])
    equal("devices", exported["devices"], 4)
    assert exported["constraints"] > 0, "no array is told where to lie"


def test_processes_bring_all_examples_or_their_shares():
    reports = two_reports("plan_programs.py")
    for report in reports:
        for name in ("whole", "shares"):
            # Two processes with two devices each.
            equal(f"examples on a device, {name}", report[name]["parts"], [NUM_EXAMPLES // 4] * 2)
            at_most(f"difference from one process, {name}", report[name]["gap"], 1e-12)
    last = f"index ({NUM_EXAMPLES - 1},)"
    assert "refused" not in reports[0] and last in reports[1]["refused"], reports


def test_the_program_takes_memory_as_well():
    needed = diagnostics.Plan(arguments=2**20, drift=2**21, result=0, dense_jacobian=0)
    with_program = needed._replace(program=2**22)
    equal("total", with_program.total - needed.total, 2**22)
    assert "program" not in str(needed) and "program" in str(with_program), str(with_program)


def test_loops_that_say_how_often_they_run_count_as_often():
    a, size, trips = jnp.ones((64, 32)), 64, 5

    def program(a):
        gram = a @ a.T + jnp.eye(size)
        factor = jnp.linalg.cholesky(gram)
        power = jax.lax.fori_loop(0, trips, lambda _, x: jnp.tanh(x @ gram), factor)
        return power, jax.scipy.linalg.solve_triangular(factor, a, lower=True)

    found = _program.totals(jax.jit(program).lower(a).compile().as_text())
    products = 2 * 32 * size**2 + trips * 2 * size**3
    close("operations", found.operations, products + size**3 / 3 + size**2 * 32, 1e-12)
    equal("messages", found.messages, ())


TPU = """HloModule jit_f, is_scheduled=true

%body.1 (p.0: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p.0 = (s32[], f32[4,8]{1,0:T(8,128)}) parameter(0)
  %x.1 = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%p.0), index=1
  %s.2 = (f32[4,8]{1,0:T(8,128)}, f32[16,8]{1,0:T(8,128)}) all-gather-start(%x.1), dimensions={0}
  %g.3 = f32[16,8]{1,0:T(8,128)} all-gather-done(%s.2)
  %y.4 = f32[4,8]{1,0:T(8,128)} convolution(%x.1, %k.9), dim_labels=bf_io->bf
  %k.9 = f32[8,8]{1,0:T(8,128)} constant({...})
  ROOT %t.5 = (s32[], f32[4,8]{1,0:T(8,128)}) tuple(%i.0, %y.4)
}

ENTRY %main.7 (a.1: f32[4,8]) -> bf16[4,8] {
  %a.1 = f32[4,8]{1,0:T(8,128)} parameter(0), metadata={op_name="arrays[0](x)"}
  %w.2 = (s32[], f32[4,8]) while(%a.1), body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r.3 = bf16[4,8]{1,0} all-reduce(%a.1), replica_groups={{0,1}}, to_apply=%add.1
}
"""


def test_messages_that_start_and_end_are_counted_once():
    found = _program.totals(TPU)
    gathered = ("all-gather", 3, 3 * 16 * 8 * 4)
    equal("messages", found.messages, (gathered, ("all-reduce", 1, 4 * 8 * 2)))
    equal("operations", found.operations, 3 * 2 * 4 * 8 * 8)


@pytest.fixture(scope="module")
def wide():
    """Its rows take more than its parameters and its Gram matrix."""
    model = eqx.nn.MLP(8, 1, 256, 1, activation=jnp.tanh, key=jr.key(0))
    loss = mf.LeastSquares(jr.normal(jr.key(1), (400, 8)), jr.normal(jr.key(2), (400, 1)))
    return mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.LabelNoise(1.0, 1)), model


def test_chunks_are_recommended_where_memory_ends_and_fit(wide):
    flow, model = wide
    whole = mf.plan(flow, model)
    equal("chunks where there is room", whole.chunk_size, None)
    limit = int(0.7 * whole.total)
    with pytest.raises(MemoryError, match="limit of .* examples at a time") as caught:
        mf.plan(flow, model, limit=limit)
    memory = int(str(caught.value).split("device_memory(")[1].split(")")[0])
    with linalg.device_memory(memory):
        chunked = mf.plan(flow, model, limit=limit)
    assert 0 < chunked.chunk_size < 400, chunked
    assert chunked.operations > whole.operations, "chunks pass through the model again"
    assert f"{chunked.chunk_size} of 400 examples" in str(chunked), str(chunked)


def test_memory_that_is_said_is_part_of_what_programs_are_kept_by(wide):
    """The same function twice: what it was traced for first must not be what it gives later."""
    flow, model = wide
    loss = flow.manifold.loss
    kinds = []
    for memory in (2**34, 2**20, 2**34):
        with linalg.device_memory(memory):
            kinds.append(type(loss.jacobian(model)).__name__)
    equal("kinds", kinds, ["StructuredJacobian", "ChunkedJacobian", "StructuredJacobian"])


@pytest.mark.parametrize("memory", [0, 1.5, -1])
def test_bad_memory(memory):
    with refused(ValueError, "device_memory: num_bytes"):
        linalg.device_memory(memory)
