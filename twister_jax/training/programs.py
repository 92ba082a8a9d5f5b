"""The compiled functions of a run, compiled in the background so that signals are answered meanwhile."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax

from twister_jax.agents.base import Agent, Learner
from twister_jax.parallel import Devices
from twister_jax.replay.store import Replay
from twister_jax.runtime import return_freed_memory
from twister_jax.training.signals import Signals
from twister_jax.training.state import RunState


def trace_agent(
    agent: Agent, state: RunState, replay: Replay, key: Any, pictures: bool, devices: Devices
) -> dict[str, Any]:
    """An agent's functions traced for state and replay of these shapes: act, every kind of update, report."""
    whole, streams = devices.everywhere(key), devices.by_env(replay)
    state = devices.shaped(state, state.shardings(devices))
    replay = devices.shaped(replay, streams)
    acted = devices.by_env((state.action, state.carry))
    act = devices.trace(agent.act, state.agent, state.carry, state.observation, key, out=acted)
    traced = {"act": act}
    kinds: dict[str, Learner] = {**{phase.name: phase for phase in agent.pretraining}, "update": agent}
    for kind, learner in kinds.items():
        update = dataclasses.replace(learner, sample=devices.sampler(learner.sample)).update
        out = (whole, streams, whole)
        traced[kind] = devices.trace(update, state.agent, replay, key, donate=(0, 1), out=out)
    if pictures:  # one device draws them
        one = (devices.local(state.agent), devices.local(replay), key)
        traced["report"] = jax.jit(agent.report).trace(*one)
    return traced


class Programs:
    """Traced functions being compiled, one after the other; `programs[name]` is the compiled one.

    Args:
      traced: what `jax.jit(...).trace` returned, by name.
      signals: answered while something is waited for.
    """

    def __init__(self, traced: Mapping[str, Any], signals: Signals):
        # Not daemons: an interpreter that ends under a compilation aborts. The program leaves by `os._exit`.
        compiler = ThreadPoolExecutor(1, "compile")
        self._futures: dict[str, Future[Any]] = {
            name: compiler.submit(_compile, each) for name, each in traced.items()
        }
        compiler.shutdown(wait=False)
        self._signals = signals

    def __getitem__(self, name: str) -> Any:
        """The compiled function.

        Raises:
          Interrupted: it was not compiled yet, and a signal came first.
        """
        future = self._futures[name]
        while not wait([future], timeout=0.1).done:
            self._signals.check()
        return future.result()

    def scratch_bytes(self, name: str) -> int:
        """Memory that the compiled function takes while it runs; 0 where the device does not say."""
        analysis = self[name].memory_analysis()
        return 0 if analysis is None else analysis.temp_size_in_bytes

    def compiled(self, name: str) -> bool:
        """Whether it has been compiled already."""
        return self._futures[name].done()


def _compile(traced: Any) -> Any:
    try:
        return traced.lower().compile()
    finally:
        return_freed_memory()  # compiling takes gigabytes, and a run may last for days
