from types import SimpleNamespace

import jax
import pytest

from tests.runs import config_of
from twister_jax.agents import make_agent
from twister_jax.envs import make_vector_env
from twister_jax.errors import UserError
from twister_jax.presets import make_config
from twister_jax.training import memory
from twister_jax.training.memory import check_memory
from twister_jax.training.progress import Progress
from twister_jax.training.run import Run
from twister_jax.training.signals import Signals


def refused(*words):
    """Expects a `UserError` of one line that holds all `words`."""
    pattern = "".join(f"(?=.*{word})" for word in words)
    return pytest.raises(UserError, match=rf"\A{pattern}[^\n]*\Z")


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
    assert memory.host_available(proc, groups) == expected


def test_nothing_is_refused_where_the_memory_is_unknown(tmp_path, monkeypatch):
    assert memory.host_available(tmp_path, tmp_path) is None
    monkeypatch.setattr(memory, "host_available", lambda: None)
    check_memory({"replay": 10**18})


@pytest.mark.parametrize(
    ("free", "said"),
    [(10.0, []), (4.0, ["memory is tight: 4.00 GB available, 4.80 GB needed while programs"]), (2.4, None)],
)
def test_the_process_itself_and_compiling_count(free, said, monkeypatch):
    monkeypatch.setattr(memory, "host_available", lambda: int(free * 1e9))
    lines = []

    def start(where):
        memory.check_start(10**9, 10**9, 23 * 10**8, where, lines.append)

    if said is None:
        with refused("2.50 GB needed", "the process itself 0.50", "2.40 GB available"):
            start(None)
    else:
        start(device(None, 0))
        assert [line[: len(said[0])] for line in lines] == said
    lines.clear()
    start(device(10**11, 0))  # an accelerator: the host only compiles
    assert len(lines) == (free < 2.8)
    with refused("2.00 GB needed", "replay 1.00, agent 1.00"):
        start(device(10**9, 0))


@pytest.mark.parametrize("agent", ["twister", "twm"])
def test_preset_cpu_is_refused_with_a_quarter_of_a_gigabyte(tmp_path, agent, monkeypatch):
    monkeypatch.setattr(memory, "host_available", lambda: 250_000_000)
    config = make_config(agent, "cpu", "Catch", logdir=str(tmp_path), precision="float32")
    with refused("not enough memory", "GB needed", "the process itself 0.50", "0.25 GB available"):
        Run(config, make_agent, make_vector_env, Progress(), Signals())
    assert not list(tmp_path.iterdir())


def test_what_updates_take_for_themselves_is_asked_for_before_the_first(tmp_path, monkeypatch):
    run = Run(config_of(tmp_path), make_agent, make_vector_env, Progress(), Signals())
    monkeypatch.setattr(memory, "host_available", lambda: 10)
    with refused("not enough memory", "running"):
        run.program("act")
    run.finish_saving()
    run.env.close()
