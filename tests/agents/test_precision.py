"""How agents multiply: what float32 means on each device, and what bfloat16 changes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from twister_jax import parity, runtime
from twister_jax.agents import make_agent
from twister_jax.agents.base import Observation
from twister_jax.envs.base import EnvSpec
from twister_jax.presets import make_config
from twister_jax.replay import store

FIXTURES = Path(__file__).parents[1] / "fixtures"
HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def products(value):
    """Precisions of all products of a traced program, those of its inner programs included."""
    if isinstance(value, tuple | list):
        for each in value:
            yield from products(each)
    value = getattr(value, "jaxpr", value)
    for equation in getattr(value, "eqns", ()):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.params["precision"]
        yield from products(list(equation.params.values()))


def programs(agent, spec):
    """Every function of an agent that multiplies, with shapes to trace it for."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(agent.init, key)
    carry = jax.eval_shape(lambda state: agent.init_carry(state, 2), state)
    seen = Observation(
        jax.ShapeDtypeStruct((2, *spec.image_shape), jnp.uint8), jax.ShapeDtypeStruct((2,), jnp.bool_)
    )
    replay = jax.eval_shape(lambda: store.init(2, 100, spec.image_shape, spec.num_actions))
    batch, _ = jax.eval_shape(agent.sample, replay, key)
    return {
        "act": (agent.act, (state, carry, seen, key)),
        "act_evaluate": (agent.act_evaluate, (state, carry, seen, key)),
        "learn": (agent.learn, (state, batch, key)),
        "update": (agent.update, (state, replay, key)),
        "report": (agent.report, (state, replay, key)),
        **{phase.name: (phase.update, (state, replay, key)) for phase in agent.pretraining},
    }


@pytest.mark.parametrize(
    ("device", "precision", "exact"),
    [
        ("gpu", "float32", True),
        ("tpu", "float32", True),
        ("gpu", "bfloat16", False),
        ("cpu", "float32", False),
    ],
)
@pytest.mark.parametrize("name", ["twister", "twm"])
def test_float32_is_not_left_to_an_accelerator_that_rounds(name, device, precision, exact):
    """JAX's default is TF32 on NVIDIA hardware. Cumulative probabilities are exact everywhere."""
    config = make_config(name, "debug", game="Pong", precision=precision)
    spec = EnvSpec(image_shape=(64, 64, 1 if config.env.grayscale else 3), num_actions=6)
    with runtime.tracing_for(device):
        agent = make_agent(config, spec)
        found = {
            program: list(products(jax.make_jaxpr(function)(*arguments).jaxpr))
            for program, (function, arguments) in programs(agent, spec).items()
        }
    assert len(found) == 5 + len(agent.pretraining)
    assert {program: len(each) for program, each in found.items() if len(each) <= 5} == {}
    assert {
        program: all(each == HIGHEST for each in precisions) for program, precisions in found.items()
    } == {program: exact for program in found}


@pytest.mark.parametrize("agent", ["twister", "twm"])
def test_bfloat16_changes_losses_and_gradients_by_its_rounding_only(agent):
    """bfloat16 rounds to one part in 256; the fixtures, their inputs and samples are float32.

    The behaviour's losses come after a whole imagined rollout and are means of advantages of both signs,
    which cancel where rounding errors do not: like gradients, they agree to a tenth (seen: 0.014 and 0.041).
    """
    rows = parity.check(FIXTURES / f"{agent}_small.npz", jnp.bfloat16)
    losses = {row.name: row.error for row in rows if "loss" in row.name}
    assert len(losses) > 8
    assert {n: e for n, e in losses.items() if not e < (5e-3 if n.startswith("out/wm/") else 0.1)} == {}
    norms = {row.name: row.error for row in rows if row.name.endswith("#l2norm")}
    assert len(norms) > 50
    assert {n: e for n, e in norms.items() if not e < 0.1} == {}
