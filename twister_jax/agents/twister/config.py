"""TWISTER's settings and presets (Burchi and Timofte 2025, appendix)."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated

from twister_jax.agents import Outlook, Preset
from twister_jax.config import AlgorithmConfig, Config, OptimizerConfig, too_few_steps, too_many_steps
from twister_jax.fields import (
    MOST_WIDE,
    Fraction,
    FractionBelowOne,
    Increasing,
    Length,
    LengthFromTwo,
    NonNegative,
    Parts,
    PositiveFraction,
    Range,
    Size,
    SizeFromTwo,
)


@dataclasses.dataclass(frozen=True)
class TwisterModelConfig:
    """Sizes of TWISTER's networks."""

    hidden_size: SizeFromTwo = 512
    """Width of the transformer and of every head."""
    cnn_channels: Size = 32
    """Channels of the first encoder convolution; each of the four layers doubles it."""
    stoch_groups: Size = 32
    """Categorical variables in the latent."""
    stoch_classes: SizeFromTwo = 32
    """Classes of each categorical variable."""
    uniform_mix: FractionBelowOne = 0.01
    """Share of the uniform distribution mixed into latents and policy."""
    transformer_blocks: Parts = 4
    """Transformer blocks."""
    attention_heads: Size = 8
    """Attention heads of a block; `hidden_size` is divided among them."""
    attention_context: Length = 8
    """Earlier positions a position sees, besides itself."""
    dropout: FractionBelowOne = 0.1
    """Inside the transformer, only while the world model trains."""
    contrastive_steps: Parts = 10
    """Steps ahead that are predicted contrastively, counting the present."""
    contrastive_size: Size = 512
    """Width of the contrastive heads."""
    contrastive_actions: bool = True
    """Contrastive queries also read the actions up to the step that they look for."""
    decoder_reads_state: bool = False
    """The decoder reads (z, h) in place of the latent alone."""
    num_bins: Annotated[int, Range(3, MOST_WIDE)] = 255
    """Bins of the symlog two-hot reward and value distributions."""

    @property
    def latent_size(self) -> int:
        """Width of the latent as one vector."""
        return self.stoch_groups * self.stoch_classes

    @property
    def feature_size(self) -> int:
        """Width of (z, h), which everything downstream reads."""
        return self.latent_size + self.hidden_size


@dataclasses.dataclass(frozen=True)
class TwisterConfig(AlgorithmConfig):
    """TWISTER: everything that one update depends on."""

    batch_size: Size = 16
    """Replayed windows in one update."""
    batch_length: LengthFromTwo = 64
    """Steps of a replayed window."""
    imagination_horizon: Length = 15
    """Imagined steps behind every start state."""
    model: TwisterModelConfig = TwisterModelConfig()
    """Sizes of the networks."""

    image_scale: NonNegative = 1.0
    """Weight of the squared reconstruction error."""
    reward_scale: NonNegative = 1.0
    """Weight of the reward loss."""
    continue_scale: NonNegative = 1.0
    """Weight of the continue loss."""
    dynamics_scale: NonNegative = 0.5
    """Weight of the divergence that pulls the prior to the posterior."""
    representation_scale: NonNegative = 0.1
    """Weight of the divergence that pulls the posterior to the prior."""
    free_nats: NonNegative = 1.0
    """Divergence below which neither of the two is trained."""
    contrastive_scale: NonNegative = 1.0
    """Weight of the contrastive loss."""
    contrastive_decay: Fraction = 0.75
    """Weight of each further contrastive step relative to the one before."""
    crop_area: Annotated[tuple[float, float], Increasing(0.01, 1)] = (0.25, 1.0)
    """Area of a random crop as a share of the frame."""
    crop_aspect: Annotated[tuple[float, float], Increasing(0.1, 10)] = (0.75, 1.3333333333333333)
    """Aspect ratio of a random crop."""

    discount: PositiveFraction = 0.997
    """Discount of an imagined step."""
    gae_lambda: Fraction = 0.95
    """Lambda of the returns: 0 trusts the critic, 1 the imagined rewards."""
    entropy_scale: NonNegative = 3e-4
    """Weight of the policy's entropy."""
    slow_critic_scale: NonNegative = 1.0
    """Weight of the slow critic's value as a second target of the critic."""
    slow_critic_rate: Fraction = 0.02
    """Share of the critic that moves into the slow critic at every update."""
    return_quantiles: Annotated[tuple[float, float], Increasing(0, 1)] = (0.05, 0.95)
    """Quantiles of the imagined returns whose distance scales the advantage."""
    return_scale_decay: FractionBelowOne = 0.99
    """Decay of their moving averages."""

    world_model_optimizer: OptimizerConfig = OptimizerConfig(1e-4, 1e-8, 1000.0)
    actor_optimizer: OptimizerConfig = OptimizerConfig(3e-5, 1e-5, 100.0)
    critic_optimizer: OptimizerConfig = OptimizerConfig(3e-5, 1e-5, 100.0)

    def problems(self, config: Config) -> Iterator[str]:
        """See `AlgorithmConfig`."""
        names = ("batch_size", "batch_length", "imagination_horizon")
        yield from too_many_steps({f"algorithm.{name}": getattr(self, name) for name in names})
        model = self.model
        width, heads = model.hidden_size, model.attention_heads
        if width % heads:
            near = " or ".join(
                str(size) for size in (width // heads * heads, -(-width // heads) * heads) if size
            )
            yield (
                f"algorithm.model.hidden_size = {width}: must be divisible by "
                f"algorithm.model.attention_heads = {heads}; {near} would do"
            )
        elif width % 2:
            yield f"algorithm.model.hidden_size = {width}: must be even, for sines and cosines of positions"
        if self.batch_length <= model.contrastive_steps:
            yield (
                f"algorithm.batch_length = {self.batch_length}: must exceed "
                f"algorithm.model.contrastive_steps = {model.contrastive_steps}"
            )
        why = f"a window of algorithm.batch_length = {self.batch_length} steps"
        yield from too_few_steps(config, self.batch_length, why)


# Tiny worlds bear higher learning rates and smaller batches, and random steps show most of them for nothing.
_TINY = {
    "train.prefill_steps": 400,
    "algorithm.world_model_optimizer.learning_rate": 1e-3,
    "algorithm.actor_optimizer.learning_rate": 6e-4,
    "algorithm.critic_optimizer.learning_rate": 6e-4,
}

PRESETS = {
    "paper": Preset(TwisterConfig()),
    "cpu": Preset(
        TwisterConfig(
            # Many small updates, a slow actor: the latent has to carry something before the policy settles.
            batch_size=4,
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
            actor_optimizer=OptimizerConfig(1e-4, 1e-5, 100.0),
            critic_optimizer=OptimizerConfig(2e-4, 1e-5, 100.0),
        ),
        shared={
            "train.log_every": 50,
            "train.report_every": 500,
            "train.checkpoint_every": 1_000,
            "evaluation.episodes": 20,
            "evaluation.num_envs": 10,
        },
        suites={
            "atari": {"train.prefill_steps": 1_000},
            "gym": {"train.prefill_steps": 1_000},
            "catch": {"train.steps": 1_600} | _TINY,
            # The world model has to see catches in every column, and only random play has them in all: after
            # fewer random steps a policy that never catches in one column fills the replay with its misses.
            # A faster actor is at ±1, where tanh lets no gradient through, before the paddle can be seen.
            "ContinuousCatch": {
                "train.steps": 7_000,
                "train.prefill_steps": 4_000,
                "algorithm.actor_optimizer.learning_rate": 3e-4,
                "algorithm.entropy_scale": 1e-2,
            },
            "remember": {"train.steps": 1_500} | _TINY,
        },
        outlook={
            "atari": Outlook(
                7.0,
                "a core of an AMD EPYC",
                "20,000 (train.steps) were enough to play Krull better than people do",
            )
        },
    ),
    "debug": Preset(
        TwisterConfig(
            batch_size=4,
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
        shared={
            "train.steps": 300,
            "train.prefill_steps": 64,
            "train.updates_per_step": 0.5,
            "train.log_every": 10,
            "train.report_every": 100,
            "train.checkpoint_every": 100,
            "evaluation.episodes": 2,
            "evaluation.num_envs": 2,
        },
    ),
}
