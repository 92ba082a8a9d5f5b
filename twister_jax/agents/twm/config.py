"""TWM's settings and presets (Robine et al. 2023, appendix)."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from twister_jax.agents import Outlook, Preset
from twister_jax.config import AlgorithmConfig, Config, OptimizerConfig, too_few_steps, too_many_steps
from twister_jax.fields import (
    Fraction,
    FractionBelowOne,
    Length,
    LengthFromTwo,
    NonNegative,
    NonNegativeInt,
    Parts,
    Positive,
    Size,
    SizeFromTwo,
    Widths,
)

PolicyInput = Literal["latent", "state", "frames"]


@dataclasses.dataclass(frozen=True)
class TwmModelConfig:
    """Sizes of TWM's networks."""

    frame_stack: Parts = 4
    """Grey frames that one observation consists of."""
    cnn_channels: Size = 48
    """Channels of the first encoder convolution; each of the four layers doubles it."""
    encoder_hidden: Widths = (512, 512)
    """Widths of the layers between the convolutions and the latent."""
    stoch_groups: Size = 32
    """Categorical variables in the latent."""
    stoch_classes: SizeFromTwo = 32
    """Classes of each categorical variable."""
    hidden_size: SizeFromTwo = 256
    """Width of the transformer."""
    transformer_layers: Parts = 10
    """Transformer layers."""
    attention_heads: Size = 4
    """Attention heads of a layer."""
    head_size: Size = 64
    """Width of each attention head."""
    feedforward_size: Size = 1024
    """Width between the two halves of a feed-forward layer."""
    memory_steps: Length = 16
    """Earlier steps that an action token sees, besides its own."""
    dropout: FractionBelowOne = 0.1
    """Inside the dynamics model, only while it trains."""
    latent_head: Widths = (512, 512, 512, 512)
    """Hidden widths of the head that predicts the next latent."""
    reward_head: Widths = (256, 256, 256, 256)
    """Hidden widths of the head that predicts the reward."""
    discount_head: Widths = (256, 256, 256, 256)
    """Hidden widths of the head that predicts the discount."""
    actor: Widths = (512, 512, 512, 512)
    """Hidden widths of the policy."""
    critic: Widths = (512, 512, 512, 512)
    """Hidden widths of the value."""
    policy_reads: PolicyInput = "latent"
    """What policy and value read: the latent z; the state (z, h), where h is what the transformer made of the
    steps before; or frames, by convolutions of their own: real ones in the environment, decoded ones in
    imagination."""

    @property
    def latent_size(self) -> int:
        """Width of the latent as one vector."""
        return self.stoch_groups * self.stoch_classes


@dataclasses.dataclass(frozen=True)
class TwmConfig(AlgorithmConfig):
    """TWM: everything that one update depends on."""

    batch_size: Size = 100
    """Replayed windows in one update."""
    batch_length: LengthFromTwo = 16
    """Steps of a replayed window; one step of context before and one frame after come on top."""
    imagination_batch: Size = 400
    """Imagined rollouts per update."""
    imagination_horizon: Length = 15
    """Steps of an imagined rollout."""
    restart_frames: Size = 16
    """Replay frames encoded anew for each imagined step, for rollouts to restart from; more restarts than
    these use them in turn."""
    balanced_sampling: bool = True
    """Draw windows less often the more often they were drawn before; otherwise all alike."""
    sampling_temperature: Positive = 20.0
    """Balanced replay: a window drawn v times before has weight exp(-v / temperature)."""
    model: TwmModelConfig = TwmModelConfig()
    """Sizes of the networks."""

    decoder_scale: NonNegative = 1.0
    """Weight of the reconstruction's negative log-likelihood."""
    entropy_scale: NonNegative = 5.0
    """Weight of the latent's entropy loss."""
    entropy_threshold: Fraction = 0.1
    """Share of the largest possible latent entropy below which the entropy loss sets in."""
    consistency_scale: NonNegative = 0.01
    """Weight of the pull of the latent to the dynamics model's prediction."""
    latent_scale: NonNegative = 1.0
    """Weight of the prediction of the next latent."""
    reward_scale: NonNegative = 10.0
    """Weight of the prediction of the reward."""
    discount_scale: NonNegative = 50.0
    """Weight of the prediction of the discount."""

    discount: Fraction = 0.99
    """Discount of a step that ends nothing; the label that the discount head learns."""
    gae_lambda: Fraction = 0.95
    """Lambda of the generalised advantage estimates."""
    restart_threshold: FractionBelowOne = 0.1
    """A rollout whose cumulative discount falls below this is cut and restarts."""
    actor_entropy_scale: NonNegative = 0.01
    """Weight of the policy's entropy loss."""
    actor_entropy_threshold: Fraction = 0.1
    """Share of the largest possible policy entropy below which the entropy loss sets in."""

    pretrain_observation_samples: NonNegativeInt = 30_000_000
    """Replayed frames that the observation model sees before the loop."""
    pretrain_dynamics_samples: NonNegativeInt = 15_000_000
    """Replayed steps that the dynamics model sees before the loop."""
    pretrain_behavior_samples: NonNegativeInt = 5_000_000
    """Replayed steps that the critic sees before the loop."""

    observation_optimizer: OptimizerConfig = OptimizerConfig(1e-4, 1e-5, 100.0, 1e-6)
    dynamics_optimizer: OptimizerConfig = OptimizerConfig(1e-4, 1e-5, 100.0, 1e-6)
    actor_optimizer: OptimizerConfig = OptimizerConfig(1e-4, 1e-5, 1.0, 1e-6)
    critic_optimizer: OptimizerConfig = OptimizerConfig(1e-5, 1e-5, 1.0, 1e-6)

    @property
    def restart_pool(self) -> int:
        """Frames that an update draws for rollouts to restart from."""
        return self.imagination_horizon * self.restart_frames

    @property
    def behavior_window(self) -> int:
        """Observations of a replayed rollout; where the policy reads h, one of context comes before it."""
        return self.imagination_horizon + 1 + (self.model.policy_reads == "state")

    @property
    def min_replay_steps(self) -> int:
        """Stored steps of a stream that always hold enough observations for every draw without replacement.

        At least every other stored step is an observation: an episode has one more frame than actions.
        """
        observations = [self.batch_size + self.batch_length + 1, self.restart_pool]
        if self.pretrain_observation_samples:
            observations.append(self.batch_size * self.batch_length)
        if self.pretrain_behavior_samples:
            observations.append(self.imagination_batch + self.behavior_window - 1)
        return 2 * max(observations) + 2

    def problems(self, config: Config) -> Iterator[str]:
        """See `AlgorithmConfig`."""
        for names in (("batch_size", "batch_length"), ("imagination_batch", "imagination_horizon")):
            yield from too_many_steps({f"algorithm.{name}": getattr(self, name) for name in names})
        if not getattr(config.env, "grayscale", True):
            yield "env.grayscale = False: must be True, as TWM stacks grey frames"
        if self.model.hidden_size % 2:
            yield (
                f"algorithm.model.hidden_size = {self.model.hidden_size}: must be even, for sines and "
                f"cosines of positions"
            )
        steps = self.batch_size * self.batch_length
        if self.imagination_batch > steps:
            yield (
                f"algorithm.imagination_batch = {self.imagination_batch}: must be at most "
                f"algorithm.batch_size x algorithm.batch_length = {steps}"
            )
        why = f"a window of algorithm.batch_length = {self.batch_length} steps and two"
        yield from too_few_steps(config, self.batch_length + 2, why)


# Room for 100,000 transitions and the resets among them.
_SHARED = {"replay.capacity": 109_000, "evaluation.sample_actions": True}
_ENV = {
    "grayscale": True,
    "life_loss_ends_episode": True,
    "fire_start": True,
    "evaluation_noop_max": 0,
}

PRESETS = {
    "paper": Preset(
        TwmConfig(),
        shared=_SHARED | {"train.prefill_steps": 5_000, "train.updates_per_step": 125_000 / 95_000},
        env=_ENV,
    ),
    "cpu": Preset(
        TwmConfig(
            batch_size=24,
            batch_length=12,
            imagination_batch=64,
            imagination_horizon=10,
            restart_frames=6,
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
            # Clipped this low, the large first gradients of the decoder loss do not slow Adam down for the
            # next thousand updates, which is half of such a run.
            observation_optimizer=OptimizerConfig(6e-4, 1e-5, 10.0, 1e-6),
            dynamics_optimizer=OptimizerConfig(6e-4, 1e-5, 10.0, 1e-6),
            actor_optimizer=OptimizerConfig(1e-4, 1e-5, 1.0, 1e-6),
            critic_optimizer=OptimizerConfig(3e-4, 1e-5, 1.0, 1e-6),
        ),
        shared=_SHARED
        | {
            "train.prefill_steps": 1_000,
            "train.log_every": 50,
            "train.report_every": 500,
            "train.checkpoint_every": 1_000,
            "evaluation.episodes": 20,
            "evaluation.num_envs": 10,
        },
        env=_ENV,
        suites={"catch": {"train.steps": 3_000}},
        outlook={
            "atari": Outlook(
                4.2,
                "a core of an AMD EPYC",
                "20,000 (train.steps) were enough to play Krull better than people do",
            )
        },
    ),
    "debug": Preset(
        TwmConfig(
            batch_size=4,
            batch_length=4,
            imagination_batch=8,
            imagination_horizon=4,
            restart_frames=4,
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
        shared=_SHARED
        | {
            "train.steps": 300,
            "train.prefill_steps": 100,
            "train.updates_per_step": 0.5,
            "train.log_every": 10,
            "train.report_every": 50,
            "train.checkpoint_every": 100,
            "evaluation.episodes": 2,
            "evaluation.num_envs": 2,
        },
        env=_ENV,
    ),
}
