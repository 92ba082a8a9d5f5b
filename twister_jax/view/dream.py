"""`python -m twister_jax dream`: what the world model foresees, in pictures and in numbers."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from twister_jax import envs
from twister_jax.agents.open_loop import CONTEXT, ROWS, OpenLoop, open_loop
from twister_jax.randomness import Purpose, key_for
from twister_jax.replay.store import Transition
from twister_jax.training.progress import Progress
from twister_jax.view import drawing
from twister_jax.view.drawing import Picture
from twister_jax.view.dream_env import STARTS, dream_of, make_vector_env
from twister_jax.view.extras import require
from twister_jax.view.policy import Policy
from twister_jax.view.recording import record
from twister_jax.view.watch import watch

SHOWN = 4
"""Starts in the video."""
STRIPS = 2
"""Starts in the picture."""
STRIP_STEPS = 16
"""Most steps of the picture's strips."""
STRIP_SIZE = 128
STRIP_GAP = 4
LINES = ("reward", "predicted", "end", "predicted")
LEGEND = "red frame: nothing of the game is seen any more, only the actions are known"
RATE = 4
SIZE = 192


@dataclasses.dataclass(frozen=True)
class Trust:
    """Mean errors of what was foreseen against the horizon, over the starts whose episode still went on.

    Attributes:
      image: mean absolute difference of a pixel, of 0 (black) to 1 (white).
      reconstruction: the same where every image is seen: the best that a prediction can reach.
      frozen: the same for the last image seen, repeated: the baseline that a prediction has to beat.
      reward: absolute error, of the reward as the agent learns it.
      seen_reward: the same with every image seen.
      continues: of the probability that the episode goes on.
      starts: how many were averaged.
    """

    image: Float[np.ndarray, " horizon"]
    reconstruction: Float[np.ndarray, " horizon"]
    frozen: Float[np.ndarray, " horizon"]
    reward: Float[np.ndarray, " horizon"]
    seen_reward: Float[np.ndarray, " horizon"]
    continues: Float[np.ndarray, " horizon"]
    starts: Float[np.ndarray, " horizon"]


def dream(
    policy: Policy, directory: Path, starts: int, horizon: int, make_env: Any = envs.make_vector_env
) -> list[Path]:
    """Open loops and free dreams from recorded starts: a strip, videos, a curve and its numbers.

    Args:
      policy: whose world model dreams.
      directory: where the files go.
      starts: windows of real play that the errors are averaged over.
      horizon: steps foreseen.
      make_env: as `envs.make_vector_env`.

    Returns:
      The files written.

    Raises:
      UserError: the agent has no world model, the environments fail, something is not installed, or a file
        cannot be written.
    """
    drawing.require_video()
    world_model, say = dream_of(policy), Progress().say
    plt = require("matplotlib.pyplot", "view", "a curve")
    stem = f"dream-{policy.about.get('env_steps', 0):07d}"
    windows = record(policy, starts, CONTEXT + horizon, make_env=make_env)
    key = key_for(policy.config.seed, Purpose.REPORT)
    compiled = jax.jit(lambda state, windows: open_loop(world_model, state, windows, CONTEXT, key))
    found: OpenLoop = jax.tree.map(np.asarray, compiled(policy.state, windows))
    learned = np.asarray(world_model.learned_reward(windows.reward))
    trust = trust_of(windows, found, learned)

    files = [
        directory / f"{stem}-{name}" for name in ("open_loop.png", "open_loop.mp4", "trust.json", "trust.png")
    ]
    order = np.argsort(-found.known.sum(axis=1), kind="stable")  # those that can be foreseen longest
    strips = [strip(windows, found, learned, int(start)) for start in order[:STRIPS]]
    drawing.save_png(files[0], drawing.stack([drawing.heading(LEGEND), *strips], 2 * STRIP_GAP))
    frames = (
        drawing.stack([panels(windows, found, learned, int(start), time) for start in order[:SHOWN]])
        for time in range(CONTEXT + horizon)
    )
    drawing.save_video(files[1], frames, RATE)
    values = {
        name: [None if np.isnan(v) else round(float(v), 6) for v in x] for name, x in vars(trust).items()
    }
    text = json.dumps({"env_steps": policy.about.get("env_steps"), "context": CONTEXT, **values}, indent=1)
    drawing.save(files[2], text + "\n")
    drawing.save_png(
        files[3], curve(plt, trust, f"{policy.config.game} after {policy.about.get('env_steps', 0):,} steps")
    )
    say(summary(trust))
    for path in files:
        say(f"→ {path}")

    say("free dreams, played like games:")
    free = record(policy, STARTS, CONTEXT, seed=1, make_env=make_env)
    return files + watch(
        policy, directory, STARTS // 2, make_vector_env(policy, free), f"{stem}-free", titles=["dream"]
    )


def trust_of(windows: Transition, found: OpenLoop, learned: np.ndarray) -> Trust:
    """Errors by the number of steps foreseen; NaN where every episode was over."""
    images = np.asarray(windows.image) / 255.0
    known = np.where(found.known, 1.0, np.nan)[:, CONTEXT:]

    def mean(error: np.ndarray) -> np.ndarray:
        each = error.reshape(*error.shape[:2], -1).mean(-1)[:, -known.shape[1] :] * known
        return np.array([np.nanmean(x) if np.any(~np.isnan(x)) else np.nan for x in each.T])

    goes_on = 1.0 - np.asarray(windows.terminal)
    return Trust(
        image=mean(np.abs(found.foreseen.image - images)),
        reconstruction=mean(np.abs(found.seen.image - images)),
        frozen=mean(np.abs(images[:, CONTEXT - 1 : CONTEXT] - images)),
        reward=mean(np.abs(found.foreseen.reward - learned)),
        seen_reward=mean(np.abs(found.seen.reward - learned)),
        continues=mean(np.abs(found.foreseen.continues - goes_on)),
        starts=np.nansum(known, axis=0),
    )


def summary(trust: Trust) -> str:
    """One line for people."""
    if np.isnan(trust.image).all():
        return "nothing could be foreseen: every episode ended with its context"
    useless = np.flatnonzero(trust.image > trust.frozen - 1e-6)
    until = "at every step" if not useless.size else f"up to step {useless[0]}" if useless[0] else "nowhere"
    last = np.flatnonzero(~np.isnan(trust.image))[-1]
    return (
        f"error of a pixel {trust.image[0]:.4f} after 1 step, {trust.image[last]:.4f} after {last + 1} "
        f"(seen: {np.nanmean(trust.reconstruction):.4f}); better than the last image repeated {until}; "
        f"error of the reward {np.nanmean(trust.reward):.3g}, of the end {np.nanmean(trust.continues):.3g}"
    )


# ---------------------------------------------------------------------------------------------- drawing


def _rows(windows: Transition, found: OpenLoop, start: int, time: int) -> list[Picture]:
    """In the order of `ROWS`."""
    truth = np.asarray(windows.image[start, time]) / 255.0
    seen, foreseen = found.seen.image[start, time], found.foreseen.image[start, time]
    difference = 0.5 + 0.5 * (foreseen - truth)
    return [drawing.to_uint8(np.asarray(image)) for image in (truth, seen, foreseen, difference)]


def _words(windows: Transition, found: OpenLoop, learned: np.ndarray, start: int, time: int) -> list[str]:
    """In the order of `LINES`."""
    predicted, continues = found.foreseen.reward[start, time], found.foreseen.continues[start, time]
    ended = "yes" if windows.terminal[start, time] else "no"
    return [f"{learned[start, time]:+z.2f}", f"{predicted:+z.2f}", ended, f"{1 - continues:.0%}"]


def strip(windows: Transition, found: OpenLoop, learned: np.ndarray, start: int) -> Picture:
    """Four rows over time, from the context's last steps to the episode's end; what is dreamt has a frame."""
    first, columns = CONTEXT - 3, []
    for time in range(first, min(first + STRIP_STEPS, int(found.known[start].sum()))):
        rows = [drawing.enlarge(row, STRIP_SIZE) for row in _rows(windows, found, start, time)]
        tall, since = drawing.stack(rows, STRIP_GAP), time - CONTEXT + 1
        title = f"dreamt {since}" if since > 0 else "seen"
        columns.append(
            drawing.beside([tall], [title], _words(windows, found, learned, start, time), border=since > 0)
        )
    names = drawing.labels(ROWS, LINES, columns[0].shape[0], rows[0].shape[0] + STRIP_GAP)
    return np.concatenate([names, *columns], axis=1)


def panels(windows: Transition, found: OpenLoop, learned: np.ndarray, start: int, time: int) -> Picture:
    """A frame of the video: the four pictures of one step side by side."""
    pictures = [drawing.enlarge(row, SIZE) for row in _rows(windows, found, start, time)]
    since = time - CONTEXT + 1
    state = "seen" if since <= 0 else f"dreamt for {since} step{'s' if since > 1 else ''}"
    if not found.known[start, time]:
        state, pictures = "after the episode's end", [picture // 4 for picture in pictures]
    reward, reward_predicted, end, end_predicted = _words(windows, found, learned, start, time)
    line = f"reward {reward} (predicted {reward_predicted})   end {end} (predicted {end_predicted})"
    return drawing.beside(pictures, ROWS, [state, line], border=since > 0)


def curve(plt: Any, trust: Trust, title: str) -> Picture:
    """Errors against the horizon."""
    steps = np.arange(1, len(trust.image) + 1)
    plots = {
        "image: mean error of a pixel": {
            "foreseen": trust.image,
            "seen": trust.reconstruction,
            "last image repeated": trust.frozen,
        },
        "reward: mean error": {"foreseen": trust.reward, "seen": trust.seen_reward},
        "end: mean error of its probability": {"foreseen": trust.continues},
    }
    figure, axes = plt.subplots(1, len(plots), figsize=(13, 4), layout="constrained")
    figure.suptitle(
        f"{title}: how far the model can be trusted (mean over up to {trust.starts.max():.0f} starts)"
    )
    for axis, (title, lines) in zip(axes, plots.items(), strict=True):
        for name, values in lines.items():
            axis.plot(steps, values, label=name, marker="." if len(steps) < 40 else None)
        axis.set_title(title, pad=16)  # above the axis's power of ten
        axis.set(xlabel="steps foreseen", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return np.asarray(drawing.Image.open(buffer).convert("RGB"))
