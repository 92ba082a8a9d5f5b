"""Run directories as training leaves them, without the training."""

import json
from pathlib import Path

import numpy as np

from experiments import suite
from twister_jax import envs, presets


def config(agent="twister", game="Breakout", seed=0, preset="paper", **overrides):
    made = presets.make_config(agent, preset, game, seed=seed, **overrides).to_dict()
    return json.loads(json.dumps(made))


def evaluation(game, score, seed=0, agent="twister", steps=100_000, **protocol):
    references = envs.resolve(game)[0].reference_scores(game) or (None, None)
    record = {
        "suite": "atari",
        "frame_skip": 4,
        "noop_max": 30,
        "random_score": references[0],
        "human_score": references[1],
        "device": "cpu",
        "versions": {"jax": "0.10.2"},
        "commit": "0" * 40,
        "game_lengths": [100 + seed],
        "notes": [],
        **protocol,
    }
    return {
        "game": game,
        "agent": agent,
        "episodes": 1,
        "mean": float(score),
        "scores": [float(score)],
        "env_steps": steps,
        "updates": steps,
        "seed": seed,
        "protocol": record,
    }


def rows(steps, count, score, seed=0, pace=10.0):
    generator = np.random.default_rng(seed)
    for at in np.linspace(steps / count, steps, count).astype(int):
        value = score * at / steps * (1 + 0.1 * generator.standard_normal())
        yield {
            "env_steps": int(at),
            "updates": int(at),
            "wall_seconds": round(at / pace, 3),
            "episode/score": float(value),
        }


def write_run(directory: Path, game, score, seed=0, agent="twister", count=20, done=True, **protocol):
    """A run of 100,000 steps, finished or halfway."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config(agent, game, seed)))
    lines = [json.dumps(row) for row in rows(100_000, count, score, seed)]
    lines = lines if done else lines[: count // 2]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if done:
        result = evaluation(game, score, seed, agent, **protocol)
        (directory / "evaluation.json").write_text(json.dumps(result))
    return directory


def write_suite(root: Path, scores, agent="twister", name="some", **kept):
    """A suite's directory with its plan, with a run for each score [seed] of every game."""
    chosen = suite.Suite(
        name=name,
        preset="paper",
        games=tuple(scores),
        seeds=tuple(range(max(map(len, scores.values())))),
        sets={agent: suite.Set(agent)},
    )
    directory = root / name
    plan = suite.plan(chosen)
    suite.write_plan(directory, plan)
    for run in plan.runs:
        if run.seed < len(scores[run.game]):
            write_run(
                directory / run.directory, run.game, scores[run.game][run.seed], run.seed, agent, **kept
            )
    return directory
