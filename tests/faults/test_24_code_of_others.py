"""24. A file never decides whose code runs: an environment's module is imported where a person named it."""

import dataclasses
import json
import shutil
import sys

import pytest

import twister_jax as tj
from tests.faults.test_01_hostile_directory import forge
from twister_jax import cli, envs
from twister_jax.envs.gym import GymConfig, examine
from twister_jax.errors import UserError
from twister_jax.view.export import export
from twister_jax.view.policy import load

GAME = "gym:run.evil:Evil-v0"
MODULE = """
import pathlib
from tests.third import worlds
pathlib.Path(__file__).with_name("it-ran").touch()
worlds.gymnasium.register("Evil-v0", worlds.Plain)
"""


def names_code(content, home):
    content["host"]["config"] |= {"game": GAME, "env": dataclasses.asdict(GymConfig(num_envs=2))}


@pytest.fixture
def run(tmp_path, undisturbed, monkeypatch):
    """A run that brings an environment along, below the folder that Python imports from."""
    directory = tmp_path / "run"
    shutil.copytree(undisturbed, directory)
    (directory / "evil.py").write_text(MODULE)
    config = json.loads((directory / "config.json").read_text())
    config |= {"game": GAME, "env": dataclasses.asdict(GymConfig(num_envs=2))}
    (directory / "config.json").write_text(json.dumps(config))
    forge(names_code)(directory, None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    examine.cache_clear()  # it remembers what other tests let run
    yield directory
    for name in ("run", "run.evil"):
        sys.modules.pop(name, None)


def ran(run):
    return (run / "it-ran").exists()


COMMANDS = {
    "evaluate --episodes 2": 2,
    "watch --episodes 1": 2,
    "dream --starts 4 --horizon 2": 2,
    "report": 0,
    "export": 0,
    "train --agent minimal --preset debug": 2,
}


def test_every_command_that_takes_a_run_is_tried():
    assert {line.split()[0] for line in COMMANDS} == cli.COMMANDS.keys() - {"parity", "doctor"}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_code_that_only_a_file_names(command, run, capsys):
    assert cli.main([*command.split(), "--logdir", "run"]) == COMMANDS[command]
    said = capsys.readouterr().err
    assert not ran(run)
    if COMMANDS[command] and "train" not in command:
        assert said.count("\n") == 1
        assert "would run the code of the module run.evil" in said
        assert f"--game {GAME}" in said


def test_what_is_named_is_run(run):
    assert cli.main(["evaluate", "--logdir", "run", "--episodes", "2", "--game", GAME]) == 0, (
        capsys.readouterr()
    )
    assert ran(run)
    assert json.loads((run / "evaluation.json").read_text())["game"] == GAME


@pytest.mark.parametrize("named", ["Catch", "gym:run.other:Evil-v0", "gym:CartPole-v1"])
def test_another_name_allows_nothing(run, named, capsys):
    assert cli.main(["evaluate", "--logdir", "run", "--game", named]) == 2
    assert f"--game {named}: run is a run of 'gym:run.evil:Evil-v0'" in capsys.readouterr().err
    assert not ran(run)


def test_the_name_of_a_game_may_be_given_where_it_is_not_needed(undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed, tmp_path / "run")
    line = ["evaluate", "--logdir", str(tmp_path / "run"), "--episodes", "2", "--game"]
    assert cli.main([*line, "catch"]) == 0
    assert cli.main([*line, "Breakout"]) == 2
    assert "is a run of Catch" in capsys.readouterr().err


def test_training_names_it(tmp_path, run):
    line = f"train --agent minimal --preset debug --steps 60 --logdir mine --game {GAME}"
    assert cli.main(line.split()) == 0
    assert ran(run)


def test_in_python_it_is_imported_first(run, tmp_path):
    policy = load("run")
    export(policy, tmp_path / "policy.safetensors", "MIT")
    from_file = load(tmp_path / "policy.safetensors")
    calls = [
        lambda: tj.make_vector_env(policy.config.game, policy.config.env, num_envs=1, seed=0),
        lambda: tj.dream_env(policy),
        lambda: tj.dream_env(from_file),
        lambda: tj.dream_env("run"),
        lambda: envs.suite("gym").protocol("run.evil:Evil-v0", policy.config.env),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"would run the code of the module run\.evil"):
            call()
    assert not ran(run)
    envs.admit(GAME)
    assert ran(run)
    tj.make_vector_env(policy.config.game, policy.config.env, num_envs=1, seed=0).close()


def test_what_was_trained_in_other_environments_does_not_play(tmp_path, undisturbed, capsys):
    """As where what the game is has changed since, or what a file says of it was changed."""
    shutil.copytree(undisturbed, tmp_path / "run")
    forge(lambda content, home: content["host"]["spec"].update(discrete=False))(tmp_path / "run", None)
    for command in ("evaluate --episodes 2", "watch --episodes 1", "dream --starts 4 --horizon 2"):
        assert cli.main([*command.split(), "--logdir", str(tmp_path / "run")]) == 2
        err = capsys.readouterr().err
        assert "Catch has discrete = True here, and what plays was trained with False" in err
        assert len([line for line in err.splitlines() if line.startswith("twister_jax: ")]) == 1


@pytest.mark.parametrize("change", [{"image_shape": (64, 64, 1)}, {"num_actions": 5}])
def test_nor_does_a_policy_file(tmp_path, undisturbed, change):
    policy = load(undisturbed)
    spec = dataclasses.replace(policy.spec, **change)
    agent = tj.make_agent(policy.config, spec)
    state = agent.init(tj.key_for(0, tj.Purpose.INIT))
    other = dataclasses.replace(policy, spec=spec, agent=agent, state=state)
    export(other, tmp_path / "policy.safetensors", "MIT")
    with pytest.raises(
        UserError, match=f"Catch has {next(iter(change))} = .* here, and what plays was trained"
    ):
        tj.dream_env(tmp_path / "policy.safetensors")
