"""What XLA's CPU backend makes of an update.

Its library fusions have been seen to compute the wrong thing (jaxlib 0.10.2: `sum(a * b, -1) + einsum(…)`,
off by the size of the result). Whether one is formed depends on shapes, so fixtures cannot speak for other
sizes.
"""

import jax
import numpy as np
import pytest

from benchmarks.subject import make_subject, update_keys
from twister_jax.presets import complete, make_config


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU backend")
@pytest.mark.parametrize("agent", ["twister", "twm"])
def test_library_fusions_do_not_change_an_update(agent):
    config = complete(make_config(agent, "cpu", game="Pong"))
    subject = make_subject(config, 1_000)
    arguments = subject.state, subject.replay, update_keys(config, 1)[0]
    lowered = jax.jit(subject.agent.update).lower(*arguments)

    def first_moments_and_losses(**options):
        compiled = lowered.compile(compiler_options=options)
        assert ("ynn_fusion" in compiled.as_text()) == (not options), "nothing is compared"
        state, _, metrics = compiled(*arguments)
        leaves = jax.tree_util.tree_leaves_with_path((state, metrics))
        found = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        return {name: x for name, x in found.items() if ".mu" in name or "losses" in name}

    with_fusions = first_moments_and_losses()
    without = first_moments_and_losses(xla_cpu_experimental_ynn_fusion_type="")
    assert with_fusions.keys() == without.keys()
    assert len(with_fusions) > 100
    # A thousandth: a sample that falls the other way by rounding moves a little of everything. Some gradients
    # are zero but for rounding (a bias shared by all keys changes no attention): hence the largest moment.
    moments = max(float(np.linalg.norm(x)) for name, x in without.items() if ".mu" in name)
    apart = {
        name: np.linalg.norm(x - without[name]) / (np.linalg.norm(without[name]) + 1e-9 * moments)
        for name, x in with_fusions.items()
    }
    assert {name: error for name, error in apart.items() if not error < 1e-3} == {}
