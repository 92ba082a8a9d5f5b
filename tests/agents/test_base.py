"""What all agents share: one update's keys, losses and health by name, networks that skip a bad step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twister_jax.agents.base import Agent, Health, Trained, weighted_sum
from twister_jax.config import OptimizerConfig

ADAM = OptimizerConfig(learning_rate=0.1, epsilon=1e-8, clip_norm=100.0)


def leaves_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# ---- the keys of an update -----------------------------------------------------------------------


def spy() -> Agent:
    """An agent that does nothing but tell which keys it was given."""
    names = [field.name for field in dataclasses.fields(Agent) if field.default is dataclasses.MISSING]
    functions = {
        "sample": lambda replay, key: ({"key": jax.random.key_data(key)}, replay),
        "learn": lambda state, batch, key: (
            {"sample": batch["key"], "learn": jax.random.key_data(key)},
            {"loss": jnp.zeros(())},
        ),
    }
    return Agent(**{name: functions.get(name) for name in names})


def test_sampling_and_learning_get_different_keys():
    agent, seen = spy(), []
    for seed in range(3):
        key = jax.random.key(seed)
        state, _, _ = agent.update({}, {}, key)
        expected = jax.random.key_data(jax.random.split(key))
        np.testing.assert_array_equal([state["sample"], state["learn"]], expected)
        seen += [state["sample"], state["learn"], jax.random.key_data(key)]
    assert len(np.unique(np.stack(seen), axis=0)) == 9


# ---- losses by name ------------------------------------------------------------------------------


def test_losses_are_summed_by_name():
    losses = {"image": jnp.asarray(2.0), "reward": jnp.asarray(5.0)}
    assert float(weighted_sum(losses, {"reward": 10.0, "image": 0.5})) == 51.0
    for scales in (
        {"image": 1.0},
        {"image": 1.0, "reward": 1.0, "continue": 1.0},
        {"image": 1.0, "rewards": 1.0},
    ):
        with pytest.raises(AssertionError):
            weighted_sum(losses, scales)


# ---- networks that skip a bad step ---------------------------------------------------------------


@pytest.fixture
def trained():
    params = {"actor": {"w": jnp.ones(3)}, "critic": {"w": jnp.ones(2)}, "frozen": {"w": jnp.ones(1)}}
    return Trained.begin(params, {"actor": ADAM, "critic": ADAM})


def test_a_step_moves_one_network_alone(trained):
    assert trained.optimizers.keys() == {"actor", "critic"}
    gradients = {"w": jnp.asarray([3.0, 4.0, 0.0])}
    stepped, norm, finite = trained.step("actor", ADAM, gradients, {"policy": jnp.ones(())})
    assert float(norm) == 5.0
    assert {name: bool(value) for name, value in finite.items()} == {"policy": True, "actor_gradient": True}
    np.testing.assert_allclose(stepped.params["actor"]["w"], [0.9, 0.9, 1.0], rtol=1e-5)
    assert int(stepped.optimizers["actor"].adam[1].count) == 1
    for name in ("critic", "frozen"):
        assert leaves_equal(stepped.params[name], trained.params[name])
    assert leaves_equal(stepped.optimizers["critic"], trained.optimizers["critic"])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_step_with_a_loss_that_is_not_finite_is_skipped(trained, bad):
    losses = {"first": jnp.ones(()), "second": jnp.asarray(bad), "third": jnp.ones(())}
    stepped, norm, finite = trained.step("actor", ADAM, {"w": jnp.ones(3)}, losses)
    assert leaves_equal(stepped, trained)
    assert np.isfinite(norm)
    found = {name for name, value in finite.items() if not value}
    assert (found, finite.keys()) == ({"second"}, {"first", "second", "third", "actor_gradient"})


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(trained, bad):
    gradients = {"w": jnp.asarray([1.0, bad, 1.0])}
    stepped, _, finite = trained.step("actor", ADAM, gradients, {"policy": jnp.ones(())})
    assert leaves_equal(stepped, trained)
    assert {name: bool(value) for name, value in finite.items()} == {"policy": True, "actor_gradient": False}


# ---- health by name ------------------------------------------------------------------------------

TERMS = ("image", "reward", "actor", "actor_gradient")


def record(health, *bad, known=TERMS):
    return jax.jit(Health.record)(health, {name: jnp.asarray(name not in bad) for name in known})


def test_health_counts_streaks_and_keeps_what_began_the_last_one():
    health = Health.sound(TERMS)
    assert health.first_bad_name == "nothing"
    seen = []
    for bad in ((), ("reward",), ("image", "actor"), (), ("actor_gradient",), (), ()):
        health = record(health, *bad)
        counts = int(health.skipped), int(health.consecutive), int(health.longest)
        seen.append((*counts, health.first_bad_name))
    assert seen == [
        (0, 0, 0, "nothing"),
        (1, 1, 1, "reward"),
        (2, 2, 2, "reward"),
        (2, 0, 2, "reward"),
        (3, 1, 2, "actor_gradient"),
        (3, 0, 2, "actor_gradient"),
        (3, 0, 2, "actor_gradient"),
    ]


def test_health_goes_by_name_and_not_by_position():
    """An update may compute some of the terms only, and in any order."""
    health = record(Health.sound(TERMS), "reward", known=("actor", "reward"))
    assert health.first_bad_name == "reward"
    assert np.asarray(health.first_bad).tolist() == [False, True, False, False]
    health = record(Health.sound(TERMS), "actor_gradient", "image", known=TERMS[::-1])
    assert health.first_bad_name == "image"
    assert np.asarray(health.first_bad).tolist() == [True, False, False, True]


def test_an_unknown_term_is_no_term_of_this_agent():
    with pytest.raises(AssertionError, match=r"unknown terms.*'imag'"):
        Health.sound(TERMS).record({"imag": jnp.asarray(True), "reward": jnp.asarray(True)})
