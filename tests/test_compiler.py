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
    keys = update_keys(config, 5)
    lowered = jax.jit(subject.agent.update).lower(subject.state, subject.replay, keys[0])

    def compiled(**options):
        program = lowered.compile(compiler_options=options)
        assert ("ynn_fusion" in program.as_text()) == (not options), "nothing is compared"
        return program

    def first_moments_and_losses(program, key):
        state, _, metrics = program(subject.state, subject.replay, key)
        leaves = jax.tree_util.tree_leaves_with_path((state, metrics))
        found = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        return {name: x for name, x in found.items() if ".mu" in name or "losses" in name}

    with_fusions, without_fusions = compiled(), compiled(xla_cpu_experimental_ynn_fusion_type="")
    apart = []
    for key in keys:
        ours = first_moments_and_losses(with_fusions, key)
        without = first_moments_and_losses(without_fusions, key)
        assert ours.keys() == without.keys()
        assert len(ours) > 100
        # Some gradients are zero but for rounding (a bias shared by all keys changes no attention): hence the
        # largest moment.
        moments = max(float(np.linalg.norm(x)) for name, x in without.items() if ".mu" in name)
        apart.append(
            {
                name: np.linalg.norm(x - without[name]) / (np.linalg.norm(without[name]) + 1e-9 * moments)
                for name, x in ours.items()
            }
        )
    # The median: a sample that falls the other way by rounding, as happens with a key now and then, moves a
    # little of everything. What is compiled wrongly is wrong with every key.
    typical = {name: np.median([errors[name] for errors in apart]) for name in apart[0]}
    assert {name: error for name, error in typical.items() if not error < 1e-3} == {}
