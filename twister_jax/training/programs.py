"""The compiled functions of a run, compiled in the background so that signals are answered meanwhile."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax

from twister_jax.agents.base import Agent
from twister_jax.replay.store import Replay
from twister_jax.runtime import return_freed_memory
from twister_jax.training.signals import Signals
from twister_jax.training.state import RunState


def trace(function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """`function` traced for arguments of these shapes; `out_info` of the result has the shapes it returns."""
    return jax.jit(function, donate_argnums=donate).trace(*args)


def trace_agent(agent: Agent, state: RunState, replay: Replay, key: Any, pictures: bool) -> dict[str, Any]:
    """An agent's functions traced for state and replay of these shapes: act, every kind of update, report."""
    traced = {"act": trace(agent.act, state.agent, state.carry, state.observation, key)}
    updates = {phase.name: phase.update for phase in agent.pretraining} | {"update": agent.update}
    for kind, function in updates.items():
        traced[kind] = trace(function, state.agent, replay, key, donate=(0, 1))
    if pictures:
        traced["report"] = trace(agent.report, state.agent, replay, key)
    return traced


class Programs:
    """Traced functions being compiled, one after the other; `programs[name]` is the compiled one.

    Args:
      traced: what `trace` returned, by name.
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
        """Whether it is there already."""
        return self._futures[name].done()


def _compile(traced: Any) -> Any:
    try:
        return traced.lower().compile()
    finally:
        return_freed_memory()  # compiling takes gigabytes, and a run may last for days
