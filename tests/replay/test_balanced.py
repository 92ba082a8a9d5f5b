"""Drawing without replacement, uniformly or by how often a step was drawn before."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from twister_jax.replay import store
from twister_jax.replay.store import Replay, Transition

CAPACITY, STREAMS, COUNT = 12, 2, 5
draw = jax.jit(store.draw_balanced, static_argnums=(2, 4))


def visited(visits: np.ndarray, inserted: int) -> Replay:
    empty = store.init(STREAMS, CAPACITY, (1, 1, 1), 1)
    return empty.replace(visits=jnp.asarray(visits, jnp.int32), inserted=jnp.asarray(inserted, jnp.int32))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    inserted=st.integers(CAPACITY, 3 * CAPACITY),
    visits=st.lists(st.integers(0, 2_000), min_size=STREAMS * CAPACITY, max_size=STREAMS * CAPACITY),
    banned=st.sets(st.integers(0, STREAMS * CAPACITY - 1), max_size=STREAMS * CAPACITY - COUNT),
)
def test_draws_are_distinct_allowed_and_counted_once(seed, inserted, visits, banned):
    before = visited(np.array(visits).reshape(STREAMS, CAPACITY), inserted)
    allowed = ~np.isin(np.arange(STREAMS * CAPACITY), list(banned)).reshape(STREAMS, CAPACITY)
    stream, step, after = draw(before, jax.random.key(seed), COUNT, jnp.asarray(allowed), 20.0)
    drawn = list(zip(stream.tolist(), step.tolist(), strict=True))
    assert len(set(drawn)) == COUNT
    assert all(allowed[place] for place in drawn)
    expected = np.array(before.visits)
    slots = np.asarray(store.slot_of(before, step))
    for row, slot in zip(stream.tolist(), slots.tolist(), strict=True):
        expected[row, slot] += 1
    np.testing.assert_array_equal(after.visits, expected)


def test_first_draws_follow_the_softmax_of_negative_visits():
    visits = np.zeros((STREAMS, CAPACITY))
    visits[0, :6] = np.arange(6) * 10
    allowed = np.zeros((STREAMS, CAPACITY), bool)
    allowed[0, :6] = True
    keys = jax.random.split(jax.random.key(0), 20_000)
    before = visited(visits, CAPACITY)
    _, step, _ = jax.vmap(lambda key: store.draw_balanced(before, key, 1, jnp.asarray(allowed), 20.0))(keys)
    frequency = np.bincount(np.asarray(step)[:, 0], minlength=6) / len(keys)
    probability = np.exp(-visits[0, :6] / 20.0)
    np.testing.assert_allclose(frequency, probability / probability.sum(), atol=0.012)


def test_a_new_step_forgets_the_visits_of_the_one_it_replaces():
    full = visited(np.full((STREAMS, CAPACITY), 9), CAPACITY)
    step = Transition(
        image=jnp.zeros((STREAMS, 1, 1, 1), jnp.uint8),
        action=jnp.zeros((STREAMS, 1)),
        reward=jnp.zeros(STREAMS),
        terminal=jnp.zeros(STREAMS, bool),
        is_first=jnp.zeros(STREAMS, bool),
    )
    after = store.insert(full, step)
    assert after.visits[:, 0].tolist() == [0, 0]
    assert int(after.visits.min(axis=1)[0]) == 0
    assert int(after.visits[:, 1:].min()) == 9


def test_uniform_draws_are_uniform_and_distinct():
    allowed = np.ones((STREAMS, CAPACITY), bool)
    allowed[1, 3:] = False
    keys = jax.random.split(jax.random.key(1), 4_000)
    stream, step = jax.vmap(lambda key: store.draw_uniform(key, 5, jnp.asarray(allowed)))(keys)
    place = np.asarray(stream * CAPACITY + step)
    assert all(len(set(row)) == 5 for row in place.tolist())
    frequency = np.bincount(place.ravel(), minlength=STREAMS * CAPACITY) / len(keys)
    np.testing.assert_allclose(frequency[allowed.ravel()], 5 / 15, atol=0.04)
    assert not frequency[~allowed.ravel()].any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), held=st.integers(COUNT, CAPACITY), more=st.integers(1, 40))
def test_draws_do_not_depend_on_the_capacity(seed, held, more):
    """A run whose steps are raised has a larger store, and draws what it would have drawn from the start."""
    allowed = np.arange(CAPACITY + more) < np.full((STREAMS, 1), held)
    visits = np.random.default_rng(seed).integers(0, 50, allowed.shape) * allowed
    found = []
    for capacity in (CAPACITY, CAPACITY + more):
        replay = store.init(STREAMS, capacity, (1, 1, 1), 1).replace(
            visits=jnp.asarray(visits[:, :capacity], jnp.int32), inserted=jnp.int32(held)
        )
        fits = jnp.asarray(allowed[:, :capacity])
        stream, step, after = store.draw_balanced(replay, jax.random.key(seed), COUNT, fits, 20.0)
        uniform = store.draw_uniform(jax.random.key(seed), COUNT, fits)
        found.append(jax.device_get((stream, step, after.visits[:, :held], uniform)))
    jax.tree.map(np.testing.assert_array_equal, *found)
