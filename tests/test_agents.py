"""From a configuration to its agent: how it multiplies."""

import jax
import jax.numpy as jnp
import pytest

from twister_jax import config as configs
from twister_jax.agent import Observation
from twister_jax.agents import make_agent
from twister_jax.envs.base import EnvSpec

HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def products(jaxpr):
    """Precisions of all products of a traced program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.params["precision"]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize(
    ("backend", "precision", "exact"),
    [("gpu", "float32", True), ("gpu", "bfloat16", False), ("cpu", "float32", False)],
)
@pytest.mark.parametrize("agent", ["twister", "twm"])
def test_float32_is_not_left_to_an_accelerator_that_rounds(agent, backend, precision, exact, monkeypatch):
    """JAX's default is TF32 on NVIDIA hardware. Cumulative probabilities are exact everywhere."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = configs.make_config(agent, "debug", game="Pong", precision=precision)
    spec = EnvSpec(image_shape=(64, 64, 1 if config.env.grayscale else 3), num_actions=6)
    made = make_agent(config, spec)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(made.init, key)
    carry = jax.eval_shape(lambda state: made.init_carry(state, 2), state)
    seen = Observation(
        jax.ShapeDtypeStruct((2, *spec.image_shape), jnp.uint8), jax.ShapeDtypeStruct((2,), jnp.bool_)
    )
    found = list(products(jax.make_jaxpr(made.act)(state, carry, seen, key).jaxpr))
    assert len(found) > 5
    assert all(each == HIGHEST for each in found) == exact
