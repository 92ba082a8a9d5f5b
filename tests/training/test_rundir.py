import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twister_jax.errors import UserError
from twister_jax.training import rundir
from twister_jax.training.rundir import RunDirectory, check_memory

CONFIG = {"game": "Pong", "train": {"steps": 100, "log_every": 10}, "algorithm": {"model": {"size": 512}}}
MAY_CHANGE = ("train", "evaluation.episodes")


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
        run.check_or_write_config(CONFIG, MAY_CHANGE)
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text()) == CONFIG


def test_a_resumed_run_may_change_what_it_may_change(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.check_or_write_config(CONFIG, MAY_CHANGE)
    longer = changed(train={"steps": 200, "log_every": 10})
    with RunDirectory(tmp_path) as run:
        run.check_or_write_config(longer, MAY_CHANGE)
    assert json.loads((tmp_path / "config.json").read_text()) == longer


def test_differing_fields_are_all_named_with_both_values(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.check_or_write_config(CONFIG, MAY_CHANGE)
        before = (tmp_path / "config.json").read_bytes()
        other = changed(game="Breakout", algorithm={"model": {"size": 256, "new": None}})
        with refused(
            'game is "Pong" there, "Breakout" here',
            "algorithm.model.size is 512 there, 256 here",
            "algorithm.model.new is absent there, null here",
            "LOGDIR",
        ):
            run.check_or_write_config(other, MAY_CHANGE)
        assert (tmp_path / "config.json").read_bytes() == before


def test_a_prefix_covers_whole_names_only(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.check_or_write_config({"train": 1, "training": 1}, ())
        run.check_or_write_config({"train": 2, "training": 1}, ("train",))
        with refused("training is 1 there, 2 here"):
            run.check_or_write_config({"train": 2, "training": 2}, ("train",))


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.floats(allow_nan=False)),
    lambda values: st.dictionaries(st.text("abc", min_size=1, max_size=2), values, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), trees, max_size=4))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_configuration_agrees_with_itself(tmp_path_factory, config):
    with RunDirectory(tmp_path_factory.mktemp("run")) as run:
        run.check_or_write_config(config, ())
        run.check_or_write_config(config, ())


def test_tuples_and_whole_floats_are_no_difference(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.check_or_write_config({"a": (1, 2), "b": 1.0}, ())
        run.check_or_write_config({"a": [1, 2], "b": 1}, ())


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0", '{"game": "Pong"'])
def test_an_unreadable_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with RunDirectory(tmp_path) as run, refused("config.json", "put back", "LOGDIR"):
        run.check_or_write_config(CONFIG, MAY_CHANGE)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_results_without_a_config_are_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with RunDirectory(tmp_path) as run, refused(name, "no config.json", "LOGDIR"):
        run.check_or_write_config(CONFIG, MAY_CHANGE)


def test_other_files_do_not_matter(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with RunDirectory(tmp_path) as run:
        run.check_or_write_config(CONFIG, MAY_CHANGE)
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
        run.check_or_write_config(CONFIG, MAY_CHANGE)

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with refused("config.json", "No space", "LOGDIR"):
            run.check_or_write_config(changed(train={}), MAY_CHANGE)
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
        assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"


def test_the_lock_is_released_on_the_way_out(tmp_path):
    for _ in range(2):
        with RunDirectory(tmp_path), refused(str(os.getpid())), RunDirectory(tmp_path):
            pass


def device(limit, used):
    stats = None if limit is None else {"bytes_limit": limit, "bytes_in_use": used}
    return SimpleNamespace(memory_stats=lambda: stats, __str__=lambda self: "cuda:0")


def test_memory_that_suffices_is_accepted():
    check_memory({"replay": 1 << 20}, jax.devices()[0])
    check_memory({"replay": 1 << 20})
    check_memory({"replay": 60, "model": 40}, device(200, 100))


def test_device_memory_that_does_not_suffice_is_refused_with_the_numbers():
    with refused("3.00 GB needed", r"replay 1.00, model 2.00", "2.90 GB available", "replay.capacity"):
        check_memory({"replay": 10**9, "model": 2 * 10**9}, device(3 * 10**9, 10**8))


def test_host_memory_that_does_not_suffice_is_refused_with_the_numbers():
    for where in (None, device(None, 0), jax.devices("cpu")[0]):
        with refused("this host", "1000000.00 GB needed", "GB available"):
            check_memory({"replay": 10**15}, where)


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("", {}, 8_000_000 * 1024),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "5000"}, 5000 - 1000 + 300),
        ("0::/gone\n", {"memory.max": "5000"}, 5000 - 1000 + 300),
        ("4:cpu,memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "900"}, 200),
    ],
)
def test_a_lower_limit_of_the_control_group_counts(tmp_path, cgroup, files, expected):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    (proc / "self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = groups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        usage = "memory.current" if name.endswith("max") else "memory.usage_in_bytes"
        (path.parent / usage).write_text("1000")
        (path.parent / "memory.stat").write_text("anon 7\nactive_file 100\ninactive_file 200\n")
    assert rundir.host_available(proc, groups) == expected


def test_nothing_is_refused_where_the_memory_is_unknown(tmp_path, monkeypatch):
    assert rundir.host_available(tmp_path, tmp_path) is None
    monkeypatch.setattr(rundir, "host_available", lambda: None)
    check_memory({"replay": 10**18})
