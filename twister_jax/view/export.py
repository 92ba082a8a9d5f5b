"""`python -m twister_jax export`: a policy as one file."""

import dataclasses
from pathlib import Path
from typing import Any

from twister_jax import agents, files, foreign_json
from twister_jax.errors import UserError
from twister_jax.training import evaluation
from twister_jax.training.provenance import commit, versions
from twister_jax.view import weights_file
from twister_jax.view.drawing import save
from twister_jax.view.extras import require
from twister_jax.view.policy import Policy


def export(policy: Policy, path: Path, license: str) -> str:
    """Writes a .safetensors file that `load` reads, or an .onnx file, by the path's ending.

    Returns:
      A line for people: what was written.

    Raises:
      UserError: the path ends otherwise, the agent has no ONNX form, something is not installed, or the file
        cannot be written.
    """
    about = describe(policy, license)
    if path.suffix == ".safetensors":
        weights_file.write(path, policy.state, about)
    elif path.suffix == ".onnx":
        package = agents.package(policy.config.agent)
        if not package.exports_onnx:
            able = ", ".join(name for name in agents.AGENTS if agents.package(name).exports_onnx)
            raise UserError(f"agent {policy.config.agent} has no ONNX form (agents that have: {able})")
        require("onnx", "onnx", "an ONNX file")
        convert = package.function("onnx", "policy_as_onnx")
        model = convert(policy.state, policy.config.algorithm, policy.spec, about)
        save(path, model.SerializeToString())
    else:
        raise UserError(f"out = {path}: must end in .safetensors or .onnx")
    return f"{path.stat().st_size / 1e6:.1f} MB, license {license} → {path}"


def describe(policy: Policy, license: str) -> dict[str, Any]:
    """What the file says of itself: settings, how far it was trained, its scores, and where it comes from."""
    return {
        "config": {**policy.config.to_dict(), "logdir": ""},
        "spec": dataclasses.asdict(policy.spec),
        **policy.about,
        "evaluation": _evaluation(policy),
        "license": license,
        "provenance": {"commit": commit(), "versions": versions()},
    }


def _evaluation(policy: Policy) -> dict[str, Any] | None:
    """evaluation.json, where it is of the very checkpoint that is exported."""
    if not policy.config.logdir:  # it comes from a file, which has it
        return policy.about.get("evaluation")
    try:
        found = foreign_json.parse(files.read(Path(policy.config.logdir) / evaluation.FILE, 1 << 24))
        same = all(found[name] == policy.about[name] for name in ("env_steps", "updates"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if same else None
