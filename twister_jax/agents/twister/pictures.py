"""Pictures of what the world model sees and foresees."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, UInt8

from twister_jax.agents.pictures import tile
from twister_jax.agents.twister.behavior import start_states
from twister_jax.agents.twister.world_model import WorldModel, to_float
from twister_jax.nn.distributions import KeySampler
from twister_jax.replay.store import Transition

CONTEXT = 8
"""Steps that the model sees before it has to go on alone."""
COLUMNS = 16
"""Steps shown."""


def open_loop_picture(
    model: WorldModel, windows: Transition, key: PRNGKeyArray
) -> UInt8[Array, "picture_height picture_width 3"]:
    """For every window three rows over time: truth, reconstruction, and imagination.

    The imagined row shows reconstructions for the first steps, then what the model foresees from there given
    only the actions that were really taken.
    """
    images = to_float(windows.image)
    batch, length = windows.is_first.shape
    context, columns = min(CONTEXT, length // 2), min(COLUMNS, length)
    key_observe, key_imagine = jax.random.split(key)
    posterior = model.posterior(images)
    seen = model.observe(posterior, windows.action, windows.is_first, KeySampler(key_observe), None)
    start = start_states(model, seen, windows.is_first, windows.terminal)
    here = jnp.arange(batch) * length + context - 1
    cache = dataclasses.replace(
        start.cache,
        keys=tuple(x[here] for x in start.cache.keys),
        values=tuple(x[here] for x in start.cache.values),
        visible=start.cache.visible[here],
    )
    position_table = model.transformer.position_table()

    def step(carry, inputs):
        latent, cache = carry
        action, key = inputs
        deter, cache = model.step(latent, action, cache, position_table)
        latent = model.prior(deter).draw(key).reshape(batch, -1)
        return (latent, cache), (latent, deter)

    actions = jnp.swapaxes(seen.actions[:, context:columns], 0, 1)
    keys = jax.random.split(key_imagine, columns - context)
    _, foreseen = jax.lax.scan(step, (start.latent[here], cache), (actions, keys))

    reconstructed = model.decode(seen.latent[:, :columns], seen.deter[:, :columns])
    decoded = model.decode(*(jnp.swapaxes(x, 0, 1) for x in foreseen))
    imagined = jnp.concatenate([reconstructed[:, :context], decoded], axis=1)
    rows = jnp.stack([images[:, :columns], reconstructed, imagined], axis=1)
    return tile(rows.reshape(batch * 3, *rows.shape[2:]))
