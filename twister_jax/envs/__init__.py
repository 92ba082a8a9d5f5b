"""The registry of environment suites: a line each."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from twister_jax.errors import UserError
from twister_jax.fields import did_you_mean
from twister_jax.files import one_line

if TYPE_CHECKING:
    from twister_jax.config import EnvConfig
    from twister_jax.envs.base import Suite
    from twister_jax.envs.vector import SerialVectorEnv

SUITES: dict[str, str] = {
    "catch": "twister_jax.envs.catch",
    "atari": "twister_jax.envs.atari",
    "dmc": "twister_jax.envs.dmc",
    "gym": "twister_jax.envs.gym",
    "remember": "twister_jax.envs.remember",
}
"""Name -> module with a `SUITE`. Names without a suite are looked up in this order."""

DEFAULT_GAME = "Breakout"


def register(name: str, module: str) -> None:
    """Adds a suite: `module` has a `SUITE`, an instance of `envs.base.Suite`, whose name is `name`."""
    SUITES[name] = module


def suite(name: str) -> "Suite":
    """The suite of this name.

    Raises:
      UserError: there is none.
    """
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r}{did_you_mean(name, SUITES)}; one of {', '.join(SUITES)}")
    return importlib.import_module(SUITES[name]).SUITE


def resolve(game: str) -> "tuple[Suite, str]":
    """The suite that a game belongs to, and its name there, from any spelling: `NAME` or `SUITE:NAME`.

    Raises:
      UserError: there is no such game; the message offers close matches.
    """
    prefix, colon, name = game.partition(":")
    if colon:
        candidates, name = [suite(prefix.lower())], name
    else:
        candidates, name = [each for each in map(suite, SUITES) if not each.prefixed], game
    for each in candidates:
        found = each.resolve(name)
        if found is not None:
            return each, found
    near = did_you_mean(name, [each for candidate in candidates for each in candidate.names()])
    if not colon:
        others = [each for each in map(suite, SUITES) if each.prefixed]
        full = [f"{each.name}:{known}" for each in others for known in each.names()]
        near, candidates = near or did_you_mean(name, full), candidates + others
    offered = "; ".join(candidate.description for candidate in candidates)
    raise UserError(f"unknown game {game!r}{near}: expected {offered}")


def full_name(game: str) -> str:
    """The one right spelling of a game, with its suite where that is needed.

    Raises:
      UserError: nothing is called so.
    """
    found, name = resolve(game)
    return f"{found.name}:{name}" if found.prefixed else name


def admit(game: str) -> None:
    """Imports what a game needs of other people's code. Only for names that a person typed: it runs.

    Raises:
      UserError: it cannot be imported.
    """
    found, name = resolve(game)
    module = found.code(name)
    try:
        if module:
            importlib.import_module(module)
    except Exception as error:  # whatever the module does
        raise UserError(
            f"{game}: module {module} cannot be imported ({type(error).__name__}: {one_line(error)}): "
            f"install it, or start where Python finds it"
        ) from error


def check_admitted(game: str) -> None:
    """Raises `UserError` where a game needs a module that nobody imported."""
    found, name = resolve(game)
    check_imported(found.code(name), game)


def check_imported(module: str, game: str) -> None:
    """The same of a module by name; what makes an environment asks here, wherever the name came from."""
    if module and module not in sys.modules:
        raise UserError(
            f"{game} would run the code of the module {module}, and a name alone does not allow that: "
            f"if you trust it, say --game {game}, or in Python import {module} first"
        )


def make_vector_env(
    game: str,
    settings: "EnvConfig | None",
    num_envs: int,
    seed: int,
    *,
    evaluation: bool = False,
    first: int = 0,
    total: int | None = None,
) -> "SerialVectorEnv":
    """Environments of one game, after a probe on a throwaway one.

    Args:
      game: any spelling that `resolve` knows.
      settings: of the suite's class; None means as published. Its `num_envs` is not looked at.
      num_envs: how many to step together.
      seed: decides everything random in all of them.
      evaluation: whether games are played to be counted.
      first: number of the first of them among `total`.
      total: how many there are in all; by default `num_envs`.

    Raises:
      UserError: there is no such game, or it cannot be made here.
      RuntimeError: the probe found images blank or resets not as `Env` promises.
    """
    from twister_jax.envs.probe import probe
    from twister_jax.envs.vector import SerialVectorEnv, close

    found, name = resolve(game)
    chosen: Any = found.settings if settings is None else settings

    throwaway = found.make(name, found.for_probe(chosen), seed, evaluation=evaluation)
    try:
        probe(throwaway, game)
    finally:
        close(throwaway)
    identity = {"game": full_name(game), "evaluation": evaluation, **found.identity(name, chosen)}
    return SerialVectorEnv(
        lambda seed: found.make(name, chosen, seed, evaluation=evaluation),
        num_envs,
        seed,
        identity,
        first=first,
        total=total,
    )
