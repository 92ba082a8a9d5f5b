"""Evaluation: full games by the protocol, each counted once, and a record that says how they were played."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from twister_jax import envs, files, foreign_json
from twister_jax.agents.base import Agent, State
from twister_jax.config import Config
from twister_jax.envs.base import EnvStep, Episode, VectorEnv
from twister_jax.errors import UserError
from twister_jax.randomness import Purpose, generator_for, key_for
from twister_jax.training.kept_games import KeptGames, Standing, fingerprint
from twister_jax.training.load import checked, load_run
from twister_jax.training.lock import LostError
from twister_jax.training.programs import Programs
from twister_jax.training.progress import Progress
from twister_jax.training.provenance import commit, versions
from twister_jax.training.signals import Interrupted, Signals
from twister_jax.training.state import MakeEnv, observe

FILE = "evaluation.json"

OnStep = Callable[[np.ndarray | None, EnvStep], None]
"""Sees the actions of all environments [env, num_actions], and the step that came of them."""


def games_per_env(episodes: int, num_envs: int) -> list[int]:
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
    progress: Progress | None = None,
    signals: Signals | None = None,
    on_step: OnStep = lambda action, step: None,
    kept: KeptGames | None = None,
) -> list[Episode]:
    """Plays `games[i]` full games in environment i, going on from the games that are `kept`.

    `on_step` is shown everything: the reset with the action None, then every action and what came of it.

    Returns:
      Every counted game, by environment and then in order.

    Raises:
      Interrupted: a signal came; where the evaluation stands was kept.
    """
    signals = signals or Signals()
    step = env.reset()
    on_step(None, step)
    observation = observe(agent, step)
    carry = jax.jit(lambda state: agent.init_carry(state, env.num_envs))(state)
    traced = jax.jit(agent.act_evaluate).trace(state, carry, observation, key_for(seed, Purpose.EVALUATE))
    act = Programs({"act": traced}, signals)["act"]
    played: list[list[Episode]] = [[] for _ in games]
    count = 0
    if kept and (standing := kept.find(env, games, (carry, observation))):
        count, played, (carry, observation) = standing.count, standing.played, standing.acting
    while any(len(mine) < wanted for mine, wanted in zip(played, games, strict=True)):
        action, carry = act(state, carry, observation, key_for(seed, Purpose.EVALUATE, count))
        vectors = np.asarray(action)
        step = env.step(env.spec.to_env(vectors))
        on_step(vectors, step)
        observation = observe(agent, step)
        for episode in step.episodes:
            played[episode.env].append(episode)
            if len(played[episode.env]) == games[episode.env]:
                env.retire(episode.env)
        count += 1
        if progress and progress.due():
            done = [episode.score for mine in played for episode in mine]
            average = f"  mean {np.mean(done):.1f}" if done else ""
            progress.update(f"evaluating: {len(done)}/{sum(games)} games{average}  {count:,} steps")
        if kept and (signals.received or kept.due()):
            kept.keep(Standing(count, played, env.get_state(), (carry, observation)))
        signals.check()
    return [episode for mine in played for episode in mine]


def run(
    config: Config,
    agent: Agent,
    state: State,
    make_env: MakeEnv,
    trained: Mapping[str, int],
    progress: Progress,
    signals: Signals,
    notes: Sequence[str] = (),
    check_held: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Plays the evaluation of `config`, prints the result and writes evaluation.json.

    `trained` has the `env_steps` and `updates` behind `state`; `check_held` raises where the directory is not
    the run's any more.

    Raises:
      UserError: the environments fail, or the file cannot be written.
      Interrupted: a signal came; the games so far are kept, and the next call goes on from there.
    """
    what = {**trained, "game": config.game, "seed": config.seed, "settings": _settings(config)}
    directory = Path(config.logdir)
    minutes = config.train.checkpoint_minutes
    kept = KeptGames(directory, fingerprint(what, state), minutes, progress.say, check_held)
    games = games_per_env(config.evaluation.episodes, config.evaluation.num_envs)
    seed = int(generator_for(config.seed, Purpose.EVALUATION_ENVIRONMENT).integers(2**31))
    try:
        env = make_env(config.game, config.env, len(games), seed, evaluation=True)
        try:
            episodes = play(agent, state, env, games, config.seed, progress, signals, kept=kept)
        finally:
            env.close()
    except RuntimeError as error:
        raise UserError(f"evaluation failed: {error}") from error
    result = summarize(config, episodes, trained, notes)
    path = directory / FILE
    progress.close()
    try:
        check_held()
        files.write_atomically(path, json.dumps(result, indent=2) + "\n")
    except (OSError, LostError) as error:
        progress.say(json.dumps(result))  # hours of games are in it
        if isinstance(error, LostError):
            raise
        raise UserError(f"{path} cannot be written ({error}): its content is printed above") from error
    kept.forget()
    human = result["human_normalized"]
    progress.say(
        f"{config.game}: mean {result['mean']:g}, median {result['median']:g}, std {result['std']:.3g} over "
        f"{len(episodes)} games" + ("" if human is None else f", human-normalised {human:.3f}") + f" → {path}"
    )
    return result


def summarize(
    config: Config, episodes: list[Episode], trained: Mapping[str, int], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """The content of evaluation.json."""
    scores = [float(episode.score) for episode in episodes]
    mean = statistics.fmean(scores)
    suite, name = envs.resolve(config.game)
    return {
        "game": config.game,
        "agent": config.agent,
        "episodes": len(scores),
        "mean": mean,
        "median": statistics.median(scores),
        "std": statistics.pstdev(scores),
        "scores": scores,
        "human_normalized": suite.normalize(name, mean),
        **trained,
        "seed": config.seed,
        "protocol": {**protocol(config, episodes, trained), "notes": list(notes)},
    }


def protocol(config: Config, episodes: list[Episode], trained: Mapping[str, int]) -> dict[str, Any]:
    """How the games were played, and with what; what concerns the environment, its suite says."""
    suite, name = envs.resolve(config.game)
    of_env = suite.protocol(name, config.env)
    random, human = suite.reference_scores(name) or (None, None)
    evaluation = config.evaluation
    return {
        "score": "undiscounted sum of raw rewards of a full game",
        "std": "population standard deviation over the games",
        "human_normalized": "(mean - random) / (human - random)" if random is not None else None,
        "random_score": random,
        "human_score": human,
        "preset": config.preset,
        "suite": suite.name,
        **of_env,
        "training_frames": trained["env_steps"] * of_env.get("frame_skip", 1),
        "games_cut_by_time_limit": sum(episode.truncated for episode in episodes),
        "game_lengths": [int(episode.length) for episode in episodes],
        "actions": "sampled from the policy" if evaluation.sample_actions else "mode of the policy",
        "environments": len(games_per_env(evaluation.episodes, evaluation.num_envs)),
        "games_per_environment": "fixed beforehand",
        "checkpoint": f"at agent step {trained['env_steps']}, not chosen by score",
        "latents": "sampled where the agent's paper samples them",
        "prefill_steps": config.train.prefill_steps,
        "updates_per_step": config.train.updates_per_step,
        "settings": _settings(config),
        "precision": config.precision,
        "device": jax.devices()[0].device_kind,
        "devices": config.parallel.data,
        "versions": versions(),
        "commit": commit(),
    }


def _settings(config: Config) -> dict[str, Any]:
    """Whatever decides how games are played."""
    settings = {"evaluation": dataclasses.asdict(config.evaluation), "env": dataclasses.asdict(config.env)}
    return json.loads(json.dumps(settings))


def is_current(path: Path, config: Config, trained: Mapping[str, int]) -> bool:
    """Whether evaluation.json is of this run as it stands, under these settings."""
    try:
        found = foreign_json.parse(files.read(path, 1 << 24))
        return all(found[name] == value for name, value in trained.items()) and found["protocol"][
            "settings"
        ] == _settings(config)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def evaluate_directory(directory: str, step: int | None, overrides: Mapping[str, Any]) -> int:
    """Evaluates a checkpoint of a run, the newest unless `step` says another; returns the exit code.

    Raises:
      UserError: it is no run, has no such checkpoint, or the environments fail.
    """
    progress = Progress()
    loaded = load_run(directory, step, **overrides)
    trained = {name: getattr(loaded.counters, name) for name in ("env_steps", "updates")}
    progress.say(f"evaluating {directory} at step {trained['env_steps']:,}")
    with Signals() as signals:
        try:
            run(
                loaded.config,
                loaded.agent,
                loaded.state,
                checked(envs.make_vector_env, loaded.spec),
                trained,
                progress,
                signals,
                loaded.counters.notes,
            )
        except Interrupted:
            progress.say(f"{signals.name}: stopped; the same command goes on with the games that are left")
            return signals.exit_code
        finally:
            progress.close()
    return 0
