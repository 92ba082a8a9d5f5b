"""The exported network gives what ours gives."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.twm.conftest import ALGORITHM, CONFIG, GREY
from twister_jax.agents import make_agent
from twister_jax.agents.twm.agent import Twm
from twister_jax.agents.twm.observation import flat, to_float
from twister_jax.view.export import export
from twister_jax.view.policy import Policy

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def test_a_policy_as_onnx(tmp_path):
    agent = make_agent(CONFIG, GREY)
    shapes = jax.eval_shape(agent.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes)
    policy = Policy(CONFIG, GREY, agent, state, {"env_steps": 7, "updates": 3})
    assert "license MIT" in export(policy, tmp_path / "policy.onnx", "MIT")
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"))
    stack = ALGORITHM.model.frame_stack
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, stack), np.uint8)
    probabilities, action = session.run(["probabilities", "action"], {"frames": frames})

    twm = Twm(CONFIG.algorithm, GREY, np.float32)
    params = state.trained.params
    latent = flat(twm.observation(params["observation"]).encoder(to_float(jnp.asarray(frames))).mode())
    expected = jax.nn.softmax(twm.actor(params["actor"])(latent))
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    np.testing.assert_array_equal(action, expected.argmax(-1))
    assert np.ptp(probabilities, axis=0).max() > 1e-3, "all images look the same to it"
    about = json.loads(session.get_modelmeta().custom_metadata_map["twister_jax"])
    assert (about["license"], about["env_steps"]) == ("MIT", 7)
