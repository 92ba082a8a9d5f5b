"""Which OpenGL backend MuJoCo draws with on a machine without a screen.

A broken driver does not always say so: with several GPUs in a container EGL may wait for ever. So every
backend is first tried in a process of its own, which is left behind when it takes too long.
"""

import contextlib
import functools
import os
import subprocess
import sys
import tempfile

from twister_jax.errors import UserError

BACKENDS = ("egl", "osmesa")
"""In order of preference: OSMesa draws on the processor, and needs its library."""
PATIENCE = 60.0
"""Seconds after which a backend is given up."""

# Two at a time, because some drivers draw for the first and fail with the second.
_TRY = """
import mujoco
ball = "<mujoco><worldbody><light pos='0 0 2'/><geom size='.5'/></worldbody></mujoco>"
model = mujoco.MjModel.from_xml_string(ball)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
for renderer in [mujoco.Renderer(model, 64, 64) for _ in range(2)]:
    renderer.update_scene(data)
    picture = renderer.render()
    assert picture.min() < picture.max(), "it draws nothing"
"""


@functools.cache
def choose_renderer() -> str:
    """The backend that draws here, from now on in `MUJOCO_GL`; what stands there already is kept.

    Call it before dm_control is imported, which reads that variable once.

    Raises:
      UserError: none does, or not the one that `MUJOCO_GL` names.
    """
    wanted = os.environ.get("MUJOCO_GL")
    found: dict[str, str] = {}
    for backend in (wanted,) if wanted else BACKENDS:
        problem = try_renderer(backend)
        if problem is None:
            os.environ["MUJOCO_GL"] = backend
            return backend
        found[backend] = problem
    tried = "; ".join(f"{backend}: {problem}" for backend, problem in found.items())
    fix = (
        f"unset MUJOCO_GL, or set it to one of {', '.join(BACKENDS)}"
        if wanted
        else "install EGL or OSMesa (Debian: libegl1 or libosmesa6); MUJOCO_EGL_DEVICE_ID=N chooses a GPU"
    )
    raise UserError(f"MuJoCo cannot draw without a screen here ({tried}): {fix}")


def try_renderer(backend: str, code: str = _TRY, patience: float = PATIENCE) -> str | None:
    """Draws with a backend in a process of its own; returns what is wrong, or None.

    It comes back after `patience` seconds whatever the driver does, if need be without the process, which a
    driver can make immune to being killed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYOPENGL_PLATFORM"}
    with tempfile.TemporaryFile() as said:  # not a pipe: nobody need close it
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**environment, "MUJOCO_GL": backend},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            return f"no picture within {patience:g} seconds"
        if process.returncode == 0:
            return None
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"it ended with code {process.returncode}"
