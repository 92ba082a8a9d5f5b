"""What all tests share: shape checks at run time, small sizes, and programs compiled once."""

import dataclasses
import os
from importlib.metadata import version
from typing import Any

from tests.shape_checks import install

install()  # before anything of the package is imported
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # before JAX is, here and in subprocesses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twister_jax.agents import make_agent
from twister_jax.agents.base import Agent
from twister_jax.agents.twister.config import TwisterConfig, TwisterModelConfig
from twister_jax.config import Config
from twister_jax.envs.base import EnvSpec
from twister_jax.presets import make_config
from twister_jax.replay import store
from twister_jax.replay.store import Replay, Transition
from twister_jax.runtime import keep_compiled_programs

SPEC = EnvSpec(image_shape=(64, 64, 3), num_actions=4)

SMALL_MODEL = TwisterModelConfig(
    hidden_size=16,
    cnn_channels=2,
    stoch_groups=4,
    stoch_classes=5,
    transformer_blocks=2,
    attention_heads=2,
    attention_context=3,
    contrastive_steps=3,
    contrastive_size=8,
)
SMALL = dataclasses.replace(
    make_config(precision="float32"),
    algorithm=TwisterConfig(batch_size=3, batch_length=6, imagination_horizon=4, model=SMALL_MODEL),
)


def random_steps(count: int, streams: int = 1, seed: int = 0, spec: EnvSpec = SPEC) -> Transition:
    """Steps [count, stream, ...] with episodes a few steps long."""
    rng = np.random.default_rng(seed)
    shape = (count, streams)
    is_first = rng.random(shape) < 0.2
    action = np.eye(spec.num_actions, dtype=np.float32)[rng.integers(spec.num_actions, size=shape)]
    return Transition(
        image=rng.integers(0, 256, (*shape, *spec.image_shape), dtype=np.uint8),
        action=np.where(is_first[..., None], 0, action).astype(np.float32),
        reward=rng.normal(size=shape).astype(np.float32),
        terminal=(rng.random(shape) < 0.1) & ~is_first,
        is_first=is_first,
    )


def filled_replay(count: int = 40, streams: int = 2, seed: int = 0, spec: EnvSpec = SPEC) -> Replay:
    """A store holding random steps."""
    replay = store.init(streams, count, spec.image_shape, spec.num_actions)
    insert = jax.jit(store.insert, donate_argnums=0)
    steps = random_steps(count, streams, seed, spec)
    for index in range(count):
        replay = insert(replay, jax.tree.map(lambda x, i=index: jnp.asarray(x[i]), steps))
    return replay


@dataclasses.dataclass
class Compiled:
    """A small agent with its functions compiled."""

    config: Config
    agent: Agent
    state: Any
    update: Any
    act: Any


# Without its optimisations and with its older code generator, which jaxlib 0.11 no longer has, XLA compiles a
# small update in a fifth of the time. What is computed is the same up to rounding.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
USUAL = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
CAN_BE_QUICK = version("jaxlib").startswith("0.10.")


def pytest_configure(config):
    """The default suite compiles much and computes little. The long suites compile as a run does."""
    if CAN_BE_QUICK and config.option.markexpr not in ("slow", "learning", "faults"):
        flags = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
        os.environ.setdefault("XLA_FLAGS", flags)  # read when the backend starts, here and in subprocesses


def pytest_collection_modifyitems(items):
    """The longest test first: what is left for the end is short, and two processes end together."""
    items.sort(key=lambda item: item.path.name != "test_resume.py")


def jit_as_a_run(function: Any, **options: Any) -> Any:
    """`jax.jit`, compiled as a run compiles: where the last bit counts, or much is computed."""
    return jax.jit(function, compiler_options=USUAL if CAN_BE_QUICK else None, **options)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Many tests compile the same programs, here and in subprocesses; one compilation of each is enough."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # that of all workers
    os.environ["TWISTER_JAX_CACHE"] = str(base / "xla")
    keep_compiled_programs(jax.default_backend())


@pytest.fixture(scope="session")
def small() -> Compiled:
    """Do not donate or change its state."""
    agent = make_agent(SMALL, SPEC)
    state = jax.jit(agent.init)(jax.random.key(0))
    return Compiled(SMALL, agent, state, jax.jit(agent.update), jax.jit(agent.act))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The directory of a whole run, of which nothing is changed."""
    from tests.runs import config_of
    from twister_jax.training.train import train

    directory = tmp_path_factory.mktemp("undisturbed")
    assert train(config_of(directory, **{"env.num_envs": 2})) == 0
    return directory
