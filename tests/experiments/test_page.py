"""Figures and the page: that they are there, whole, and draw what the numbers say."""

import re
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import plots, scores
from experiments.__main__ import main
from tests.experiments import simulated

pytest.importorskip("matplotlib")
SCORES = {"Pong": [20.0, 18.0, 19.0], "Breakout": [30.0, 40.0, 20.0]}


def test_the_page_holds_every_figure_and_needs_nothing_else(tmp_path):
    ours = simulated.write_suite(tmp_path, SCORES, name="ours")
    simulated.write_suite(tmp_path, SCORES, agent="twm", name="theirs")
    (ours / "twister/Pong/seed1/report.html").write_text("a report")
    out = tmp_path / "out"
    arguments = ["plot", str(ours), str(tmp_path / "theirs"), "--against", "simulus", "twister"]
    assert main([*arguments, "--out", str(out)]) == 0
    for name in ("curves", "aggregates", "profiles", "games"):
        assert "<svg" in (out / f"{name}.svg").read_text()
        assert np.asarray(Image.open(out / f"{name}.png").convert("L")).std() > 10  # not blank
    page = (out / "index.html").read_text()
    assert page.count("<svg") == 4
    links = re.findall(r'(?:src|href)="([^#"]+)"', page)
    assert "../ours/twister/Pong/seed1/report.html" in links
    assert all((out / link).exists() for link in links)
    assert "environment steps (1 step = 4 frames)" in page
    ids = [name for name in re.findall(r'<clipPath id="([^"]+)"', page)]
    assert len(ids) == len(set(ids))  # figures on one page do not clip one another


def test_a_curve_is_the_mean_of_its_runs_between_their_extremes(tmp_path):
    simulated.write_suite(tmp_path, SCORES)
    (found,) = scores.read_sets([str(tmp_path)])
    curve = plots.learning_curve(found, "Breakout")
    assert np.all((curve.low <= curve.mean) & (curve.mean <= curve.high))
    assert curve.steps[-1] == 100_000
    assert curve.mean[-1] == pytest.approx(30, rel=0.2)  # the simulation's noise is a tenth
    assert curve.mean[len(curve.mean) // 2] == pytest.approx(15, rel=0.3)


def test_the_same_runs_give_the_same_files(tmp_path):
    simulated.write_suite(tmp_path, {"Pong": [1.0, 2.0]})
    found = scores.read_sets([str(tmp_path)])
    assert next(plots.draw(found, [])) == next(plots.draw(found, []))


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    directory = simulated.write_suite(tmp_path, {"Pong": [1.0]})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(directory)]) == 2
    assert "pip install 'twister_jax[experiments]'" in capsys.readouterr().err
