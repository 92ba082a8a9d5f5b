import dataclasses
import json
import logging

import ale_py
import numpy as np
import pytest

from twister_jax.envs import make_vector_env, vector
from twister_jax.envs.atari import REFERENCE_SCORES, AtariConfig, AtariEnv
from twister_jax.envs.catch import CatchConfig, CatchEnv
from twister_jax.envs.probe import probe
from twister_jax.envs.vector import SerialVectorEnv
from twister_jax.errors import UserError


def play(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [env.step(rng.integers(0, env.spec.num_actions, env.num_envs)) for _ in range(steps)]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a[:4], b[:4], strict=True):
            np.testing.assert_array_equal(x, y)
        assert a.episodes == b.episodes


def test_each_environment_plays_its_own_games_in_full():
    seeds = []

    def make(seed):
        seeds.append(seed)
        return CatchEnv(seed)

    together = SerialVectorEnv(make, 3, 0, {"game": "Catch"})
    alone = [CatchEnv(seed) for seed in seeds]
    assert len(set(seeds)) == 3
    assert together.reset().is_first.all()
    [env.reset() for env in alone]
    rng = np.random.default_rng(0)
    finished = 0
    for _ in range(500):
        actions = rng.integers(0, 3, 3)
        step = together.step(actions)
        expected = [env.step(int(a)) for env, a in zip(alone, actions, strict=True)]
        np.testing.assert_array_equal(step.image, [each.image for each in expected])
        assert step.reward.tolist() == [each.reward for each in expected]
        assert step.terminal.tolist() == [each.terminal for each in expected]
        assert step.is_first.tolist() == [each.is_first for each in expected]
        episodes = [each.episode._replace(env=i) for i, each in enumerate(expected) if each.episode]
        assert list(step.episodes) == episodes
        finished += len(episodes)
    assert finished == 3 * 50


def test_a_retired_environment_stands_still_and_disturbs_nobody():
    env, undisturbed = (make_vector_env("Catch", None, 3, 0) for _ in range(2))
    env.reset()
    undisturbed.reset()
    last = play(env, 7)[-1]
    play(undisturbed, 7)
    env.retire(1)
    for ours, theirs in zip(play(env, 30, seed=1), play(undisturbed, 30, seed=1), strict=True):
        np.testing.assert_array_equal(ours.image[1], last.image[1])
        assert (ours.reward[1], ours.terminal[1], ours.is_first[1]) == (0, False, False)
        for x, y in zip(ours[:4], theirs[:4], strict=True):
            np.testing.assert_array_equal(x[[0, 2]], y[[0, 2]])
        assert ours.episodes == tuple(episode for episode in theirs.episodes if episode.env != 1)
    assert env.reset().is_first.all()
    assert any(step.is_first[1] for step in play(env, 10))


def test_shapes_and_types():
    step = make_vector_env("catch", None, 2, 0).reset()
    assert (step.image.shape, step.image.dtype) == ((2, 64, 64, 3), np.uint8)
    assert (step.reward.shape, step.reward.dtype) == ((2,), np.float32)
    assert (step.terminal.dtype, step.is_first.dtype) == (bool, bool)


@pytest.mark.parametrize("game", ["Catch", "Pong"])
def test_the_seed_decides_everything(game):
    def run(seed):
        env = make_vector_env(game, None, 2, seed)
        return [env.reset(), *play(env, 20)]

    assert_same(run(1), run(1))
    with pytest.raises(AssertionError):
        assert_same(run(1), run(2))


def test_environments_differ_from_each_other():
    env = make_vector_env("MsPacman", None, 2, 0)
    step = env.reset()
    assert (step.image[0] != step.image[1]).any()


def test_returned_arrays_are_never_written_again():
    env = make_vector_env("Catch", None, 2, 0)
    steps = [env.reset(), *play(env, 20)]
    copies = [step._replace(image=step.image.copy(), reward=step.reward.copy()) for step in steps]
    play(env, 20)
    assert_same(steps, copies)


def test_atari_settings_reach_the_emulator():
    config = AtariConfig(grayscale=True, frame_skip=2, time_limit_frames=10)
    env = make_vector_env("ALE/Pong-v5", config, 1, 0)
    assert env.spec.image_shape == (64, 64, 1)
    env.reset()
    episodes = [step.episodes for step in play(env, 11)]
    assert [len(each) for each in episodes] == [0, 0, 0, 0, 1] + [0] * 5 + [1]
    assert episodes[4][0][2:] == (5, True)


def test_evaluation_has_a_time_limit_and_no_ops_of_its_own():
    config = AtariConfig(
        noop_max=30, time_limit_frames=8, evaluation_noop_max=0, evaluation_time_limit_frames=16
    )

    def lengths(**evaluation):
        env = make_vector_env("MsPacman", config, 2, 0, **evaluation)
        first = env.reset().image
        ended = [episode for step in play(env, 9) for episode in step.episodes]
        assert all(episode.truncated for episode in ended)
        return (first[0] == first[1]).all(), {episode.length for episode in ended}

    assert lengths() == (False, {2})
    assert lengths(evaluation=True) == (True, {4})
    unmoved = AtariEnv("MsPacman", 0, noop_max=0).reset().image
    assert (make_vector_env("MsPacman", config, 1, 3, evaluation=True).reset().image[0] == unmoved).all()


def test_an_unknown_game_is_the_users_error():
    with pytest.raises(UserError, match="did you mean Breakout"):
        make_vector_env("Brekout", None, 1, 0)


@pytest.mark.parametrize(
    "actions", [[0, 1, 2], [0], [0.0, 1.0], [0, 3], [-1, 0], 0], ids=lambda value: str(value)
)
def test_impossible_actions_are_the_callers_error_and_cost_no_episode(actions, caplog):
    env = make_vector_env("Catch", None, 2, 0)
    env.reset()
    with pytest.raises(ValueError, match="actions"):
        env.step(np.array(actions))
    assert not env.step(np.array([0, 1])).is_first.any()
    assert not caplog.records


# ---- state ---------------------------------------------------------------------------------------


STICKY = AtariConfig(sticky_actions=0.25, life_loss_ends_episode=True, time_limit_frames=400)


@pytest.mark.parametrize(("game", "config"), [("Catch", CatchConfig()), ("Breakout", STICKY)])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(game, config):
    env = make_vector_env(game, config, 2, 0)
    env.reset()
    play(env, 57)
    state = env.get_state()
    expected = play(env, 150, seed=1)
    other = make_vector_env(game, config, 2, 9)
    other.set_state(state)
    assert_same(play(other, 150, seed=1), expected)
    assert sum(len(step.episodes) for step in expected) > 2


def test_a_foreign_state_is_refused_with_its_difference(monkeypatch):
    config = AtariConfig()
    state = make_vector_env("Pong", config, 1, 0).get_state()

    def refuse(message, game="Pong", config=config, num_envs=1):
        env = make_vector_env(game, config, num_envs, 0)
        before = env.get_state()
        with pytest.raises(ValueError, match=message):
            env.set_state(state)
        assert env.get_state() == before

    refuse("game='Pong', these environments have 'Boxing'", game="Boxing")
    refuse("ale_py|game", game="Catch", config=CatchConfig())
    refuse("num_envs=1, these environments have 2", num_envs=2)
    refuse("sticky_actions=0.0", config=dataclasses.replace(config, sticky_actions=0.25))
    with pytest.raises(ValueError, match="evaluation=False, these environments have True"):
        make_vector_env("Pong", config, 1, 0, evaluation=True).set_state(state)
    monkeypatch.setattr(vector, "STATE_FORMAT", vector.STATE_FORMAT + 1)
    refuse(f"format={vector.STATE_FORMAT - 1}, these environments have {vector.STATE_FORMAT}")
    monkeypatch.undo()
    monkeypatch.setattr(ale_py, "__version__", "0.0")
    refuse("ale_py='0")


DEEP = b"[" * 500 + b"]" * 500


@pytest.mark.parametrize(
    "state",
    [
        *(b"", b"junk", b"\xff\xfe", b"[]", b"{}", b'{"header": 3}', b"[" * 100_000),
        *(b'{"header": 3, "health": [], "envs": []}', b'{"header": {}, "health": [], "envs": %s}' % DEEP),
    ],
)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="not a saved environment state"):
        make_vector_env("Catch", None, 1, 0).set_state(state)


def test_a_damaged_state_is_refused():
    env = make_vector_env("Pong", None, 1, 0)
    state = json.loads(env.get_state())
    emulator = state["envs"][0]["emulator"]
    emulator["record"] = emulator["record"][:-8]
    with pytest.raises(ValueError, match="damaged"):
        env.set_state(json.dumps(state).encode())


# ---- failures ------------------------------------------------------------------------------------


class Faulty(CatchEnv):
    """A Catch that raises at the given steps of its life, the reset that starts it not counted."""

    def __init__(self, seed, fails_at=(), broken=False):
        super().__init__(seed)
        self.fails_at = fails_at
        self.broken = broken
        self.count = 0

    def reset(self):
        if self.broken:
            raise OSError("will not start")
        return super().reset()

    def step(self, action):
        self.count += 1
        if self.count in self.fails_at:
            raise OSError("the emulator has crashed")
        return super().step(action)


def faulty(plan, num_envs=1, **kwargs):
    """A vector of Catch whose n-th environment ever built fails as `plan[n]` says; and their seeds."""
    seeds = []

    def make(seed):
        seeds.append(seed)
        return Faulty(seed, **(plan[len(seeds) - 1] if len(seeds) <= len(plan) else {}))

    return SerialVectorEnv(make, num_envs, 0, {"game": "Catch"}, **kwargs), seeds


def test_a_retired_environment_is_not_stepped(caplog):
    env, _ = faulty([{}, {"fails_at": (4,)}], num_envs=2)
    env.reset()
    play(env, 3)
    env.retire(1)
    play(env, 20)
    assert [each.count for each in env._envs] == [23, 3]
    assert not caplog.records


def test_a_failure_costs_the_episode_and_not_the_run(caplog):
    env, seeds = faulty([{}, {"fails_at": (13,)}, {}], num_envs=3)
    healthy, _ = faulty([], num_envs=3)
    assert_same([env.reset()], [healthy.reset()])
    with caplog.at_level(logging.WARNING):
        steps, expected = play(env, 60), play(healthy, 60)
    for step, other in zip(steps, expected, strict=True):
        for i in (0, 2):
            np.testing.assert_array_equal(step.image[i], other.image[i])
            assert step.reward[i] == other.reward[i]
    failed = steps[12]
    assert failed.is_first.tolist() == [False, True, False]
    assert (failed.reward[1], failed.terminal[1]) == (0, False)
    lengths = [episode.length for step in steps for episode in step.episodes if episode.env == 1]
    assert lengths == [9] * 5  # one of six is lost, and none is cut short
    assert len(caplog.records) == 1
    assert "environment 1 (Catch)" in caplog.text
    assert "the emulator has crashed" in caplog.text
    assert len(set(seeds)) == 4


def test_rebuilding_is_deterministic():
    runs = [faulty([{"fails_at": (5, 9)}, {"fails_at": (30,)}], num_envs=1) for _ in range(2)]
    first, second = [[env.reset(), *play(env, 80)] for env, _ in runs]
    assert_same(first, second)
    assert runs[0][1] == runs[1][1]


def test_an_environment_that_fails_when_rebuilt_is_tried_again(caplog):
    env, seeds = faulty([{"fails_at": (3,)}, {"broken": True}, {"broken": True}])
    env.reset()
    steps = play(env, 20)
    assert steps[2].is_first.all()
    assert len(caplog.records) == 3
    assert len(set(seeds)) == 4


def test_too_many_failures_in_a_row_end_the_run():
    env, seeds = faulty([{"fails_at": (2,)}] * 50)
    env.reset()
    with pytest.raises(RuntimeError, match=r"environment 0 \(Catch\) failed 6 times in a row.*crashed"):
        play(env, 50)
    assert len(seeds) == 6


def test_failures_of_different_environments_are_counted_apart():
    env, seeds = faulty([{"fails_at": (2,)}] * 6, num_envs=3, max_failures=2)
    env.reset()
    play(env, 50)
    assert len(seeds) == 3 + 6  # all six failures came, two of each environment


def test_failures_far_apart_are_forgiven():
    env, seeds = faulty([{"fails_at": (310,)}] * 10, max_failures=1)
    env.reset()
    play(env, 4 * 310)
    assert len(seeds) >= 4


def test_an_environment_that_never_starts_ends_the_run():
    env, _ = faulty([{"broken": True}] * 50)
    with pytest.raises(RuntimeError, match="will not start"):
        env.reset()


def test_an_interrupt_is_not_a_failure():
    class Interrupted(CatchEnv):
        def step(self, action):
            raise KeyboardInterrupt

    env = SerialVectorEnv(Interrupted, 1, 0, {"game": "Catch"})
    env.reset()
    with pytest.raises(KeyboardInterrupt):
        env.step(np.array([0]))


def test_failures_and_rebuilds_are_part_of_the_state():
    plan = [{"fails_at": (4,)}, {"fails_at": (40,)}]
    env, _ = faulty(plan)
    env.reset()
    play(env, 20)
    other, seeds = faulty([{}, {"fails_at": (9,)}], max_failures=1)
    other.set_state(env.get_state())
    other._envs[0].fails_at = (7,)
    with pytest.raises(RuntimeError, match="failed 2 times"):
        play(other, 10)
    assert len(seeds) == 1


# ---- the probe -----------------------------------------------------------------------------------


def test_the_probe_does_not_disturb_the_stream():
    probed = make_vector_env("Pong", None, 1, 5)
    plain = SerialVectorEnv(lambda seed: AtariEnv("Pong", seed), 1, 5, {"game": "Pong"})
    assert_same([probed.reset(), *play(probed, 30)], [plain.reset(), *play(plain, 30)])


@pytest.mark.parametrize("game", REFERENCE_SCORES)
def test_the_probe_passes_every_game(game):
    probe(AtariEnv(game, 0, time_limit_frames=80, fire_start=True, life_loss_ends_episode=True), game)


def broken_catch(**changes):
    """A Catch whose every step has some fields changed."""

    class Broken(CatchEnv):
        def reset(self):
            return self.change(super().reset())

        def step(self, action):
            return self.change(super().step(action))

        def change(self, step):
            return step._replace(**{name: change(step) for name, change in changes.items()})

    return Broken(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": lambda step: np.full_like(step.image, 9)}, "images are blank"),
        ({"image": lambda step: step.image[:32]}, r"shape \(32, 64, 3\), not uint8 of shape \(64, 64, 3\)"),
        ({"image": lambda step: step.image.astype(np.float32)}, "images are float32"),
        ({"is_first": lambda step: False}, "reset"),
        ({"is_first": lambda step: True}, "before the episode had ended"),
        ({"reward": lambda step: 1.0}, "a reset step has reward"),
        ({"reward": lambda step: float("nan")}, "a reward is nan"),
        ({"terminal": lambda step: True}, "a reset step is terminal"),
        ({"terminal": lambda step: False, "episode": lambda step: None}, "before the episode had ended"),
    ],
)
def test_the_probe_says_what_is_wrong(changes, message):
    with pytest.raises(RuntimeError, match=message):
        probe(broken_catch(**changes), "Catch")


def test_the_probe_sees_a_missing_reset_step():
    class Impatient(CatchEnv):
        """Resets at once, as environments with the other common semantics do."""

        def step(self, action):
            step = super().step(action)
            return step._replace(image=self.reset().image) if step.terminal else step

    with pytest.raises(RuntimeError, match="after an episode's end is not a reset step"):
        probe(Impatient(0), "Catch")
