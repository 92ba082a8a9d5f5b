"""18. Counts fit their numbers. 19. See tests/nn/test_optimizer.py. 20. What is written is bounded."""

import pytest

from tests.runs import config_of
from twister_jax.errors import UserError
from twister_jax.presets import make_config, validate
from twister_jax.training.run import LOSS_SHARE, Run
from twister_jax.training.train import train


def test_more_updates_than_can_be_counted_are_refused():
    settings = {"train.steps": 10**9, "train.updates_per_step": 3.0}
    with pytest.raises(UserError, match=r"updates, of which 2,147,483,647 can be counted"):
        validate(make_config(**settings))
    validate(make_config(**settings | {"train.updates_per_step": 2.0}))
    with pytest.raises(UserError, match=r"train\.steps = 1000000001: must be between 1 and 1000000000"):
        validate(make_config(**{"train.steps": 10**9 + 1}))


def test_a_slow_run_writes_no_more_than_a_loss_would_cost(tmp_path, monkeypatch):
    """A step takes five minutes here: after a day, ten minutes are less than 1 % of what it took."""
    clock, saved = [0.0], []

    class Clock:
        @staticmethod
        def monotonic():
            return clock[0]

    def save(self, wait=True):
        self._tried_at, self._tried_steps = self.seconds, self.counters.env_steps
        saved.append(clock[0] / 60)
        return True

    housekeep = Run.housekeep

    def slow(self):
        clock[0] += 300
        housekeep(self)

    monkeypatch.setattr("twister_jax.training.run.time", Clock)
    monkeypatch.setattr(Run, "save", save)
    monkeypatch.setattr(Run, "housekeep", slow)
    settings = {"train.checkpoint_every": 10**9, "train.log_every": 10**6, "train.report_every": 0}
    settings |= {"algorithm.warm_up": 0, "algorithm.second": 0}
    assert train(config_of(tmp_path, 600, **settings)) == 0
    gaps = [after - before for before, after in zip([0, *saved[:-2]], saved[:-1], strict=True)]
    assert all(10 < gap <= max(10, LOSS_SHARE * at) + 5 for gap, at in zip(gaps, saved, strict=False))
    assert gaps[0] == pytest.approx(15)  # the first step after ten minutes
    assert gaps[-1] >= 30
    assert len(saved) < 175  # and not 200
