"""The page about a run: what is on it, that it needs nothing else, and what it warns of."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from twister_jax.cli import main
from twister_jax.view import plots, report, warnings
from twister_jax.view.record import read


@pytest.fixture
def copy(run, tmp_path):
    """The run, without what other tests wrote into it."""
    directory = tmp_path / "run"
    shutil.copytree(run, directory, ignore=shutil.ignore_patterns("videos", "dreams", "report.html"))
    return directory


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_page_that_needs_nothing_else(copy):
    assert main(["report", str(copy)]) == 0
    page = (copy / "report.html").read_text()
    record = json.loads((copy / "evaluation.json").read_text())
    assert f"mean {record['mean']:g}" in page
    assert "60 of 60 steps" in page
    assert "differs from paper" in page
    assert record["protocol"]["commit"] in page
    assert page.count("<svg") == len(re.findall("</svg>", page)) > 5
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page), "it would load something"
    assert "width=device-width" in page
    assert "data:image/png;base64," in page, "pictures of the training"


def test_while_the_run_goes_on(copy):
    (copy / "evaluation.json").unlink()
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"env_steps": 61, "upda')
    assert main(["report", str(copy), "--out", str(copy / "now" / "page.html")]) == 0
    assert "not yet" in (copy / "now" / "page.html").read_text()


def test_a_run_that_has_written_nothing_yet(copy):
    for name in ("metrics.jsonl", "evaluation.json"):
        (copy / name).unlink()
    for name in ("checkpoints", "pictures"):
        shutil.rmtree(copy / name)
    assert main(["report", str(copy)]) == 0
    assert "0 of 60 steps" in (copy / "report.html").read_text()


def test_several_runs_are_compared(copy, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "seed": 5}))
    assert main(["report", str(copy), str(other), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert "2 runs compared" in page
    assert "Minimal on Catch, seed 0" in page
    assert "Minimal on Catch, seed 5" in page
    assert "seed: 0 | 5" in page


def warned(directory, **last):
    rows = rows_of(directory)
    rows[-1] |= last
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return warnings.of(read(directory))


def test_a_sound_run_has_no_warnings(copy):
    assert warned(copy) == []


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"health/skipped": 7, "health/longest": 3}, "7 updates were skipped"),
        ({"entropy/policy": 1e-4}, "no entropy left"),
        ({"entropy/posterior": 0.0}, "latents have collapsed"),
        ({"losses/image": None}, "no finite value in the newest row: losses/image"),
    ],
)
def test_numbers_that_a_reader_should_know_of(copy, last, said):
    (warning,) = warned(copy, **last)
    assert said in warning


def test_a_replay_that_forgets(copy):
    config = json.loads((copy / "config.json").read_text())
    config["replay"]["capacity"] = 50
    (copy / "config.json").write_text(json.dumps(config))
    assert "the replay holds 50 of the run's 60 steps" in warned(copy)[0]


@pytest.mark.parametrize("constant", [True, False])
def test_a_decoder_that_shows_a_constant(copy, constant):
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 16, 64, 3), np.uint8)
    if constant:
        noise[1::4] = 100
    picture = np.concatenate([np.full((1024, 92, 3), 255, np.uint8), noise.reshape(1024, 1024, 3)], axis=1)
    Image.fromarray(picture).save(copy / "pictures" / "open_loop-0000060.png")
    assert len(warned(copy)) == constant


def test_text_of_a_stranger_is_not_run(copy):
    manifest = sorted((copy / "checkpoints").glob("0*/manifest.json"))[-1]
    assert manifest.exists()
    row = rows_of(copy)[-1] | {"losses/<script>alert(1)</script>": 1.0}
    with open(copy / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    assert main(["report", str(copy)]) == 0
    assert "<script>" not in (copy / "report.html").read_text()


def test_notes_of_the_run_are_warnings(copy):
    record = read(copy)
    host = {"counters": {"notes": ["resumed at step 30 with new episodes"]}}
    assert warnings.of(dataclasses.replace(record, host=host)) == ["resumed at step 30 with new episodes"]


def test_resumptions_are_counted(copy):
    assert "resumed" not in report.facts(read(copy))["time"]
    (copy / "events.out.tfevents.2.host").write_bytes(b"")
    assert report.facts(read(copy))["time"].endswith("resumed 1 time")


def test_runs_that_are_called_alike_are_told_apart(copy, tmp_path):
    shutil.copytree(copy, tmp_path / "again" / copy.name)
    records = [read(copy), read(tmp_path / "again" / copy.name)]
    page = report.render(records)
    for record in records:
        assert f"Minimal on Catch, seed 0 ({record.directory})" in page


def test_the_newest_of_every_kind_is_shown(copy):
    videos = copy / "videos"
    videos.mkdir()
    for name in ("watch-0000020-best.mp4", "watch-0000060-best.mp4", "watch-0000060-worst.mp4"):
        (videos / name).write_bytes(name.encode())
    (videos / "watch-0000060-median.mp4").write_bytes(bytes(report.LARGEST_VIDEO + 1))
    (videos / "watch-0000060-sheet.png").write_bytes(b"no picture")
    shown = report.media(read(copy))["How it plays"]
    captions = [item["caption"] for item in shown]
    assert captions[0] == (
        "These games at a glance, after 60 steps: videos/watch-0000060-sheet.png is not shown here (damaged)"
    )
    assert captions[1] == "The best game, after 60 steps"
    assert captions[2].startswith("The median game, after 60 steps: videos/watch-0000060-median.mp4 is not")
    assert [bool(item["data"]) for item in shown] == [False, True, False, True]


def test_metrics_that_stay_silent_have_no_plot(copy):
    rows = rows_of(copy)
    assert "health/skipped" in rows[-1]
    assert "Skipped updates" not in plots.curves({"run": rows})
    rows[-1]["health/skipped"] = 2
    assert len(plots.curves({"run": rows})["Skipped updates"]) == 1


def test_siblings_of_several_runs_have_one_name_for_each_run():
    rows = [{"env_steps": step, **{f"losses/part_{k}": step + k for k in range(9)}} for step in (1, 2)]
    (alone,) = plots.curves({"run": rows})["Losses"]
    assert [alone.count(f">part_{k}</text>") for k in (0, 1, 8)] == [1, 0, 1]
    (both,) = plots.curves({"here": rows, "there": rows})["Losses"]
    assert [both.count(f">{name}</text>") for name in ("here", "there")] == [1, 1]
