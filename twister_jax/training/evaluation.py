"""Evaluation: full games by the protocol, each counted once, and a record that says how they were played."""

import dataclasses
import importlib.metadata
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from twister_jax.agent import Agent, State
from twister_jax.config import Config, EnvConfig
from twister_jax.envs.base import EnvSpec, Episode, VectorEnv
from twister_jax.envs.games import REFERENCE_SCORES, human_normalized
from twister_jax.errors import UserError
from twister_jax.randomness import Purpose, generator_for, key_for
from twister_jax.training.background import Interrupted, Signals, compile_in_background, trace
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.metrics import Progress
from twister_jax.training.state import OnDevice, observe

MakeEnv = Callable[[str, EnvConfig, int, int], VectorEnv]
MakeAgent = Callable[[Config, EnvSpec], Agent]
FILE = "evaluation.json"


def allotment(episodes: int, num_envs: int) -> list[int]:
    """Games each environment plays, fixed beforehand: the first to finish must not play more of them.

    Otherwise short games, often bad ones, would be counted too often.
    """
    envs = min(episodes, num_envs)
    return [episodes // envs + (index < episodes % envs) for index in range(envs)]


def play(
    agent: Agent,
    state: State,
    env: VectorEnv,
    games: list[int],
    seed: int,
    tell: Progress | None = None,
    signals: Signals | None = None,
) -> list[Episode]:
    """Plays `games[i]` full games in environment i.

    Returns:
      Every counted game, by environment and then in order.

    Raises:
      Interrupted: a signal came.
    """
    signals = signals or Signals()
    step = env.reset()
    observation = observe(step)
    carry = jax.jit(lambda state: agent.init_carry(state, env.num_envs))(state)
    traced = trace(agent.act_evaluate, state, carry, observation, key_for(seed, Purpose.EVALUATE))
    act = compile_in_background({"act": traced})["act"].result(signals)
    played: list[list[Episode]] = [[] for _ in games]
    count = 0
    while any(len(mine) < wanted for mine, wanted in zip(played, games, strict=True)):
        action, carry = act(state, carry, observation, key_for(seed, Purpose.EVALUATE, count))
        chosen = np.asarray(action)
        step = env.step(chosen.argmax(-1) if env.spec.discrete else chosen)
        observation = observe(step)
        for episode in step.episodes:
            played[episode.env].append(episode)
            if len(played[episode.env]) == games[episode.env]:
                env.retire(episode.env)
        count += 1
        if tell and tell.due():
            done = [episode.score for mine in played for episode in mine]
            average = f"  mean {np.mean(done):.1f}" if done else ""
            tell.update(f"evaluating: {len(done)}/{sum(games)} games{average}  {count:,} steps")
        signals.check()
    return [episode for mine in played for episode in mine]


def run(
    config: Config,
    agent: Agent,
    state: State,
    make_env: MakeEnv,
    trained: Mapping[str, int],
    tell: Progress,
    signals: Signals,
) -> dict[str, Any]:
    """Plays the evaluation of `config`, prints the result and writes evaluation.json.

    `trained` has the `env_steps` and `updates` behind `state`.

    Raises:
      UserError: the environments fail, or the file cannot be written.
      Interrupted: a signal came.
    """
    games = allotment(config.evaluation.episodes, config.evaluation.num_envs)
    env_config = dataclasses.replace(
        config.env,
        noop_max=config.evaluation.noop_max,
        time_limit_frames=config.evaluation.time_limit_frames,
        num_envs=len(games),
    )
    seed = int(generator_for(config.seed, Purpose.EVALUATION_ENVIRONMENT).integers(2**31))
    try:
        env = make_env(config.game, env_config, len(games), seed)
        try:
            episodes = play(agent, state, env, games, config.seed, tell, signals)
        finally:
            env.close()
    except RuntimeError as error:
        raise UserError(f"evaluation failed: {error}") from error
    result = summarize(config, episodes, trained)
    path = Path(config.logdir) / FILE
    try:
        write_atomically(path, json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    human = result["human_normalized"]
    tell.close()
    tell.say(
        f"{config.game}: mean {result['mean']:g}, median {result['median']:g}, std {result['std']:.3g} over "
        f"{len(episodes)} games" + ("" if human is None else f", human-normalised {human:.3f}") + f" → {path}"
    )
    return result


def summarize(config: Config, episodes: list[Episode], trained: Mapping[str, int]) -> dict[str, Any]:
    """The content of evaluation.json."""
    scores = [float(episode.score) for episode in episodes]
    mean = statistics.fmean(scores)
    return {
        "game": config.game,
        "agent": config.agent,
        "episodes": len(scores),
        "mean": mean,
        "median": statistics.median(scores),
        "std": statistics.pstdev(scores),
        "scores": scores,
        "human_normalized": human_normalized(config.game, mean),
        **trained,
        "seed": config.seed,
        "protocol": protocol(config, episodes, trained),
    }


def protocol(config: Config, episodes: list[Episode], trained: Mapping[str, int]) -> dict[str, Any]:
    """How the games were played, and with what."""
    env, evaluation = config.env, config.evaluation
    random, human = REFERENCE_SCORES.get(config.game, (None, None))
    return {
        "score": "undiscounted sum of raw rewards of a full game",
        "std": "population standard deviation over the games",
        "human_normalized": "(mean - random) / (human - random)",
        "random_score": random,
        "human_score": human,
        "preset": config.preset,
        "frames": "64x64 "
        + ("grey" if env.grayscale else "RGB")
        + ", maximum of the last two emulator frames",
        "frame_skip": env.frame_skip,
        "training_frames": trained["env_steps"] * env.frame_skip,
        "sticky_actions": env.sticky_actions,
        "full_action_set": False,
        "life_loss_ends_game": False,
        "life_loss_ends_episode_in_training": env.life_loss_ends_episode,
        "fire_start": env.fire_start,
        "noop_max": evaluation.noop_max,
        "time_limit_frames": evaluation.time_limit_frames,
        "games_cut_by_time_limit": sum(episode.truncated for episode in episodes),
        "game_lengths": [int(episode.length) for episode in episodes],
        "actions": "sampled from the policy" if evaluation.sample_actions else "mode of the policy",
        "environments": len(allotment(evaluation.episodes, evaluation.num_envs)),
        "allotment": "number of games per environment fixed beforehand",
        "checkpoint": f"the newest, at agent step {trained['env_steps']}, not chosen by score",
        "latents": "sampled where the agent's paper samples them",
        "prefill_steps": config.train.prefill_steps,
        "updates_per_step": config.train.updates_per_step,
        "settings": dataclasses.asdict(evaluation),
        "precision": config.precision,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "commit": commit(),
    }


def is_current(path: Path, config: Config, env_steps: int, updates: int) -> bool:
    """Whether evaluation.json is of this run as it stands, under these settings."""
    try:
        found = json.loads(path.read_text())
        return (
            found["env_steps"] == env_steps
            and found["updates"] == updates
            and found["protocol"]["settings"] == dataclasses.asdict(config.evaluation)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def evaluate_directory(config: Config, make_agent: MakeAgent, make_env: MakeEnv) -> int:
    """Evaluates the newest checkpoint of `config.logdir`; returns the exit code."""
    tell = Progress()
    with Signals() as signals:
        try:
            env = make_env(config.game, config.env, 1, 0)
        except RuntimeError as error:
            raise UserError(f"cannot start {config.game}: {error}") from error
        env.close()
        agent = make_agent(config, env.spec)
        shapes = OnDevice.shapes(agent, env.spec, config.env.num_envs)
        loaded, host = Checkpointer(Path(config.logdir) / "checkpoints").load_state(shapes)
        trained = {name: host["counters"][name] for name in ("env_steps", "updates")}
        tell.say(f"evaluating {config.logdir} at step {trained['env_steps']:,}")
        try:
            run(config, agent, loaded.agent, make_env, trained, tell, signals)
        except Interrupted:
            tell.say(f"{signals.name}: stopped; nothing was written")
            return signals.exit_code
        finally:
            tell.close()
    return 0


def versions() -> dict[str, str]:
    """Of everything a score may depend on."""
    import platform

    found = {"python": platform.python_version()}
    for name in ("twister_jax", "jax", "jaxlib", "flax", "optax", "numpy", "ale-py"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The commit of the source tree, with `-dirty` where it was changed; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def write_atomically(path: Path, text: str) -> None:
    """The file is as before or complete, whatever happens."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
