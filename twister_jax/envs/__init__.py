"""Environments: the Atari 100k protocol on ALE, and a tiny pixel task for tests."""

from twister_jax.envs.base import EnvSpec, EnvStep, Episode, VectorEnv
from twister_jax.envs.games import ATARI_100K, REFERENCE_SCORES, human_normalized, resolve_game
from twister_jax.envs.vector import make_vector_env

__all__ = [
    "ATARI_100K",
    "REFERENCE_SCORES",
    "EnvSpec",
    "EnvStep",
    "Episode",
    "VectorEnv",
    "human_normalized",
    "make_vector_env",
    "resolve_game",
]
