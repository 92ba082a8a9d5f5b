"""TWISTER: *Learning Transformer-based World Models with Contrastive Predictive Coding* (ICLR 2025).

Burchi and Timofte, arXiv 2503.04416. Sections and equations in this package are that paper's.
"""

from twister_jax.agents import AgentPackage
from twister_jax.agents.twister.config import PRESETS

PACKAGE = AgentPackage(
    title="TWISTER",
    module=__name__,
    presets=PRESETS,
    fixture_prefix="rssm.",
    compiling_bytes=1_800_000_000,
    published_flops=1.714e12,
)
