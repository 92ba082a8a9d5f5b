"""TWM's policy as ONNX: the encoder and the actor, which is all that acting needs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from twister_jax.agents.base import State
from twister_jax.agents.twm.config import TwmConfig
from twister_jax.envs.base import IMAGE_SIZE, EnvSpec
from twister_jax.errors import UserError

OPSET = 17


class _Graph:
    """Nodes and weights, added one after the other."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, value: Any) -> str:
        """The name of an array."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """The name of what a node computes."""
        output = name or f"x{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def silu(self, x: str) -> str:
        return self.add("Mul", x, self.add("Sigmoid", x))

    def mlp(self, x: str, layers: Mapping[int, Any] | Sequence[Any]) -> str:
        """Linear layers with SiLU between them."""
        for index in range(len(layers)):
            kernel, bias = layers[index]["kernel"], layers[index]["bias"]
            x = self.silu(x) if index else x
            x = self.add("Gemm", x, self.constant(kernel), self.constant(bias))
        return x


def policy_as_onnx(
    state: State, config: TwmConfig, spec: EnvSpec, about: Mapping[str, Any]
) -> onnx.ModelProto:
    """The policy of a state.

    The model takes `frames`, uint8 [n, 64, 64, stack], the newest frames of n environments, oldest first and
    the first of an episode repeated. It gives `probabilities` [n, num_actions], and `action` [n], the most
    probable one. `about` becomes the metadata `twister_jax`, as JSON.

    Raises:
      UserError: the policy reads something else than the latent.
    """
    if config.model.policy_reads != "latent":
        raise UserError(
            f"a policy that reads the {config.model.policy_reads} is not written as ONNX: export .safetensors"
        )
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), state.trained.params)
    encoder, model = params["observation"]["encoder"], config.model
    graph = _Graph()

    x = graph.add("Cast", "frames", to=TensorProto.FLOAT)
    x = graph.add("Div", x, graph.constant(np.float32(255.0)))
    x = graph.add("Transpose", x, perm=(0, 3, 1, 2))
    for index in range(len(encoder["kernels"])):
        kernel = graph.constant(encoder["kernels"][index].transpose(3, 2, 0, 1))
        x = graph.silu(graph.add("Conv", x, kernel, graph.constant(encoder["biases"][index]), strides=(2, 2)))
    x = graph.add("Flatten", graph.add("Transpose", x, perm=(0, 2, 3, 1)))
    logits = graph.mlp(x, encoder["mlp"]["layers"])

    # The mode of the latent, one-hot.
    groups = graph.constant(np.array([-1, model.stoch_groups, model.stoch_classes], np.int64))
    chosen = graph.add("ArgMax", graph.add("Reshape", logits, groups), axis=-1, keepdims=0)
    off_on = graph.constant(np.array([0.0, 1.0], np.float32))
    latent = graph.add("OneHot", chosen, graph.constant(np.int64(model.stoch_classes)), off_on)
    policy = graph.mlp(graph.add("Flatten", latent), params["actor"]["layers"])
    graph.add("Softmax", policy, name="probabilities")
    graph.add("ArgMax", policy, name="action", axis=-1, keepdims=0)

    shape: list[str | int] = ["n", IMAGE_SIZE, IMAGE_SIZE, model.frame_stack]
    made = helper.make_graph(
        graph.nodes,
        "policy",
        [helper.make_tensor_value_info("frames", TensorProto.UINT8, shape)],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", spec.num_actions]),
            helper.make_tensor_value_info("action", TensorProto.INT64, ["n"]),
        ],
        graph.weights,
    )
    whole = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    helper.set_model_props(whole, {"twister_jax": json.dumps(about)})
    onnx.checker.check_model(whole)
    return whole
