from pathlib import Path

import numpy as np
import pytest

from twister_jax.errors import UserError
from twister_jax.parity import check, load
from twister_jax.twm.interop import load_published, to_published, weights
from twister_jax.twm.parity import config_of

FIXTURE = Path(__file__).parents[1] / "fixtures" / "twm_small.npz"


def published() -> tuple[dict[str, np.ndarray], dict]:
    sizes, fixture = load(FIXTURE)
    named = {
        name.removeprefix("param/"): value for name, value in fixture.items() if name.startswith("param/")
    }
    return named, sizes


def test_every_quantity_of_the_fixture_agrees():
    _, fixture = load(FIXTURE)
    rows = check(FIXTURE)
    assert [row for row in rows if not row.ok] == []
    compared = {row.name for row in rows}
    given = {"out/wm/context_z_sample", "out/wm/z_sample", "out/im/restart_z", "out/im/z_prior_sample"}
    results = {name for name in fixture if name.startswith(("out/", "grad/"))}
    assert {name for name in results - given - compared if not name.startswith("out/im/start_")} == set()


def test_published_weights_are_read_and_written_back_unchanged():
    named, sizes = published()
    config = config_of(sizes).model
    assert {weight.name for weight in weights(config)} == set(named)
    params = load_published(named, config)
    back = {}
    for network in ("observation", "dynamics", "actor", "critic"):
        back |= to_published(network, params[network], config)
    for name, value in named.items():
        np.testing.assert_array_equal(back[name], value.astype(np.float32), err_msg=name)


def test_foreign_weights_are_refused():
    named, sizes = published()
    config = config_of(sizes).model
    del named["ac.actor_model.linear1.weight"]
    with pytest.raises(UserError, match=r"lack.*actor_model"):
        load_published(named, config)
