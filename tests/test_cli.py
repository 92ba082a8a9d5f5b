"""The command line: what it refuses, in which words, and that the real thing runs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import twister_jax
from twister_jax import doctor, runtime
from twister_jax.cli import main, read_flags
from twister_jax.fields import describe
from twister_jax.presets import make_config

ROOT = Path(__file__).parents[1]


def run(*arguments, module="twister_jax", **environment):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
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
    (["train", "--num-envs", "3"], "unknown option --num-envs (did you mean"),
    (["train", "--"], "unknown option --"),
    (["train", "Pong"], "unknown argument 'Pong'"),
    (["train", "--agent", "twn"], "unknown agent 'twn' (did you mean twm?)"),
    (["train", "--preset", "cpo"], "unknown preset 'cpo' (did you mean cpu?)"),
    (["train", "--train.steps", "abc"], "train.steps = abc: must be a whole number"),
    (["train", "--train.steps", "1.5"], "train.steps = 1.5: must be a whole number"),
    (["train", "--train.steps", "1,5"], "train.steps = 1,5: must be a whole number"),
    (["train", "--agent", "twm", "--actor", "512,512"], "model.actor = 512,512: must be a whole number"),
    (["train", "--train.steps"], "--train.steps takes one value, not nothing"),
    (["train", "--seed", "1", "2"], "--seed takes one value, not 1 2"),
    (["train", "--env.sticky-actions", "often"], "must be a number"),
    (["train", "--env.grayscale", "maybe"], "env.grayscale = maybe: must be True or False"),
    (["train", "--precision", "half"], "precision = half: must be one of auto, float32, bfloat16"),
    (["train", "--algorithm.crop-area", "1"], "--algorithm.crop_area takes 2 values, not 1"),
    (["train", "--preset", "paper", "--train.steps", "0"], "train.steps = 0: must be between 1 and"),
    (["train", "--preset", "paper", "--train.steps", "1.7e308"], "train.steps = 1.7e308: must be a whole"),
    (["train", "--preset", "paper", "--env.noop-max", "1e19"], "must be a whole number"),
    (["train", "--preset", "paper", "--algorithm.batch-size", "1e9"], "must be between 1 and 100000"),
    (["train", "--preset", "paper", "--algorithm.batch-size", "1e5"], "at most 10,000,000 steps together"),
    (["train", "--preset", "paper", "--attention-context", "1e9"], "must be between 1 and 10000"),
    (["train", "--preset", "cpu", "--algorithm.model.hidden-size", "250"], "must be divisible by"),
    (["train", "--preset", "paper", "--log-every", "1e10"], "must be between 1 and 1000000000"),
    (["train", "--preset", "paper", "--report-every", "1e10"], "must be between 0 and 1000000000"),
    (["evaluate"], "--logdir is missing"),
    (["evaluate", "--logdir", "/nowhere/at/all"], "is not a run directory"),
    (["evaluate", "--logdir", "x", "--episodes", "-1"], "episodes = -1: must be between 0"),
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
        "import sys; from twister_jax.cli import main\n"
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
    for name in describe(make_config(agent, "paper")):
        assert "--" + name.replace("_", "-") in said, name
    assert "Agent steps of the whole run" in " ".join(said.split())
    assert "(default: 100000; between 1 and 1000000000)" in " ".join(said.split())


def test_flags_choose_and_change_a_preset():
    config = read_flags(
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
    config = read_flags(["--agent", "twm", "--preset", "debug", "--algorithm.model.actor", "8", "8", "8"])
    assert config.algorithm.model.actor == (8, 8, 8)
    config = read_flags(["--preset", "debug", "--train.tensorboard", "false", "--env.grayscale", "True"])
    assert (config.train.tensorboard, config.env.grayscale) == (False, True)


def test_without_an_accelerator_the_preset_is_cpu_and_it_is_said(capsys):
    import jax

    if jax.default_backend() != "cpu":
        pytest.skip("this machine has an accelerator")
    assert read_flags([]).preset == "cpu"
    assert "no accelerator: preset cpu" in capsys.readouterr().out


def test_a_last_part_that_is_unique_is_enough():
    config = read_flags(["--preset", "debug", "--steps", "500", "--episodes=7", "--discount", "0.9"])
    assert (config.train.steps, config.evaluation.episodes, config.algorithm.discount) == (500, 7, 0.9)


def test_help_wins_over_other_flags(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--seed", "x", "--help"])
    assert "--train.steps" in capsys.readouterr().out


def test_an_unwritable_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run("train", "--preset", "debug", "--game", "Catch", "--logdir", tmp_path / "file" / "run")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("twister_jax: ")
    assert "Traceback" not in done.stderr


SETTINGS = json.dumps(make_config("twister", "debug").to_dict()).replace('"seed": 0', '"seed": %s')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a configuration"),
        ('{"agent": "dqn", "preset": "paper", "game": "Pong"}', "one of twister, twm"),
        ("[" * 100_000, "cannot be read"),
        (b"\xff", "cannot be read"),
        (" " * (2 << 20), "cannot be read"),
        (SETTINGS % ("[" * 200 + "]" * 200), "nested too deeply"),
        (SETTINGS % ("1" * 400), "seed = 111"),
        (
            (SETTINGS % 0).replace('"updates_per_step": 0.5', f'"updates_per_step": {10**400}'),
            "too large a number",
        ),
    ],
    ids=lambda x: str(x[:20]),
)
def test_evaluating_a_foreign_directory_is_refused(tmp_path, content, message, capsys):
    (tmp_path / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)
    assert main(["evaluate", "--logdir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_pipe_in_place_of_the_configuration_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "config.json")
    for command in ("evaluate", "watch", "dream", "report", "export"):
        assert main([command, "--logdir", str(tmp_path)]) == 2
        assert "config.json is not a regular file: refused" in capsys.readouterr().err


def test_evaluating_a_run_without_checkpoints_is_refused(tmp_path, capsys):
    config = make_config("twister", "debug", game="Catch", precision="float32", logdir=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert main(["evaluate", "--logdir", str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_doctor_finds_this_machine_well(capsys):
    assert main(["doctor"]) == 0
    assert "everything works" in capsys.readouterr().out


def test_a_deleted_working_directory_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for command in ("train", "evaluate", "parity", "doctor"):
        assert main([command]) == 2
        assert capsys.readouterr().err == (
            "twister_jax: the working directory was deleted: change to another one\n"
        )


@pytest.mark.parametrize("name", ["JAX_ENABLE_X64", "JAX_DISABLE_JIT"])
def test_other_ways_of_working_are_refused(name, monkeypatch, capsys):
    import jax

    monkeypatch.setattr("twister_jax.training.train.train", lambda _: 0)
    jax.config.update(name.lower(), True)
    try:
        assert main(["train", "--preset", "debug", "--game", "Catch"]) == 2
    finally:
        jax.config.update(name.lower(), False)
    assert capsys.readouterr().err == (
        f"twister_jax: {name} is set, with which this program does not work: unset it\n"
    )


def test_a_user_without_a_home_has_no_cache(monkeypatch, capsys):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TWISTER_JAX_CACHE")
    monkeypatch.setattr(Path, "home", nobody)
    runtime.keep_compiled_programs("cpu")
    assert runtime.cache_directory("cpu") is None
    with pytest.raises(doctor.Finding, match="name a place with TWISTER_JAX_CACHE="):
        doctor.check_files()


def test_doctor_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setitem(doctor.NEEDED, "jax", (99, 0))
    assert main(["doctor"]) == 1
    assert "is too old: `pip install 'jax>=99.0'`" in capsys.readouterr().out


def test_the_compilation_cache_may_be_unwritable(tmp_path):
    (tmp_path / "file").write_text("in the way")
    flags = ["--preset", "debug", "--game", "Catch", "--steps", "70", "--report-every", "0"]
    arguments = ["train", "--agent", "minimal", *flags, "--logdir", tmp_path / "run"]
    done = run(*arguments, module="tests.third", TWISTER_JAX_CACHE=str(tmp_path / "file" / "cache"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "evaluation.json").exists()


CLOSED = [">/dev/full", ">&-", ">/dev/full 2>/dev/full", ">&- 2>&-", "| head -1"]


@pytest.mark.parametrize(("arguments", "code"), [("--help", 0), ("train --help", 0), ("trian", 2)])
def test_a_closed_or_full_output_ends_neither_help_nor_a_refusal(arguments, code):
    """What is said on the stream that is left is no traceback, and the exit code is what it always is."""
    for closed in CLOSED:
        shell = f"{sys.executable} -m twister_jax {arguments} {closed}"
        done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == (0 if "|" in closed else code), (shell, done.stderr)
        assert "Traceback" not in done.stderr + done.stdout, shell
        if code == 2:
            assert len(done.stderr.splitlines()) == ("2>" not in closed), (shell, done.stderr)


def test_the_package_exports_what_it_lists():
    for name in twister_jax.__all__:
        assert getattr(twister_jax, name) is not None
    with pytest.raises(AttributeError):
        _ = twister_jax.nothing
