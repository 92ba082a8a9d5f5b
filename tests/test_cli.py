"""The command line: what it refuses, in which words, and that the real thing runs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import twister_jax
from twister_jax.__main__ import checked, main, one_line, read_config, split_flags
from twister_jax.config import BASES, make_config, to_dict

ROOT = Path(__file__).parents[1]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "twister_jax", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


REFUSALS = [
    (["trian"], "unknown command 'trian' (did you mean train?)"),
    (["train", "--game", "Braekout"], "unknown game 'Braekout'"),
    (["train", "--game", "Braekout"], "Breakout"),
    (["train", "--gmae", "Pong"], "unknown option --gmae (did you mean game?)"),
    (["train", "--train.stepz", "3"], "did you mean train.steps"),
    (["train", "--steps", "3"], "did you mean train.steps"),
    (["train", "Pong"], "unknown argument 'Pong'"),
    (["train", "--agent", "twn"], "unknown agent 'twn' (did you mean twm?)"),
    (["train", "--preset", "cpo"], "unknown preset 'cpo' (did you mean cpu?)"),
    (["train", "--train.steps", "abc"], "train.steps = abc: must be a whole number"),
    (["train", "--train.steps", "1.5"], "train.steps = 1.5: must be a whole number"),
    (["train", "--train.steps"], "--train.steps takes one value, not nothing"),
    (["train", "--seed", "1", "2"], "--seed takes one value, not 1 2"),
    (["train", "--env.sticky-actions", "often"], "must be a number"),
    (["train", "--env.grayscale", "maybe"], "env.grayscale = maybe: must be True or False"),
    (["train", "--precision", "half"], "precision = half: must be one of auto, float32, bfloat16"),
    (["train", "--algorithm.crop-area", "1"], "--algorithm.crop_area takes 2 values, not 1"),
    (["train", "--preset", "paper", "--train.steps", "0"], "train.steps = 0: must be at least 1"),
    (["train", "--preset", "cpu", "--algorithm.model.hidden-size", "250"], "must be divisible by"),
    (["evaluate"], "--logdir is missing"),
    (["evaluate", "--logdir", "/nowhere/at/all"], "is not a run directory"),
    (["evaluate", "--logdir", "x", "--episodes", "-1"], "episodes = -1"),
    (["parity"], "--file is missing"),
    (["parity", "/nowhere.npz"], "no such file"),
    (["doctor", "--fast", "1"], "unknown option --fast"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS, ids=lambda x: " ".join(x)[:40])
def test_bad_input_gets_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("twister_jax: ")
    assert message in lines[0]


def test_a_refusal_is_quick_and_has_no_traceback(tmp_path):
    started = time.monotonic()
    done = run("train", "--game", "Braekout", "--preset", "debug", "--logdir", tmp_path / "run")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - started < 30  # about one second on an idle machine


def test_help_and_refusals_do_not_import_jax():
    code = (
        "import sys; from twister_jax.__main__ import main\n"
        "codes = [main(['train', '--preset', 'debug', '--train.steps', '0'])]\n"
        "codes += [main(['train', '--gam', 'x'])]\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as end: codes.append(end.code)\n"
        "assert codes == [2, 2, 0], codes\n"
        "assert 'jax' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("agent", ["twister", "twm"])
def test_help_lists_every_field_with_default_and_meaning(agent, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--agent", agent, "--preset", "paper", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    from twister_jax.config import flatten

    for name, _ in flatten(BASES[agent, "paper"]):
        assert "--" + name.replace("_", "-") in said, name
    assert "Agent steps of the whole run" in said
    assert "(default: 100000)" in said


def test_flags_choose_and_change_a_preset():
    config = read_config(
        [
            "--preset",
            "debug",
            "--game",
            "ms_pacman",
            "--train.steps=1e3",
            "--algorithm.model.hidden-size",
            "64",
        ]
    )
    assert (config.preset, config.game, config.train.steps) == ("debug", "MsPacman", 1000)
    assert config.algorithm.model.hidden_size == 64
    assert config.algorithm.batch_size == make_config("twister", "debug").algorithm.batch_size
    config = read_config(["--agent", "twm", "--preset", "debug", "--algorithm.model.actor", "8", "8", "8"])
    assert config.algorithm.model.actor == (8, 8, 8)
    config = read_config(["--preset", "debug", "--train.tensorboard", "false", "--env.grayscale", "True"])
    assert (config.train.tensorboard, config.env.grayscale) == (False, True)


def test_without_an_accelerator_the_preset_is_cpu_and_it_is_said(capsys):
    import jax

    if jax.default_backend() != "cpu":
        pytest.skip("this machine has an accelerator")
    assert read_config([]).preset == "cpu"
    assert "no accelerator: preset cpu" in capsys.readouterr().out


def test_splitting_flags():
    assert split_flags(["x", "--a-b.c-d", "1", "-2", "--e=f=g", "--h"]) == [
        ("", ["x"]),
        ("a_b.c_d", ["1", "-2"]),
        ("e", ["f=g"]),
        ("h", []),
    ]


def test_tyros_boxes_become_one_line():
    assert (
        one_line("╭─ Oh ──╮\n│ That is │\n│ wrong.  │\n│ ─────── │\n│ Help    │\n╰─────────╯\n")
        == "That is wrong"
    )


def test_help_wins_over_other_flags():
    assert checked(BASES["twister", "paper"], ["--seed", "x", "--help"], "train") == ["--help"]


def test_an_unwritable_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run("train", "--preset", "debug", "--game", "Catch", "--logdir", tmp_path / "file" / "run")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("twister_jax: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a configuration"),
        ('{"agent": "dqn"}', "must be one of twister, twm"),
    ],
)
def test_evaluating_a_foreign_directory_is_refused(tmp_path, content, message, capsys):
    (tmp_path / "config.json").write_text(content)
    assert main(["evaluate", "--logdir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_evaluating_a_run_without_checkpoints_is_refused(tmp_path, capsys):
    config = make_config("twister", "debug", game="Catch", precision="float32", logdir=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert main(["evaluate", "--logdir", str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_doctor_finds_this_machine_well(capsys):
    assert main(["doctor"]) == 0
    assert "everything works" in capsys.readouterr().out


def test_doctor_says_what_is_wrong(capsys, monkeypatch):
    from twister_jax import doctor

    monkeypatch.setitem(doctor.NEEDED, "jax", (99, 0))
    assert main(["doctor"]) == 1
    assert "is too old: `pip install 'jax>=99.0'`" in capsys.readouterr().out


def test_the_compilation_cache_may_be_unwritable(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run("evaluate", "--logdir", tmp_path, TWISTER_JAX_CACHE=str(tmp_path / "file" / "cache"))
    assert done.returncode == 2
    assert "is not a run directory" in done.stderr


def test_the_package_exports_what_it_lists():
    for name in twister_jax.__all__:
        assert getattr(twister_jax, name) is not None
    with pytest.raises(AttributeError):
        _ = twister_jax.nothing
