import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twister_jax.errors import UserError
from twister_jax.training.rundir import RunDirectory, check_same_run

CONFIG = {
    "game": "Pong",
    "seed": 0,
    "train": {"steps": 100, "log_every": 10},
    "algorithm": {"model": {"size": 512}},
}
CHANGEABLE = ("train", "evaluation.episodes")


def take(run, config, changeable):
    run.check_config(config, changeable)
    run.write_config(config)


def refused(*words):
    """Expects a `UserError` of one line that holds all `words`."""
    pattern = "".join(f"(?=.*{word})" for word in words)
    return pytest.raises(UserError, match=rf"\A{pattern}[^\n]*\Z")


def changed(**fields):
    config = json.loads(json.dumps(CONFIG))
    config.update(fields)
    return config


def test_creates_the_directory_and_config(tmp_path):
    with RunDirectory(tmp_path / "a" / "b") as run:
        take(run, CONFIG, CHANGEABLE)
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text()) == CONFIG


def test_a_resumed_run_may_change_what_it_may_change(tmp_path):
    with RunDirectory(tmp_path) as run:
        take(run, CONFIG, CHANGEABLE)
    longer = changed(train={"steps": 200, "log_every": 10})
    with RunDirectory(tmp_path) as run:
        take(run, longer, CHANGEABLE)
    assert json.loads((tmp_path / "config.json").read_text()) == longer


def test_differing_fields_are_all_named_with_both_values(tmp_path):
    with RunDirectory(tmp_path) as run:
        take(run, CONFIG, CHANGEABLE)
        before = (tmp_path / "config.json").read_bytes()
        other = changed(seed=7, algorithm={"model": {"size": 256}})
        with refused("seed is 0 there, 7 here", "algorithm.model.size is 512 there, 256 here", "LOGDIR"):
            take(run, other, CHANGEABLE)
        assert (tmp_path / "config.json").read_bytes() == before


def test_of_another_game_only_the_game_is_named_and_of_another_version_that_it_is_one(tmp_path):
    with RunDirectory(tmp_path) as run:
        take(run, CONFIG, CHANGEABLE)
        with refused('holds another run: game is "Pong" there, "Breakout" here: use the stored'):
            take(run, changed(game="Breakout", seed=3, new=1), CHANGEABLE)
        with refused("another version of twister_jax", "new is absent there, 1 here", "LOGDIR"):
            take(run, changed(new=1), CHANGEABLE)


def test_a_prefix_covers_whole_names_only(tmp_path):
    with RunDirectory(tmp_path) as run:
        take(run, {"train": 1, "training": 1}, ())
        take(run, {"train": 2, "training": 1}, ("train",))
        with refused("training is 1 there, 2 here"):
            take(run, {"train": 2, "training": 2}, ("train",))


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.floats(allow_nan=False)),
    lambda values: st.dictionaries(st.text("abc", min_size=1, max_size=2), values, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), trees, max_size=4))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_configuration_agrees_with_itself(tmp_path_factory, config):
    with RunDirectory(tmp_path_factory.mktemp("run")) as run:
        take(run, config, ())
        take(run, config, ())


def test_tuples_and_whole_floats_are_no_difference(tmp_path):
    with RunDirectory(tmp_path) as run:
        take(run, {"a": (1, 2), "b": 1.0}, ())
        take(run, {"a": [1, 2], "b": 1}, ())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "1", "null", "\0", '{"game": "Pong"', "[" * 100_000, " " * (2 << 20), b"\xff"],
)
def test_an_unreadable_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with RunDirectory(tmp_path) as run, refused("config.json", "put back", "LOGDIR"):
        take(run, CONFIG, CHANGEABLE)


@pytest.mark.parametrize("depth", [100, 400, 900])
def test_a_deep_config_is_refused(tmp_path, depth):
    (tmp_path / "config.json").write_text('{"a": ' * depth + "1" + "}" * depth)
    with RunDirectory(tmp_path) as run, refused("LOGDIR"):
        take(run, CONFIG, CHANGEABLE)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_results_without_a_config_are_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with RunDirectory(tmp_path) as run, refused(name, "no config.json", "LOGDIR"):
        take(run, CONFIG, CHANGEABLE)


def test_other_files_do_not_matter(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with RunDirectory(tmp_path) as run:
        take(run, CONFIG, CHANGEABLE)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_file_in_the_way_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("")
    with refused("file", "LOGDIR"), RunDirectory(tmp_path / "file" / below):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with refused("cannot be written to", "LOGDIR"), RunDirectory(tmp_path):
        pass


def mount(where, options):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")


def test_a_read_only_file_system_is_refused(tmp_path):
    mount(tmp_path, "size=1m,ro")
    try:
        with refused("cannot be written to", "Read-only", "LOGDIR"), RunDirectory(tmp_path):
            pass
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_file_system_is_refused(tmp_path):
    mount(tmp_path, "size=64k")
    try:
        with pytest.raises(OSError, match="No space"), open(tmp_path / "big", "wb") as file:
            file.write(bytes(1 << 20))
        with refused("cannot be written to", "No space", "LOGDIR"), RunDirectory(tmp_path):
            pass
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_config_that_cannot_be_written_is_refused_and_the_old_one_stays(tmp_path, monkeypatch):
    with RunDirectory(tmp_path) as run:
        take(run, CONFIG, CHANGEABLE)

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with refused("config.json", "No space", "LOGDIR"):
            take(run, changed(train={}), CHANGEABLE)
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom twister_jax.training.rundir import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])):\n  print('in', flush=True)\n  time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"in\n"
        with refused(f"in use by process {holder.pid}", "LOGDIR"), RunDirectory(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with RunDirectory(tmp_path):
        assert (tmp_path / "run.lock").read_text().startswith(f"{os.getpid()} ")
    assert not (tmp_path / "run.lock").read_text()


def test_the_lock_is_released_on_the_way_out(tmp_path):
    for _ in range(2):
        with RunDirectory(tmp_path), refused(str(os.getpid())), RunDirectory(tmp_path):
            pass


# Run directories from strangers


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    path.write_text(json.dumps(CONFIG))
    before = path.stat().st_mtime_ns
    yield path
    assert (path.read_text(), path.stat().st_mtime_ns) == (json.dumps(CONFIG), before)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_linked_lock_is_refused_and_its_target_left_alone(tmp_path, canary, link):
    (tmp_path / "run").mkdir()
    link(canary, tmp_path / "run" / "run.lock")
    with refused("run.lock is a (symbolic|hard) link.*: refused"), RunDirectory(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == ["run.lock"]


def test_a_lock_that_points_to_nothing_makes_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").symlink_to(tmp_path / "new")
    with refused("run.lock is a symbolic link: refused"), RunDirectory(tmp_path / "run"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_linked_config_is_not_read_or_written(tmp_path, canary):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").symlink_to(canary)
    with RunDirectory(tmp_path / "run") as run, refused("config.json is a symbolic link: refused"):
        take(run, changed(train={}), CHANGEABLE)
    assert (tmp_path / "run" / "config.json").is_symlink()


@pytest.mark.parametrize("name", ["run.lock", "config.json"])
def test_a_pipe_is_refused_and_does_not_hang(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with refused(f"{name} is not a regular file: refused"), RunDirectory(tmp_path) as run:
        take(run, CONFIG, CHANGEABLE)


def test_a_dangling_link_is_something_to_resume(tmp_path):
    (tmp_path / "checkpoints").symlink_to(tmp_path / "nothing")
    with RunDirectory(tmp_path) as run, refused("checkpoints", "no config.json", "LOGDIR"):
        take(run, CONFIG, CHANGEABLE)


def test_the_directory_itself_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with RunDirectory(tmp_path / "run") as run:
        take(run, CONFIG, CHANGEABLE)
    assert json.loads((tmp_path / "disk" / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize("stored", [{}, [], "run", 5, {"train": {}}])
def test_a_checkpoint_that_does_not_say_its_run_is_damaged(tmp_path, stored):
    check_same_run(tmp_path, CONFIG, CONFIG, ())
    check_same_run(tmp_path, None, CONFIG, ())  # of a version that recorded none
    with refused("does not say what run it is of: it is damaged"):
        check_same_run(tmp_path, stored, CONFIG, ())


def test_names_in_a_stored_config_stay_on_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"a\n\x1b[2J": 1}))
    with RunDirectory(tmp_path) as run, refused("is 1 there, absent here"):
        take(run, {}, ())
