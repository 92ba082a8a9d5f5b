"""Several seeds in one program: runs that differ in nothing but their seed, and advance together.

Each is a `Run` with a directory, environments and counters of its own, and does what it would do alone: the
same draws, the same number of updates between the same steps. Their arrays lie stacked, the seed first, so
that one program acts, inserts and learns for all of them. A seed that does not take part in a call (it resets
an environment, has finished or diverged) keeps what it had.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from twister_jax.agents.base import Health, Learner
from twister_jax.errors import UserError
from twister_jax.parallel import SEED
from twister_jax.randomness import Purpose, key_for
from twister_jax.replay.store import Replay, Transition
from twister_jax.runtime import target
from twister_jax.training import seeds
from twister_jax.training.lock import LostError
from twister_jax.training.logs import Averages
from twister_jax.training.programs import Programs
from twister_jax.training.rescue import rescue
from twister_jax.training.run import Run
from twister_jax.training.state import RunState


class Member(Run):
    """One seed of a group: a run whose arrays lie with those of the others."""

    alone = False
    group: "Group | None" = None
    index: int

    def compile(self, shapes: RunState, replay: Replay) -> None:
        """Does nothing: the group compiles for all its members."""

    def join(self, group: "Group", index: int) -> None:
        """Joins a group, which holds the arrays from now on; the member's own are released."""
        self.group, self.index = group, index
        for name in ("state", "replay", "averages"):
            self.__dict__.pop(name, None)

    def __getattr__(self, name: str) -> Any:
        """Arrays that lie with the group, copied out of it: to be saved, or looked at."""
        held = {"state": Group.state_of, "replay": Group.replay_of, "averages": Group.averages_of}
        if name in held and self.group is not None:
            return held[name](self.group, self.index)
        raise AttributeError(name)

    def take_means(self, kind: str) -> dict[str, float | None]:
        assert self.group is not None
        return self.group.take_means(kind, self.index)

    def health(self) -> Health:
        if self.group is None:
            return super().health()
        return jax.tree.map(
            lambda x: jax.device_get(x)[self.index], self.agent.health(self.group.states.agent)
        )

    def progress_line(self) -> str:
        line = super().progress_line()
        others = len(self.group.live) - 1 if self.group else 0
        return f"seed {self.config.seed}: {line}" + (f"  ({others} more)" if others else "")


class Group:
    """Seeds that are not finished, and their arrays.

    Attributes:
      live: those that take part.
      failed: why others have stopped, by seed.
      unsaved: seeds that are finished but could not be saved in their directory.
    """

    def __init__(self, members: Sequence[Member]):
        self.members, self.live = list(members), list(members)
        self.failed: dict[int, UserError] = {}
        self.unsaved: set[int] = set()
        first = members[0]
        self.agent, self.signals, self.devices = first.agent, first.signals, first.devices
        count = len(members)
        sharing = max(n for n in range(1, min(count, jax.device_count()) + 1) if count % n == 0)
        axes = (AxisType.Auto,)
        self.mesh = jax.make_mesh((sharing,), (SEED,), axes, devices=jax.devices()[:sharing])
        self.by_seed = NamedSharding(self.mesh, PartitionSpec(SEED))
        # On a CPU one update keeps all cores busy; other devices have room beside one.
        self.in_turn = target() == "cpu"
        if idle := jax.device_count() - sharing:
            first.progress.say(
                f"{idle} of {jax.device_count()} devices are idle: {count} seeds share {sharing}"
            )
        self.states = self._stack([member.state for member in members])
        self.replays = self._stack([member.__dict__.pop("replay") for member in members])
        kept = [dict(member.averages) for member in members]
        for index, member in enumerate(members):
            member.join(self, index)
        self._compile(kept)

    # ------------------------------------------------------------------------------------- the arrays

    def _stack(self, trees: list[Any]) -> Any:
        """One tree with the seed as leading axis; `trees` is emptied on the way."""
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(trees), *x.shape), x.dtype), trees[0])

        def empty() -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

        stacked = jax.jit(empty, out_shardings=self.by_seed)()
        put = jax.jit(
            lambda all, one, index: jax.tree.map(lambda x, y: x.at[index].set(y), all, one),
            donate_argnums=0,
            out_shardings=self.by_seed,
        )
        for index in range(len(trees)):
            one = jax.tree.map(np.asarray, trees[index]) if self.mesh.size > 1 else trees[index]
            stacked = put(stacked, one, index)
            trees[index] = None
        return stacked

    def state_of(self, index: int) -> RunState:
        return _take(self.states, index)

    def replay_of(self, index: int) -> Replay:
        return _take(self.replays, index)

    def averages_of(self, index: int) -> dict[str, Averages]:
        return jax.tree.map(lambda x: x[index], jax.device_get(self.averages))

    def take_means(self, kind: str, index: int) -> dict[str, float | None]:
        means = self.averages_of(index)[kind].means()
        kept = jnp.arange(len(self.members)) != index
        self.averages[kind] = jax.tree.map(lambda x: jnp.where(kept, x, 0.0), self.averages[kind])
        return means

    # ----------------------------------------------------------------------------------- the programs

    def _compile(self, kept: list[dict[str, Averages]]) -> None:
        first, agent, count = self.members[0], self.agent, len(self.members)
        keys = self._keys(lambda _: key_for(0, Purpose.INIT))
        active = self._put(np.ones(count, bool))
        states, observation = self.states, self.states.observation
        traced = {
            "act": self._trace(seeds.act_all(agent), states.agent, states.carry, observation, keys, active)
        }
        kinds: dict[str, Learner] = {**{phase.name: phase for phase in agent.pretraining}, "update": agent}
        self.averages: dict[str, Averages] = {}
        for kind, learner in kinds.items():
            update = seeds.update_all(learner, self.in_turn)
            traced[kind] = self._trace(update, states.agent, self.replays, keys, active, donate=(1,))
            metrics = traced[kind].out_info[2]
            one = [each.get(kind) or Averages.empty(metrics) for each in kept]
            self.averages[kind] = self._stack(one)
            traced[f"{kind} averages"] = self._trace(
                seeds.add_all, self.averages[kind], metrics, active, donate=(0,)
            )
        self._insert = self._lift(seeds.insert_all, donate=(0,))
        self._took = self._lift(seeds.took_all(agent))
        if first.config.train.report_every:
            of_one = jax.eval_shape(lambda: (_take_first(states.agent), _take_first(self.replays)))
            traced["report"] = jax.jit(agent.report).trace(*of_one, key_for(0, Purpose.INIT))
        self.programs = Programs(traced, self.signals)
        for member in self.members:
            member.programs = self.programs

    def _lift(self, function: Callable[..., Any], donate: tuple[int, ...] = ()) -> Any:
        """Every device computes for its own seeds."""
        if self.mesh.size > 1:
            spec = PartitionSpec(SEED)
            function = jax.shard_map(function, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.jit(function, donate_argnums=donate, out_shardings=self.by_seed)

    def _trace(self, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
        def shape(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.by_seed)

        return self._lift(function, donate).trace(*jax.tree.map(shape, args))

    def _put(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, self.by_seed), tree)

    def _keys(self, key: Callable[[Member], Any]) -> Any:
        return self._put(jnp.stack([key(member) for member in self.members]))

    def _mask(self, members: Sequence[Member]) -> Any:
        return self._put(np.array([member in members for member in self.members]))

    # ------------------------------------------------------------------------------------- the loop

    def learn_everything(self) -> None:
        """Until every seed has finished or failed; those that fail say so, and the others go on."""
        self.live = [member for member in self.live if not member.finished]
        while self.live:
            self._iterate()
            for member in list(self.live):
                self.guard(member, member.housekeep)
                if member in self.live and member.finished:
                    kept = self.guard(member, member.save_somewhere)
                    if member in self.live:
                        self.live.remove(member)
                        self.unsaved |= {member.config.seed} if kept != member.directory else set()

    def _iterate(self) -> None:
        """What `loop.learn_everything` repeats, for every seed."""
        filling = [member for member in self.live if member.filling]
        phases = {member: member.phase for member in self.live if member not in filling}
        looping = [member for member, phase in phases.items() if phase is None]
        acting = [member for member in looping if member.steps_left]
        if fresh := [member for member in (*filling, *acting) if not member.counters.acted]:
            self._act(fresh)
        for kind in dict.fromkeys(phase[0].name for phase in phases.values() if phase):
            self._pretrain(kind, {m: phase for m, phase in phases.items() if phase and phase[0].name == kind})
        while owing := [m for m in looping if m in self.live and m.counters.updates < m.updates_due]:
            self._learn(owing)
        self._step([m for m in filling if m in self.live], [m for m in acting if m in self.live])

    def _act(self, members: list[Member]) -> None:
        for member in members:
            member.counters.acted = True
        iteration = lambda m: key_for(m.config.seed, Purpose.ACT, m.counters.iterations)  # noqa: E731
        states = self.states
        action, carry = self._program("act")(
            states.agent, states.carry, states.observation, self._keys(iteration), self._mask(members)
        )
        self.states = dataclasses.replace(states, carry=carry, action=action)

    def _pretrain(self, kind: str, members: dict[Member, Any]) -> None:
        def key(m: Member) -> Any:
            return key_for(m.config.seed, Purpose.PRETRAIN, m.counters.pretraining_updates)

        self._update(kind, list(members), key)
        for member, (phase, done) in members.items():
            member.counters.pretraining_updates += 1
            done += 1
            if done % member.config.train.log_every == 0 or done == phase.updates:
                self.guard(member, member.write_row, kind, {"phase": kind, "phase_updates": done})

    def _learn(self, members: list[Member]) -> None:
        self._update("update", members, lambda m: key_for(m.config.seed, Purpose.UPDATE, m.counters.updates))
        for member in members:
            member.counters.updates += 1
            if member.counters.updates % member.config.train.log_every == 0:
                self.guard(member, member.write_row, "update")
        self.signals.check()

    def _update(self, kind: str, members: list[Member], key: Callable[[Member], Any]) -> None:
        mask = self._mask(members)
        update, add = self._program(kind), self._program(f"{kind} averages")
        agent, self.replays, metrics = update(self.states.agent, self.replays, self._keys(key), mask)
        self.states = dataclasses.replace(self.states, agent=agent)
        self.averages[kind] = add(self.averages[kind], metrics, mask)

    def _step(self, filling: list[Member], acting: list[Member]) -> None:
        """Steps the environments of each, and stores what comes."""
        if not filling and not acting:
            return
        actions = np.array(self.states.action)
        for member in filling:
            actions[member.index] = member.random_actions()
        if filling:
            carry = self._took(self.states.carry, self._put(actions), self._mask(filling))
            self.states = dataclasses.replace(self.states, carry=carry)
        shown = jax.tree.map(np.array, self.states.observation)  # new: a device may still read the last
        reward, terminal = (np.zeros(shown.is_first.shape, kind) for kind in (np.float32, bool))
        first = np.array(shown.is_first)
        done: list[Member] = []
        for member in (*filling, *acting):
            at = member.index
            step = self.guard(member, member.step_env, actions[at])
            if step is None:
                continue
            done.append(member)
            member.stored += 1
            shown.image[at], first[at], reward[at], terminal[at] = (
                step.image,
                step.is_first,
                step.reward,
                step.terminal,
            )
            shown.is_first[at] = step.is_first
            if shown.reward is not None:
                shown.reward[at] = step.reward
            member.count(step)
            if member in filling and not member.filling:
                member.counters.filled_at = member.counters.env_steps
            member.counters.acted = False
        observation = self._put(shown)
        steps = Transition(*self._put((shown.image, actions, reward, terminal, first)))
        self.replays = self._insert(self.replays, steps, self._mask(done))
        self.states = dataclasses.replace(self.states, observation=observation)

    def _program(self, name: str) -> Any:
        return self.live[0].program(name) if self.live else self.programs[name]

    def guard(self, member: Member, call: Callable[..., Any], *args: Any) -> Any:
        """A seed that cannot go on stops alone."""
        try:
            return call(*args)
        except UserError as error:
            self.failed[member.config.seed] = error
            self.live.remove(member)
            stop(member, error)
            return None


def stop(member: Member, error: UserError) -> None:
    """Says why a seed cannot go on; one that lost its directory is saved elsewhere."""
    member.progress.say(f"seed {member.config.seed} stops: {error}")
    if isinstance(error, LostError):
        rescue(member)


def _take(tree: Any, index: int) -> Any:
    """One seed's arrays, on the default device, where those who look at them expect them."""
    here = jax.local_devices()[0]

    def take(x: jax.Array) -> jax.Array:
        for shard in x.addressable_shards:
            start, stop, _ = shard.index[0].indices(x.shape[0])
            if start <= index < stop:
                return jax.device_put(shard.data[index - start], here)
        raise IndexError(index)

    return jax.tree.map(take, tree)


def _take_first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)
