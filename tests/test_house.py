"""How the house is kept: names stay in their rooms, files stay small, a third agent is one package."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from twister_jax import agents, envs

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("twister_jax", "benchmarks", "experiments") for path in (ROOT / folder).rglob("*.py")
)
REGISTRIES = {ROOT / "twister_jax/agents/__init__.py", ROOT / "twister_jax/envs/__init__.py"}
AGENT_NAMES = ("twister", "twm")
SUITE_NAMES = ("atari", "catch", "dmc", "gym", "remember")


def room_of(path: Path) -> str | None:
    """The agent or the suite that a file belongs to."""
    parts = path.relative_to(ROOT).parts
    if parts[:2] == ("twister_jax", "agents") and len(parts) > 3:
        return parts[2]
    if parts[:2] == ("twister_jax", "envs") and path.stem in SUITE_NAMES:
        return path.stem
    return None


def test_names_of_agents_and_suites_stay_in_their_rooms_and_the_registries():
    assert set(AGENT_NAMES) <= agents.AGENTS.keys()
    assert set(SUITE_NAMES) <= envs.SUITES.keys()
    word = re.compile(rf"(?<![\w.-])({'|'.join((*AGENT_NAMES, *SUITE_NAMES))})(?![\w-])", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in SOURCES
        if path not in REGISTRIES and room_of(path) is None
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if word.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("most", "pattern"), [(400, "**/*.py"), (150, "training/loop.py")])
def test_files_stay_readable(most, pattern):
    long = {
        str(path.relative_to(ROOT)): length
        for path in (ROOT / "twister_jax").glob(pattern)
        if (length := len(path.read_text().splitlines())) > most
    }
    assert not long


@pytest.mark.parametrize(
    ("version", "extra"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19", "cuda12"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release", "cuda"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  575.57.08  Release", "cuda12"),
    ],
)
def test_the_cuda_build_follows_the_driver(tmp_path, version, extra):
    (tmp_path / "version").write_text(version + "\n")
    makefile = (
        (ROOT / "Makefile").read_text().replace("/proc/driver/nvidia/version", str(tmp_path / "version"))
    )
    (tmp_path / "Makefile").write_text(makefile + "\nshow:\n\t@echo $(EXTRAS)\n")
    said = subprocess.run(["make", "-s", "show"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == extra


TYPED = ["two words", "O'Brien", 'a "b" c', "$(touch evil)", "`touch evil`", "; touch evil", "$HOME", "a\\b"]
TYPED += ["$(shell touch evil)", "$$", "*", "--seed 1"]
CALLS = [
    ("train", ["GAME", "AGENT", "PRESET", "SEED", "DEVICES", "STEPS", "LOGDIR"]),
    ("train", ["SEEDS"]),
    ("evaluate", ["LOGDIR"]),
    ("parity", ["FILE"]),
    ("suite", ["SUITE"]),
]


@pytest.fixture
def make(tmp_path):
    """Runs make with a Python that prints what it is given, one argument a line."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (binaries / "python").chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".venv" / ".installed").touch()

    def run(*arguments):
        done = subprocess.run(["make", "-s", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "evil").exists(), arguments
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize("typed", TYPED)
def test_what_is_typed_behind_make_is_only_text(make, typed):
    """Variables reach the program as they are: nothing of them is run, expanded, or split at blanks."""
    for target, names in CALLS:
        said = make(target, *(f"{name}={typed}" for name in names))
        assert said.count(typed) == len(names), (target, said)


@pytest.mark.parametrize("typed", TYPED)
def test_lists_of_a_suite_are_split_at_blanks_alone(make, typed):
    for name in ("GAMES", "SEEDS"):
        said = make("suite", f"{name}={typed}")
        assert said[said.index(f"--{name.lower()}") + 1 :] == typed.split()


def test_arguments_are_words_of_the_shell(make):
    assert make("train", """ARGS=--a 'b c' "$HOME/x" """)[-3:] == ["--a", "b c", f"{os.environ['HOME']}/x"]
    assert make("train", "SEEDS=0,1")[-2:] == ["--seeds", "0,1"]
    assert make("train")[-2:] == ["--seed", "0"]
