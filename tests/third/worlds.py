"""Environments of gymnasium as strangers write them, good and bad: `gym:tests.third.worlds:Plain-v0`."""

import itertools

import gymnasium
import numpy as np
from gymnasium import spaces


def picture(*shape):
    return spaces.Box(0, 255, shape, np.uint8)


class Plain(gymnasium.Env):
    """A dot walks over noise. Terminal after seven steps, or on leaving the picture."""

    metadata = {"render_modes": []}  # noqa: RUF012
    observation_space = picture(48, 40, 3)
    action_space = spaces.Discrete(3, start=1)
    length = 7

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.at, self.taken = 0, 20, []
        self.noise = int(self.np_random.integers(1, 200))
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        self.taken.append(action)
        self.at = int(np.clip(self.at + 2 * np.ravel(action)[0], 0, 39))
        return self.observe(), self.reward(), self.steps == self.length, False, {}

    def reward(self):
        return self.at / 10

    def observe(self):
        image = np.full((48, 40, 3), self.noise, np.uint8)
        image[:, self.at] = 255
        return image


class Exact(Plain):
    def get_state(self):
        return {"rng": self.np_random.bit_generator.state, "values": [self.steps, self.at, self.noise]}

    def set_state(self, state):
        self.np_random.bit_generator.state = state["rng"]
        self.steps, self.at, self.noise = state["values"]


class Forgetful(Exact):
    def set_state(self, state):
        self.steps, self.at, self.noise = state["values"]


class Arrays(Exact):
    def get_state(self):
        return {"values": np.zeros(3)}


class Dictionary(Plain):
    observation_space = spaces.Dict({"speed": spaces.Box(-1, 1, (2,)), "front": picture(48, 40, 3)})

    def observe(self):
        return {"speed": np.zeros(2, np.float32), "front": super().observe()}


class Two(Dictionary):
    observation_space = spaces.Dict({"front": picture(48, 40, 3), "back": picture(48, 40)})

    def observe(self):
        return super().observe() | {"back": np.full((48, 40), self.noise, np.uint8)}


class Rendered(Plain):
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = spaces.Box(-1, 1, (4,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return super().observe() if self.render_mode == "rgb_array" else None

    def observe(self):
        return np.zeros(4, np.float32)


class Continuous(Plain):
    action_space = spaces.Box(np.array([-3, 0], np.float32), np.array([1, 10], np.float32))


class Endless(Plain):
    length = 0


class Numbers(Plain):
    observation_space = spaces.Box(-1, 1, (4,))


class Floats(Plain):
    def observe(self):
        return super().observe() / 255


class Growing(Plain):
    def observe(self):
        return np.zeros((48 + self.steps, 40, 3), np.uint8)


class Blank(Plain):
    def observe(self):
        return np.zeros((48, 40, 3), np.uint8)


class Undefined(Plain):
    def reward(self):
        return float("nan") if self.steps == 3 else 0.0


class Several(Plain):
    action_space = spaces.MultiDiscrete([3, 3])


class Unbounded(Plain):
    action_space = spaces.Box(-np.inf, np.inf, (2,))


class Failing(Plain):
    def step(self, action):
        raise KeyError("wheel")


class Unmade(Plain):
    def __init__(self):
        raise OSError("the track\nis missing")


class Seedless(Plain):
    counter = itertools.count(1)

    def reset(self, *, seed=None, options=None):
        super().reset()
        self.noise = 1 + next(self.counter) % 200
        return self.observe(), {}


for each in (Plain, *Plain.__subclasses__(), *Exact.__subclasses__(), *Dictionary.__subclasses__()):
    gymnasium.register(f"{each.__name__}-v0", each)
gymnasium.register("Cut-v0", Endless, max_episode_steps=5)
