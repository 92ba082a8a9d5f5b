"""TWM: *Transformer-based World Models Are Happy With 100k Interactions* (ICLR 2023).

Robine, Höftmann, Uelwer and Harmeling, arXiv 2303.07109. Sections and equations in this package are that
paper's.
"""

from twister_jax.agents import AgentPackage
from twister_jax.agents.twm.config import PRESETS

PACKAGE = AgentPackage(
    title="TWM",
    module=__name__,
    presets=PRESETS,
    fixture_prefix="wm.",
    compiling_bytes=900_000_000,
    published_flops=2.06e12,
    exports_onnx=True,
)
