"""What a world model foresees, in numbers and files, and that a dream keeps the environments' contract."""

import dataclasses
import json

import numpy as np
import pytest

from twister_jax.agents.base import Glimpse
from twister_jax.agents.open_loop import CONTEXT, OpenLoop
from twister_jax.cli import main
from twister_jax.envs.base import Env
from twister_jax.envs.probe import probe
from twister_jax.errors import UserError
from twister_jax.replay.store import Transition
from twister_jax.view.dream import summary, trust_of
from twister_jax.view.dream_env import DreamEnv, dream_env, make_vector_env
from twister_jax.view.games import Games
from twister_jax.view.policy import load
from twister_jax.view.recording import record


@pytest.fixture(scope="module")
def starts(policy):
    return record(policy, 6, CONTEXT)


def test_windows_are_recorded_in_the_game(policy, starts):
    assert starts.image.shape == (6, CONTEXT, 64, 64, 3)
    again = record(policy, 6, CONTEXT)
    np.testing.assert_array_equal(starts.image, again.image)
    other = record(policy, 6, CONTEXT, seed=1)
    assert (starts.image != other.image).any()
    longer = record(policy, 9, 20)
    assert longer.reward.shape == (9, 20)
    assert set(np.unique(longer.reward)) <= {-1.0, 0.0, 1.0}
    assert (longer.terminal.sum(axis=1) == 2).all(), "a game of Catch takes ten steps with its reset"
    assert len({tuple(row) for row in longer.is_first}) > 2, "they begin anywhere in a game"
    assert (longer.action.sum(-1) == ~longer.is_first).all()


# ----------------------------------------------------------------------------------- as an environment


def test_a_dream_keeps_the_contract_of_environments(policy, starts):
    env = DreamEnv(policy, starts, seed=3)
    assert isinstance(env, Env)
    probe(env, "a dream")
    step = env.reset()
    assert step.is_first
    assert any((step.image == image).all() for image in starts.image[:, -1]), "it begins where a start ends"
    step = env.step(1)
    assert step.reward == pytest.approx(1 / 3), "what the third agent's model expects of any action"


def test_a_dream_goes_on_from_its_state(policy, starts):
    env, other = DreamEnv(policy, starts, seed=3), DreamEnv(policy, starts, seed=9)
    for action in (0, 1, 2, 1):
        env.step(action)
    other.set_state(json.loads(json.dumps(env.get_state())))
    for action in (2, 0):
        ours, theirs = env.step(action), other.step(action)
        np.testing.assert_array_equal(ours.image, theirs.image)
        assert ours[1:] == theirs[1:]


def test_dreams_are_played_like_games(brief, starts, monkeypatch):
    monkeypatch.setattr("twister_jax.view.dream_env.LONGEST", 20)
    games = Games(brief, 3, make_vector_env(brief, starts))
    assert [game.episode.truncated for game in games.games] == [True] * 3, "the model expects no end"
    frames = list(games.show(games.games[0]))
    assert frames[-1].score == pytest.approx(games.games[0].episode.score, rel=1e-5)


def test_from_a_run_alone(run):
    env = dream_env(run)
    assert env.spec == load(run).spec
    assert env.reset().is_first


def test_agents_without_a_world_model_are_refused(policy, starts):
    blind = dataclasses.replace(policy, agent=dataclasses.replace(policy.agent, dream=None))
    with pytest.raises(UserError, match="no world model to dream with"):
        dream_env(blind, starts)


# ------------------------------------------------------------------------------------------ in numbers


def test_errors_against_the_horizon_are_of_what_can_be_foreseen():
    length = CONTEXT + 2
    shape = (2, length)
    image = np.zeros((*shape, 2, 2, 1), np.uint8)
    image[:, CONTEXT:] = 255
    zeros = np.zeros(shape)
    terminal = zeros > 0
    terminal[0, CONTEXT + 1] = True
    windows = Transition(image, zeros[..., None], zeros, terminal, zeros > 0)
    known = np.ones(shape, bool)
    known[1, CONTEXT + 1] = False
    pixels = image / 255.0
    seen = Glimpse(pixels, zeros + 0.25, zeros + 1, zeros)
    decoded = np.where(known[..., None, None, None], pixels * 0.5, 9.0)
    foreseen = Glimpse(decoded, zeros + 2, zeros + 0.75, zeros)
    trust = trust_of(windows, OpenLoop(seen, foreseen, known), zeros)
    np.testing.assert_allclose(trust.image, [0.5, 0.5])
    np.testing.assert_allclose(trust.reconstruction, [0, 0])
    np.testing.assert_allclose(trust.frozen, [1, 1])
    np.testing.assert_allclose(trust.reward, [2, 2])
    np.testing.assert_allclose(trust.seen_reward, [0.25, 0.25])
    np.testing.assert_allclose(trust.continues, [0.25, 0.75])
    np.testing.assert_allclose(trust.starts, [2, 1])
    assert "better than the last image repeated at every step" in summary(trust)
    for image, said in (([0.5, 2.0], "up to step 1;"), ([2.0, 0.5], "nowhere;")):
        worse = dataclasses.replace(trust, image=np.array(image))
        assert f"better than the last image repeated {said}" in summary(worse)


def test_dream_writes_pictures_videos_and_numbers(run, capsys, monkeypatch):
    monkeypatch.setattr("twister_jax.view.dream_env.LONGEST", 20)
    assert main(["dream", str(run), "--starts", "8", "--horizon", "12"]) == 0
    stem = "dream-0000060"
    written = {path.name for path in (run / "dreams").iterdir()}
    names = ("open_loop.png", "open_loop.mp4", "trust.json", "trust.png", "free-best.mp4")
    assert {f"{stem}-{name}" for name in names} <= written
    numbers = json.loads((run / "dreams" / f"{stem}-trust.json").read_text())
    assert len(numbers["image"]) == 12
    assert numbers["image"] == numbers["frozen"], "the third agent's model expects that nothing changes"
    assert numbers["starts"][0] >= numbers["starts"][5] >= 1
    assert numbers["reconstruction"][5] == 0
    assert numbers["image"][5] > 0
    assert "error of a pixel" in capsys.readouterr().out
