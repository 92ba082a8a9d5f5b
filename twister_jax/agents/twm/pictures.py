"""Pictures of what the world model sees and foresees."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, UInt8

from twister_jax.agents.pictures import tile
from twister_jax.agents.twm.dynamics import Dynamics
from twister_jax.agents.twm.observation import ObservationModel, flat, to_float
from twister_jax.agents.twm.windows import Windows

CONTEXT = 8
"""Steps that the model sees before it has to go on alone."""


def open_loop_picture(
    observation: ObservationModel, dynamics: Dynamics, windows: Windows, key: PRNGKeyArray
) -> UInt8[Array, "picture_height picture_width 3"]:
    """For every window three rows over time: truth, reconstruction, and imagination.

    The imagined row shows reconstructions for the first steps, then what the model foresees from there given
    only the actions that were really taken.
    """
    frames = to_float(windows.frames)[:, :-1]
    batch, steps = frames.shape[:2]
    context = min(CONTEXT, steps // 2)
    latent = flat(observation.encoder(frames).mode())
    memory = dynamics.empty_memory(batch, steps)
    position_keys = dynamics.position_keys(memory.keys[0].shape[2])
    episode = jnp.pad(jnp.cumsum(windows.last[:, :-1], axis=1), ((0, 0), (1, 0)))
    _, memory = dynamics.step(memory, position_keys, 0, None, latent[:, 0], windows.action[:, 0], episode)

    def body(carry, inputs):
        memory, reward, foreseen = carry
        step, seen, seen_reward, action, key = inputs
        known = step < context
        here = jnp.where(known, seen, foreseen)
        reward = jnp.where(known, seen_reward, reward)
        hidden, memory = dynamics.step(memory, position_keys, step, reward, here, action, episode)
        predictions = dynamics.predict(hidden)
        return (memory, predictions.reward, flat(predictions.latent.draw(key))), here

    def over_time(x: Array) -> Array:
        return jnp.swapaxes(x[:, 1:steps], 0, 1)

    inputs = (
        jnp.arange(1, steps),
        over_time(latent),
        jnp.swapaxes(windows.reward[:, : steps - 1], 0, 1),
        over_time(windows.action),
        jax.random.split(key, steps - 1),
    )
    _, imagined = jax.lax.scan(body, (memory, windows.reward[:, 0], latent[:, 0]), inputs)
    imagined = jnp.concatenate([latent[:, :1], jnp.swapaxes(imagined, 0, 1)], axis=1)
    rows = jnp.stack([frames, observation.decoder(latent), observation.decoder(imagined)], axis=1)
    newest = rows.reshape(batch * 3, *rows.shape[2:])[..., -1:]
    return tile(newest - 0.5)
