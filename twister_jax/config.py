"""Every setting of a run: frozen dataclasses, presets, validation.

The command line, `config.json` and a notebook use the same classes. `make_config` turns an agent's name
and a preset into a full configuration; `validate` refuses what cannot work, naming field and fix.
Nothing here imports JAX, so that the command line answers at once.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from twister_jax.errors import UserError

AgentName = Literal["twister", "twm"]
PresetName = Literal["auto", "paper", "cpu", "debug"]
Precision = Literal["auto", "float32", "bfloat16"]

AGENTS: tuple[str, ...] = ("twister", "twm")
PRESETS: tuple[str, ...] = ("paper", "cpu", "debug")


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """The Atari 100k protocol."""

    num_envs: int = 1
    """Environments stepped together."""
    frame_skip: int = 4
    """Emulator frames per agent step; the observation is the maximum over the last two."""
    noop_max: int = 30
    """After a reset 1 to this many no-ops are played; 0 plays none."""
    sticky_actions: float = 0.0
    """Probability that the emulator repeats the previous action."""
    grayscale: bool = False
    """One grey channel in place of RGB."""
    life_loss_ends_episode: bool = False
    """A lost life ends the episode for learning; the game itself goes on."""
    fire_start: bool = False
    """Press FIRE after a reset and after a lost life, in games whose action 1 is FIRE."""
    time_limit_frames: int = 108_000
    """Emulator frames after which a game is cut, without being terminal."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The final evaluation: full games, each counted once."""

    episodes: int = 100
    """Full games played."""
    num_envs: int = 8
    """Games played side by side; the allotment is fixed beforehand, so short games are not favoured."""
    noop_max: int = 30
    """As `env.noop_max`, for evaluation games."""
    time_limit_frames: int = 108_000
    """As `env.time_limit_frames`, for evaluation games."""
    sample_actions: bool = False
    """Sample the policy (True) or take its mode (False)."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The schedule of the loop, and what it writes."""

    steps: int = 100_000
    """Agent steps of the whole run, the random ones at the start included."""
    prefill_steps: int = 163
    """Random-action steps before the first update."""
    updates_per_step: float = 1.0
    """Gradient updates per agent step after the prefill."""
    log_every: int = 100
    """Updates between rows of metrics.jsonl; each row is the mean over them."""
    report_every: int = 5_000
    """Updates between pictures of reconstructed and imagined frames; 0 writes none."""
    checkpoint_every: int = 5_000
    """Agent steps between checkpoints."""
    checkpoint_minutes: float = 10.0
    """A checkpoint is also written when the last one is older than this."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept."""
    max_bad_updates: int = 20
    """Consecutive updates with a non-finite loss or gradient after which the run stops."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """The device-resident replay store."""

    capacity: int = 1_000_000
    """Most stored steps; less is allocated when the run is shorter."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam with clipping by the global gradient norm."""

    learning_rate: float
    """Step size."""
    epsilon: float
    """Added to the root of the second moment."""
    clip_norm: float
    """Largest global gradient norm."""
    weight_decay: float = 0.0
    """L2 coefficient, added to the gradient before Adam."""


@dataclasses.dataclass(frozen=True)
class TwisterModelConfig:
    """Sizes of TWISTER's networks (Burchi and Timofte 2025, appendix)."""

    hidden_size: int = 512
    """Width of the transformer and of every head."""
    cnn_channels: int = 32
    """Channels of the first encoder convolution; each of the four layers doubles it."""
    stoch_groups: int = 32
    """Categorical variables in the latent."""
    stoch_classes: int = 32
    """Classes of each categorical variable."""
    uniform_mix: float = 0.01
    """Share of the uniform distribution mixed into latents and policy."""
    transformer_blocks: int = 4
    """Transformer blocks."""
    attention_heads: int = 8
    """Attention heads of a block; `hidden_size` is divided among them."""
    attention_context: int = 8
    """Earlier positions a position sees, besides itself."""
    dropout: float = 0.1
    """Inside the transformer, only while the world model trains."""
    contrastive_steps: int = 10
    """Steps ahead that are predicted contrastively, counting the present."""
    contrastive_size: int = 512
    """Width of the contrastive heads."""
    num_bins: int = 255
    """Bins of the symlog two-hot reward and value distributions."""


@dataclasses.dataclass(frozen=True)
class TwisterConfig:
    """TWISTER: everything that one update depends on."""

    batch_size: int = 16
    """Replayed windows in one update."""
    batch_length: int = 64
    """Steps of a replayed window."""
    imagination_horizon: int = 15
    """Imagined steps behind every start state."""
    model: TwisterModelConfig = TwisterModelConfig()
    """Sizes of the networks."""

    image_scale: float = 1.0
    """Weight of the squared reconstruction error."""
    reward_scale: float = 1.0
    """Weight of the reward loss."""
    continue_scale: float = 1.0
    """Weight of the continue loss."""
    dynamics_scale: float = 0.5
    """Weight of the divergence that pulls the prior to the posterior."""
    representation_scale: float = 0.1
    """Weight of the divergence that pulls the posterior to the prior."""
    free_nats: float = 1.0
    """Divergence below which neither of the two is trained."""
    contrastive_scale: float = 1.0
    """Weight of the contrastive loss."""
    contrastive_decay: float = 0.75
    """Weight of each further contrastive step relative to the one before."""
    crop_area: tuple[float, float] = (0.25, 1.0)
    """Area of a random crop as a share of the frame."""
    crop_aspect: tuple[float, float] = (0.75, 1.3333333333333333)
    """Aspect ratio of a random crop."""

    discount: float = 0.997
    """Discount of an imagined step."""
    gae_lambda: float = 0.95
    """Lambda of the returns: 0 trusts the critic, 1 the imagined rewards."""
    entropy_scale: float = 3e-4
    """Weight of the policy's entropy."""
    slow_critic_scale: float = 1.0
    """Weight of the slow critic's value as a second target of the critic."""
    slow_critic_rate: float = 0.02
    """Share of the critic that moves into the slow critic at every update."""
    return_quantiles: tuple[float, float] = (0.05, 0.95)
    """Quantiles of the imagined returns whose distance scales the advantage."""
    return_scale_decay: float = 0.99
    """Decay of their moving averages."""

    world_model_optimizer: OptimizerConfig = OptimizerConfig(1e-4, 1e-8, 1000.0)
    actor_optimizer: OptimizerConfig = OptimizerConfig(3e-5, 1e-5, 100.0)
    critic_optimizer: OptimizerConfig = OptimizerConfig(3e-5, 1e-5, 100.0)


@dataclasses.dataclass(frozen=True)
class TwmModelConfig:
    """Sizes of TWM's networks (Robine et al. 2023, appendix)."""

    frame_stack: int = 4
    """Grey frames that one observation consists of."""
    cnn_channels: int = 48
    """Channels of the first encoder convolution; each of the four layers doubles it."""
    encoder_hidden: tuple[int, ...] = (512, 512)
    """Widths of the layers between the convolutions and the latent."""
    stoch_groups: int = 32
    """Categorical variables in the latent."""
    stoch_classes: int = 32
    """Classes of each categorical variable."""
    hidden_size: int = 256
    """Width of the transformer."""
    transformer_layers: int = 10
    """Transformer layers."""
    attention_heads: int = 4
    """Attention heads of a layer."""
    head_size: int = 64
    """Width of each attention head."""
    feedforward_size: int = 1024
    """Width between the two halves of a feed-forward layer."""
    memory_steps: int = 16
    """Earlier steps that an action token sees, besides its own."""
    dropout: float = 0.1
    """Inside the dynamics model, only while it trains."""
    latent_head: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden widths of the head that predicts the next latent."""
    reward_head: tuple[int, ...] = (256, 256, 256, 256)
    """Hidden widths of the head that predicts the reward."""
    discount_head: tuple[int, ...] = (256, 256, 256, 256)
    """Hidden widths of the head that predicts the discount."""
    actor: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden widths of the policy, which reads the latent alone."""
    critic: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden widths of the value, which reads the latent alone."""


@dataclasses.dataclass(frozen=True)
class TwmConfig:
    """TWM: everything that one update depends on."""

    batch_size: int = 100
    """Replayed windows in one update."""
    batch_length: int = 16
    """Steps of a replayed window; one step of context before and one frame after come on top."""
    imagination_batch: int = 400
    """Imagined rollouts per update."""
    imagination_horizon: int = 15
    """Steps of an imagined rollout."""
    restart_frames: int = 256
    """Replay frames encoded per update for rollouts to restart from; more restarts reuse them in turn."""
    sampling_temperature: float = 20.0
    """Balanced replay: a window drawn v times before has weight exp(-v / temperature)."""
    model: TwmModelConfig = TwmModelConfig()
    """Sizes of the networks."""

    decoder_scale: float = 1.0
    """Weight of the reconstruction's negative log-likelihood."""
    entropy_scale: float = 5.0
    """Weight of the latent's entropy loss."""
    entropy_threshold: float = 0.1
    """Share of the largest possible latent entropy below which the entropy loss sets in."""
    consistency_scale: float = 0.01
    """Weight of the pull of the latent to the dynamics model's prediction."""
    latent_scale: float = 1.0
    """Weight of the prediction of the next latent."""
    reward_scale: float = 10.0
    """Weight of the prediction of the reward."""
    discount_scale: float = 50.0
    """Weight of the prediction of the discount."""

    discount: float = 0.99
    """Discount of a step that ends nothing; the label that the discount head learns."""
    gae_lambda: float = 0.95
    """Lambda of the generalised advantage estimates."""
    restart_threshold: float = 0.1
    """A rollout whose cumulative discount falls under this is cut and restarts."""
    actor_entropy_scale: float = 0.01
    """Weight of the policy's entropy loss."""
    actor_entropy_threshold: float = 0.1
    """Share of the largest possible policy entropy below which the entropy loss sets in."""

    pretrain_observation_samples: int = 30_000_000
    """Replayed frames that the observation model sees before the loop."""
    pretrain_dynamics_samples: int = 15_000_000
    """Replayed steps that the dynamics model sees before the loop."""
    pretrain_behavior_samples: int = 5_000_000
    """Replayed steps that the critic sees before the loop."""

    observation_optimizer: OptimizerConfig = OptimizerConfig(1e-4, 1e-5, 100.0, 1e-6)
    dynamics_optimizer: OptimizerConfig = OptimizerConfig(1e-4, 1e-5, 100.0, 1e-6)
    actor_optimizer: OptimizerConfig = OptimizerConfig(1e-4, 1e-5, 1.0, 1e-6)
    critic_optimizer: OptimizerConfig = OptimizerConfig(1e-5, 1e-5, 1.0, 1e-6)

    @property
    def min_replay_steps(self) -> int:
        """Stored steps of a stream that always hold enough observations for every draw without replacement.

        At least every other stored step is an observation: an episode has one more frame than actions.
        """
        observations = [self.batch_size + self.batch_length + 1, self.restart_frames]
        if self.pretrain_observation_samples:
            observations.append(self.batch_size * self.batch_length)
        if self.pretrain_behavior_samples:
            observations.append(self.imagination_batch + self.imagination_horizon)
        return 2 * max(observations) + 2


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    game: str = "Breakout"
    """A game of Atari 100k (Alien, Amidar, Assault, Asterix, BankHeist, BattleZone, Boxing, Breakout,
    ChopperCommand, CrazyClimber, DemonAttack, Freeway, Frostbite, Gopher, Hero, Jamesbond, Kangaroo, Krull,
    KungFuMaster, MsPacman, Pong, PrivateEye, Qbert, RoadRunner, Seaquest, UpNDown), or Catch."""
    agent: AgentName = "twister"
    """Which algorithm learns."""
    preset: PresetName = "paper"
    """Sizes and schedule to start from: paper (as published), cpu (smaller), debug (seconds), or auto."""
    seed: int = 0
    """Decides every random draw of the run."""
    logdir: str = ""
    """Run directory; empty means runs/AGENT-GAME-PRESET-seedSEED."""
    precision: Precision = "auto"
    """Number format of matrix products; auto: bfloat16 on GPU and TPU, float32 on CPU."""
    env: EnvConfig = EnvConfig()
    train: TrainConfig = TrainConfig()
    replay: ReplayConfig = ReplayConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    algorithm: TwisterConfig | TwmConfig = TwisterConfig()
    """Everything that belongs to the agent itself."""


# ---------------------------------------------------------------------------------------------- presets

_CPU_TRAIN = TrainConfig(log_every=50, report_every=500, checkpoint_every=1_000)
_TWM_ENV = EnvConfig(grayscale=True, life_loss_ends_episode=True, fire_start=True)
_TWM_EVALUATION = EvaluationConfig(noop_max=0, sample_actions=True)
_TWM_UPDATES_PER_STEP = 125_000 / 95_000

BASES: dict[tuple[str, str], Config] = {
    ("twister", "paper"): Config(),
    ("twister", "cpu"): Config(
        preset="cpu",
        train=_CPU_TRAIN,
        evaluation=EvaluationConfig(episodes=20, num_envs=10, time_limit_frames=18_000),
        algorithm=TwisterConfig(
            batch_size=8,
            batch_length=32,
            imagination_horizon=10,
            # Crops as strong as the paper's take more updates to see through than such a run has.
            crop_area=(0.8, 1.0),
            model=TwisterModelConfig(
                hidden_size=128,
                cnn_channels=8,
                stoch_groups=16,
                stoch_classes=16,
                transformer_blocks=2,
                attention_heads=4,
                contrastive_size=128,
            ),
            # Clipped this low, the large first gradients of the image loss do not slow Adam down for the next
            # thousand updates, which is half of such a run.
            world_model_optimizer=OptimizerConfig(6e-4, 1e-8, 10.0),
            actor_optimizer=OptimizerConfig(2e-4, 1e-5, 100.0),
            critic_optimizer=OptimizerConfig(2e-4, 1e-5, 100.0),
        ),
    ),
    ("twister", "debug"): Config(
        preset="debug",
        env=EnvConfig(time_limit_frames=2_000),
        train=TrainConfig(
            steps=300,
            prefill_steps=64,
            updates_per_step=0.5,
            log_every=10,
            report_every=100,
            checkpoint_every=100,
        ),
        evaluation=EvaluationConfig(episodes=2, num_envs=2, time_limit_frames=2_000),
        algorithm=TwisterConfig(
            batch_size=2,
            batch_length=16,
            imagination_horizon=4,
            model=TwisterModelConfig(
                hidden_size=32,
                cnn_channels=4,
                stoch_groups=4,
                stoch_classes=8,
                transformer_blocks=1,
                attention_heads=2,
                attention_context=4,
                contrastive_steps=3,
                contrastive_size=32,
                num_bins=41,
            ),
        ),
    ),
    ("twm", "paper"): Config(
        agent="twm",
        env=_TWM_ENV,
        train=TrainConfig(prefill_steps=5_000, updates_per_step=_TWM_UPDATES_PER_STEP),
        replay=ReplayConfig(capacity=100_000),
        evaluation=_TWM_EVALUATION,
        algorithm=TwmConfig(),
    ),
    ("twm", "cpu"): Config(
        agent="twm",
        preset="cpu",
        env=_TWM_ENV,
        train=dataclasses.replace(_CPU_TRAIN, prefill_steps=1_000),
        replay=ReplayConfig(capacity=100_000),
        evaluation=dataclasses.replace(_TWM_EVALUATION, episodes=20, num_envs=10, time_limit_frames=18_000),
        algorithm=TwmConfig(
            batch_size=24,
            batch_length=12,
            imagination_batch=64,
            imagination_horizon=10,
            restart_frames=64,
            model=TwmModelConfig(
                cnn_channels=8,
                encoder_hidden=(256, 256),
                stoch_groups=16,
                stoch_classes=16,
                hidden_size=128,
                transformer_layers=3,
                head_size=32,
                feedforward_size=512,
                memory_steps=8,
                latent_head=(256, 256),
                reward_head=(128, 128),
                discount_head=(128, 128),
                actor=(256, 256),
                critic=(256, 256),
            ),
            pretrain_observation_samples=144_000,
            pretrain_dynamics_samples=86_400,
            pretrain_behavior_samples=32_000,
            # Clipped low for the reason given with TWISTER's.
            observation_optimizer=OptimizerConfig(6e-4, 1e-5, 10.0, 1e-6),
            dynamics_optimizer=OptimizerConfig(6e-4, 1e-5, 10.0, 1e-6),
            actor_optimizer=OptimizerConfig(1e-4, 1e-5, 1.0, 1e-6),
            critic_optimizer=OptimizerConfig(3e-4, 1e-5, 1.0, 1e-6),
        ),
    ),
    ("twm", "debug"): Config(
        agent="twm",
        preset="debug",
        env=dataclasses.replace(_TWM_ENV, time_limit_frames=2_000),
        train=TrainConfig(
            steps=300,
            prefill_steps=100,
            updates_per_step=0.5,
            log_every=10,
            report_every=50,
            checkpoint_every=100,
        ),
        replay=ReplayConfig(capacity=100_000),
        evaluation=dataclasses.replace(_TWM_EVALUATION, episodes=2, num_envs=2, time_limit_frames=2_000),
        algorithm=TwmConfig(
            batch_size=4,
            batch_length=4,
            imagination_batch=6,
            imagination_horizon=4,
            restart_frames=8,
            model=TwmModelConfig(
                cnn_channels=4,
                encoder_hidden=(32,),
                stoch_groups=4,
                stoch_classes=8,
                hidden_size=32,
                transformer_layers=1,
                attention_heads=2,
                head_size=16,
                feedforward_size=32,
                memory_steps=4,
                latent_head=(32,),
                reward_head=(16,),
                discount_head=(16,),
                actor=(32,),
                critic=(32,),
            ),
            pretrain_observation_samples=320,
            pretrain_dynamics_samples=160,
            pretrain_behavior_samples=240,
        ),
    ),
}
"""What each agent's presets are; `paper` is as published."""

GAME_SETTINGS: dict[tuple[str, str, str], dict[str, Any]] = {
    ("twister", "cpu", "Catch"): {"train.steps": 1_600, "evaluation.episodes": 100},
    ("twm", "cpu", "Catch"): {"train.steps": 3_000, "evaluation.episodes": 100},
}
"""What a preset has otherwise for one game: Catch is learned in fewer steps and evaluated in seconds."""


def make_config(
    agent: str = "twister", preset: str = "paper", game: str = "Breakout", **overrides: Any
) -> Config:
    """An agent's preset with some fields replaced.

    Args:
      agent: `twister` or `twm`.
      preset: `paper`, `cpu` or `debug`.
      game: canonical name of the game, as in `twister_jax.envs.games`.
      **overrides: new values by dotted name, as in `make_config(game="Catch", **{"train.steps": 500})`.

    Raises:
      UserError: an unknown agent, preset or field.
    """
    for what, name, known in (("agent", agent, AGENTS), ("preset", preset, PRESETS)):
        if name not in known:
            raise UserError(f"unknown {what} {name!r}{did_you_mean(name, known)}; one of {', '.join(known)}")
    config = replace(BASES[agent, preset], {"game": game})
    return replace(config, GAME_SETTINGS.get((agent, preset, game), {}) | overrides)


def complete(config: Config, backend: str) -> Config:
    """Fills in what is left to the program: precision by the device's kind, and the run directory."""
    precision = config.precision
    if precision == "auto":
        precision = "float32" if backend == "cpu" else "bfloat16"
    logdir = config.logdir or f"runs/{config.agent}-{config.game}-{config.preset}-seed{config.seed}"
    return dataclasses.replace(config, precision=precision, logdir=logdir)


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value in `config`, value in `other`), for the fields that differ."""
    mine, theirs = dict(flatten(config)), dict(flatten(other))
    return {name: (mine[name], theirs.get(name)) for name in mine if mine[name] != theirs.get(name)}


_NOT_OF_THE_PAPER = ("game", "agent", "preset", "seed", "logdir", "precision")


def differences_from_paper(config: Config) -> str:
    """One line for people: what differs from the published settings, with those in brackets."""
    found = differences(config, BASES[config.agent, "paper"])
    told = [
        f"{name} {show(new)} ({show(old)})"
        for name, (new, old) in found.items()
        if name not in _NOT_OF_THE_PAPER
    ]
    return "differs from paper: " + ", ".join(told) if told else "settings: as published (paper)"


# ------------------------------------------------------------------------------------- names and values


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings as (dotted name, value)."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def flat_types(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings as (dotted name, type)."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flat_types(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


def replace(config: Config, overrides: Mapping[str, Any]) -> Config:
    """`config` with new values by dotted name.

    Raises:
      UserError: an unknown name, or a value of another type than the field's.
    """
    known = dict(flat_types(config))
    for name, value in overrides.items():
        if name not in known:
            raise UserError(f"unknown field {name}{did_you_mean(name, known)}")
        config = _set(config, name.split("."), convert(name, value, known[name]))
    return config


def _set(node: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    return dataclasses.replace(node, **{head: _set(getattr(node, head), rest, value) if rest else value})


def convert(name: str, value: Any, kind: Any) -> Any:
    """`value` as a `kind`, as JSON and Python write it.

    Raises:
      UserError: it is of another type.
    """
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        near = did_you_mean(str(value), [str(choice) for choice in choices])
        raise UserError(f"{name} = {show(value)}: must be one of {', '.join(map(str, choices))}{near}")
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value) if isinstance(value, list | tuple) else kinds[:1]
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            return tuple(convert(name, item, of) for item, of in zip(value, kinds, strict=True))
        raise UserError(f"{name} = {show(value)}: must be {len(kinds)} values")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name} = {show(value)}: must be {_KIND_NAMES[kind]}")
    return value


_KIND_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def show(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(show, value)) + ")"
    return repr(value) if isinstance(value, str) and not value.isidentifier() else str(value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean a, b?)`, or nothing where nothing is close."""
    known = list(known)
    lowered = {candidate.lower(): candidate for candidate in known}
    close = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)]
    last = name.rsplit(".", 1)[-1].lower()  # the right name in the wrong section
    close += [candidate for candidate in known if candidate.lower().rsplit(".", 1)[-1] == last]
    close = list(dict.fromkeys(close))[:3]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def to_dict(config: Config) -> dict[str, Any]:
    """As JSON has it."""
    return dataclasses.asdict(config)


def from_dict(data: Any, source: str = "config.json") -> Config:
    """The configuration `to_dict` wrote.

    Raises:
      UserError: a field is unknown, missing or of the wrong type; the message names it and `source`.
    """
    if not isinstance(data, dict):
        raise UserError(f"{source}: not a configuration of twister_jax")
    agent = data.get("agent")
    if agent not in AGENTS:
        raise UserError(f"{source}: agent = {show(agent)}: must be one of {', '.join(AGENTS)}")
    base = BASES[agent, "paper"]
    given = dict(_flatten_dict(data, base))
    known = dict(flat_types(base))
    for name in given:
        if name not in known:
            raise UserError(f"{source}: unknown field {name}{did_you_mean(name, known)}")
    if missing := [name for name in known if name not in given]:
        raise UserError(f"{source}: field {missing[0]} is missing; it was written by another version")
    try:
        return replace(base, given)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _flatten_dict(data: dict[str, Any], like: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        inner = getattr(like, name, None)
        if isinstance(value, dict) and dataclasses.is_dataclass(inner):
            yield from _flatten_dict(value, inner, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# ------------------------------------------------------------------------------------------- validation

Rule = tuple[Callable[[Any], bool], str]


def _at_least(low: float) -> Rule:
    return (lambda value: value >= low, f"must be at least {low}")


def _between(low: float, high: float) -> Rule:
    return (lambda value: low <= value <= high, f"must be between {low} and {high}")


def _positive_share() -> Rule:
    return (lambda value: 0 < value <= 1, "must be above 0 and at most 1")


def _share_below_one() -> Rule:
    return (lambda value: 0 <= value < 1, "must be at least 0 and below 1")


def _above(low: float) -> Rule:
    return (lambda value: value > low, f"must be above {low}")


def _ordered(low: float, high: float) -> Rule:
    return (
        lambda pair: low <= pair[0] <= pair[1] <= high,
        f"must be two increasing numbers between {low} and {high}",
    )


def _widths() -> Rule:
    return (
        lambda widths: len(widths) > 0 and min(widths) >= 1,
        "must be widths of at least 1",
    )


_RULES: dict[str, Rule] = {
    "seed": _between(0, 2**32 - 1),
    "env.num_envs": _between(1, 1024),
    "env.frame_skip": _between(1, 100),
    "env.noop_max": _at_least(0),
    "env.sticky_actions": _share_below_one(),
    "env.time_limit_frames": _at_least(1),
    "evaluation.time_limit_frames": _at_least(1),
    "train.steps": _at_least(1),
    "train.prefill_steps": _at_least(1),
    "train.updates_per_step": _above(0),
    "train.log_every": _at_least(1),
    "train.report_every": _at_least(0),
    "train.checkpoint_every": _at_least(1),
    "train.checkpoint_minutes": _above(0),
    "train.keep_checkpoints": _at_least(1),
    "train.max_bad_updates": _at_least(1),
    "replay.capacity": _at_least(1),
    "evaluation.episodes": _at_least(1),
    "evaluation.num_envs": _between(1, 1024),
    "evaluation.noop_max": _at_least(0),
}
_TWISTER_RULES: dict[str, Rule] = {
    "batch_size": _at_least(1),
    "batch_length": _at_least(2),
    "imagination_horizon": _at_least(1),
    "model.hidden_size": _at_least(2),
    "model.cnn_channels": _at_least(1),
    "model.stoch_groups": _at_least(1),
    "model.stoch_classes": _at_least(2),
    "model.uniform_mix": _share_below_one(),
    "model.transformer_blocks": _at_least(1),
    "model.attention_heads": _at_least(1),
    "model.attention_context": _at_least(1),
    "model.dropout": _share_below_one(),
    "model.contrastive_steps": _at_least(1),
    "model.contrastive_size": _at_least(1),
    "model.num_bins": _at_least(3),
    "image_scale": _at_least(0),
    "reward_scale": _at_least(0),
    "continue_scale": _at_least(0),
    "dynamics_scale": _at_least(0),
    "representation_scale": _at_least(0),
    "free_nats": _at_least(0),
    "contrastive_scale": _at_least(0),
    "contrastive_decay": _between(0, 1),
    "crop_area": _ordered(0.01, 1),
    "crop_aspect": _ordered(0.1, 10),
    "discount": _positive_share(),
    "gae_lambda": _between(0, 1),
    "entropy_scale": _at_least(0),
    "slow_critic_scale": _at_least(0),
    "slow_critic_rate": _between(0, 1),
    "return_quantiles": _ordered(0, 1),
    "return_scale_decay": _share_below_one(),
}
_TWM_RULES: dict[str, Rule] = {
    "batch_size": _at_least(1),
    "batch_length": _at_least(2),
    "imagination_batch": _at_least(1),
    "imagination_horizon": _at_least(1),
    "restart_frames": _at_least(1),
    "sampling_temperature": _above(0),
    "model.frame_stack": _at_least(1),
    "model.cnn_channels": _at_least(1),
    "model.encoder_hidden": _widths(),
    "model.stoch_groups": _at_least(1),
    "model.stoch_classes": _at_least(2),
    "model.hidden_size": _at_least(2),
    "model.transformer_layers": _at_least(1),
    "model.attention_heads": _at_least(1),
    "model.head_size": _at_least(1),
    "model.feedforward_size": _at_least(1),
    "model.memory_steps": _at_least(1),
    "model.dropout": _share_below_one(),
    "model.latent_head": _widths(),
    "model.reward_head": _widths(),
    "model.discount_head": _widths(),
    "model.actor": _widths(),
    "model.critic": _widths(),
    "decoder_scale": _at_least(0),
    "entropy_scale": _at_least(0),
    "entropy_threshold": _between(0, 1),
    "consistency_scale": _at_least(0),
    "latent_scale": _at_least(0),
    "reward_scale": _at_least(0),
    "discount_scale": _at_least(0),
    "discount": _between(0, 1),
    "gae_lambda": _between(0, 1),
    "restart_threshold": _share_below_one(),
    "actor_entropy_scale": _at_least(0),
    "actor_entropy_threshold": _between(0, 1),
    "pretrain_observation_samples": _at_least(0),
    "pretrain_dynamics_samples": _at_least(0),
    "pretrain_behavior_samples": _at_least(0),
}
_OPTIMIZER_RULES: dict[str, Rule] = {
    "learning_rate": _above(0),
    "epsilon": _above(0),
    "clip_norm": _above(0),
    "weight_decay": _at_least(0),
}


def validate(config: Config) -> None:
    """Refuses a configuration that cannot work.

    Raises:
      UserError: what is wrong with each field, and how to mend it.
    """
    problems = list(_problems(config))
    if problems:
        raise UserError("; ".join(problems))


def _problems(config: Config) -> Iterator[str]:
    values = dict(flatten(config))
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            yield f"{name} = {show(value)}: must be finite"
            return
    bad = [
        f"{name} = {show(values[name])}: {text}"
        for name, (holds, text) in _rules_for(config).items()
        if not holds(values[name])
    ]
    yield from bad
    if bad:
        return  # what follows compares fields, and would only repeat it
    train = config.train
    if train.prefill_steps >= train.steps:
        yield (
            f"train.steps = {train.steps}: must exceed train.prefill_steps = {train.prefill_steps}, "
            f"or nothing is learned"
        )
    if type(config.algorithm) is not type(BASES[config.agent, "paper"].algorithm):
        yield f"agent = {config.agent}: its settings are those of another agent; start from make_config"
    elif isinstance(config.algorithm, TwisterConfig):
        yield from _twister_problems(config.algorithm)
        needed = config.algorithm.batch_length
        why = f"a window of algorithm.batch_length = {needed} steps"
        yield from _too_few_steps(config, needed, why)
    else:
        yield from _twm_problems(config)


def _too_few_steps(config: Config, needed: int, why: str) -> Iterator[str]:
    """Complaints where the prefill or the replay does not give every stream `needed` steps."""
    envs = config.env.num_envs
    from_each = f"{why} from each of env.num_envs = {envs}" if envs > 1 else why
    for name, value in (
        ("train.prefill_steps", config.train.prefill_steps),
        ("replay.capacity", config.replay.capacity),
    ):
        if value < needed * envs:
            yield f"{name} = {value}: must be at least {needed * envs}, for {from_each}"


def _rules_for(config: Config) -> dict[str, Rule]:
    rules = dict(_RULES)
    if isinstance(config.algorithm, TwisterConfig):
        rules |= {f"algorithm.{name}": rule for name, rule in _TWISTER_RULES.items()}
    else:
        rules |= {f"algorithm.{name}": rule for name, rule in _TWM_RULES.items()}
    for field in dataclasses.fields(config.algorithm):
        if isinstance(getattr(config.algorithm, field.name), OptimizerConfig):
            rules |= {f"algorithm.{field.name}.{name}": rule for name, rule in _OPTIMIZER_RULES.items()}
    return rules


def _twister_problems(algorithm: TwisterConfig) -> Iterator[str]:
    model = algorithm.model
    width, heads = model.hidden_size, model.attention_heads
    if width % heads:
        near = " or ".join(str(size) for size in (width // heads * heads, -(-width // heads) * heads) if size)
        yield (
            f"algorithm.model.hidden_size = {width}: must be divisible by "
            f"algorithm.model.attention_heads = {heads}; {near} would do"
        )
    elif width % 2:
        yield f"algorithm.model.hidden_size = {width}: must be even, for sines and cosines of positions"
    if algorithm.batch_length <= model.contrastive_steps:
        yield (
            f"algorithm.batch_length = {algorithm.batch_length}: must exceed "
            f"algorithm.model.contrastive_steps = {model.contrastive_steps}"
        )


def _twm_problems(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    assert isinstance(algorithm, TwmConfig)
    if not config.env.grayscale:
        yield "env.grayscale = False: TWM stacks grey frames; it must be True"
    if algorithm.model.hidden_size % 2:
        yield (
            f"algorithm.model.hidden_size = {algorithm.model.hidden_size}: must be even, for sines and "
            f"cosines of positions"
        )
    length = algorithm.batch_length
    if algorithm.imagination_batch > algorithm.batch_size * length:
        yield (
            f"algorithm.imagination_batch = {algorithm.imagination_batch}: must be at most "
            f"algorithm.batch_size x algorithm.batch_length = {algorithm.batch_size * length}"
        )
    yield from _too_few_steps(
        config, length + 2, f"a window of algorithm.batch_length = {length} steps and two"
    )
