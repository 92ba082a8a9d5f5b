"""The benchmarks: their counts, their refusals, and that the whole thing runs at the smallest size."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import breakdown, convolutions, loop, machine, operations, programs, update
from benchmarks.__main__ import main
from benchmarks.breakdown import Span
from benchmarks.convolutions import Convolution
from benchmarks.options import SECTIONS, make_config, parse
from benchmarks.report import Report, Row
from benchmarks.timing import Clock, Times
from twister_jax.agents import AGENTS
from twister_jax.nn.kernels import conv2d, conv2d_transpose
from twister_jax.runtime import keep_compiled_programs, tracing_for

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """The program turns JAX's persistent cache on; later tests get their settings back."""
    monkeypatch.setenv("TWISTER_JAX_CACHE", str(tmp_path / "cache"))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # or this directory stays in use


def test_what_was_compiled_for_the_clock_is_not_compiled_again(own_cache):
    """The section `loop`, and the next training, find what the section `update` compiled."""

    def doubled(x):
        return 2 * x

    keep_compiled_programs(jax.default_backend())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with update.fresh_cache():
        jax.jit(doubled)(jnp.ones(3))
    assert len(list(own_cache.glob("*/jit_doubled-*-cache"))) == 1
    jax.clear_caches()
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    jax.jit(doubled)(jnp.ones(3))
    jax.monitoring.clear_event_listeners()
    assert "/jax/compilation_cache/cache_hits" in events
    assert len(list(own_cache.glob("*/jit_doubled-*-cache"))) == 1  # another key would have made another


def test_a_section_fills_the_table_and_the_file(tmp_path, own_cache, capsys):
    path = tmp_path / "out.json"
    assert main(["--preset", "debug", "--quick", "--only", "peak", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["failed"] == {}
    assert found["matmul_peak_flops"] > 1e9
    assert {row["section"] for row in found["rows"]} == {"peak"}
    table = capsys.readouterr().out.splitlines()
    assert len([line for line in table if line.startswith("peak ")]) == len(found["rows"])


@pytest.mark.slow
def test_debug_preset_runs_and_writes_what_is_promised(tmp_path, own_cache, capsys):
    path = tmp_path / "out.json"
    sections = ["peak", "update"]
    arguments = ["--preset", "debug", "--quick", "--only", *sections]
    assert main([*arguments, "--json", str(path)]) == 0

    found = json.loads(path.read_text())
    assert found["failed"] == {}
    assert found["seconds_per_update"] > 0
    assert found["tokens_per_second"] == pytest.approx(2 * 16 / found["seconds_per_update"])
    assert found["flops_per_update"] > 1e6
    assert found["utilization"] == pytest.approx(
        found["flops_per_update"] / found["seconds_per_update"] / found["matmul_peak_flops"]
    )
    assert found["published_flops_per_update"] is None  # holds at the paper's setting alone
    assert found["machine"]["jax"] == jax.__version__

    names = {(row["section"], row["name"]) for row in found["rows"]}
    assert {
        ("update", "compile, cold"),
        ("update", "compile, warm"),
        ("update", "temporary memory"),
    } <= names
    for row in found["rows"]:
        assert row["low"] is None or row["low"] <= row["value"] <= row["high"]

    table = capsys.readouterr().out.splitlines()
    assert len([line for line in table if line.startswith(("peak ", "update "))]) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_every_section_runs_for_every_agent(agent, tmp_path, own_cache):
    path = tmp_path / "out.json"
    arguments = ["--agent", agent, "--preset", "debug", "--quick", "--all", "--loop-steps", "24"]
    assert main([*arguments, "--json", str(path), "--profile", str(tmp_path / "trace")]) == 0
    found = json.loads(path.read_text())
    assert {row["section"] for row in found["rows"]} == {*SECTIONS, "profile"}
    assert found["failed"] == {}
    took = {row["name"]: row["value"] for row in found["rows"] if row["section"] == "breakdown"}
    assert took["world_model"] > took["other"]  # the parts are found
    unmeasured = [row["name"] for row in found["rows"] if row["section"] == "growth" and row["value"] is None]
    assert not unmeasured


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("preset", ["debug", "cpu", "paper"])
def test_any_number_of_environments_has_random_steps_enough(agent, preset):
    config = make_config(parse(["--agent", agent, "--preset", preset, "--envs", "500"]))
    assert config.train.prefill_steps >= 500 * config.algorithm.batch_length
    assert config.train.steps > config.train.prefill_steps


@pytest.mark.slow
def test_scaling_measures_what_virtual_devices_share(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks", "--preset", "debug", "--quick", "--only", "scaling"]
    subprocess.run([*command, "--json", str(path)], check=True)
    found = json.loads(path.read_text())
    assert found["failed"] == {}
    values = {row["name"]: row["value"] for row in found["rows"]}
    assert [name for name, value in values.items() if value is None] == ["batch 4 on 8"]  # it does not divide
    replay = [values[f"batch 4 {name}, replay"] for name in ("on 1", "on 2", "on 4", "each on 8")]
    assert replay == pytest.approx([replay[0] / n for n in (1, 2, 4, 8)], rel=0.01)  # bytes of each device


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.3])
def test_the_loop_is_told_apart_from_its_updates(ratio):
    """An iteration lasts 0.2 s, and 0.6 s for each update that the one before put into the queue."""
    report = Report({}, {}, None)
    bench = SimpleNamespace(report=report, config=make_config(parse(["--preset", "debug"])), options=None)
    rounds, seconds, queued, updates = [[], [], []], 0.0, 0, 0
    for step in range(90):
        rounds[step // 30].append(loop.Mark(seconds, step, updates))
        seconds += 0.2 + 0.6 * queued + (9.0 if step == 40 else 0.0)  # one slow step
        queued = int(ratio * (step + 1)) - updates
        updates += queued
    loop.report(bench, rounds, Times((0.6, 0.6, 7.0)), started=-3.0)
    values = {row.name: row.value for row in report.rows}
    assert values["start to first update"] == 3.0
    assert values["not the update, per environment step"] == pytest.approx(0.2)
    assert values["wall time per environment step"] == pytest.approx(0.2 + 0.6 * ratio, rel=0.03)
    assert values["not the update, share of wall time"] == pytest.approx(0.2 / (0.2 + 0.6 * ratio), rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--presett", "debug"], "unknown option --presett (did you mean --preset"),
        (["--preset", "debgu"], "unknown preset 'debgu' (did you mean debug?)"),
        (["--agent", "twn"], "unknown agent 'twn' (did you mean twm?)"),
        (["--only", "updates"], "unknown section 'updates' (did you mean update?)"),
        (["--all", "--only", "update"], "exclude each other"),
        (["--repeats", "0"], "--repeats = 0: must be above 0"),
        (["--repeats", "few"], "invalid int value: 'few'"),
        (["--preset", "debug", "--batch-length", "2"], "algorithm.batch_length = 2: must exceed"),
        (["--preset", "debug", "--game", "Braekout"], "unknown game 'Braekout'"),
        (["--preset", "debug", "--precision", "half"], "precision = half: must be one of"),
        (["--json", "/nowhere/at/all.json"], "not a regular file, or in no existing directory"),
        (["--json", "/dev/null"], "not a regular file"),
    ],
)
def test_bad_flags_are_refused_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device"])
def test_the_file_takes_the_place_of_a_file_alone(tmp_path, capsys, kind):
    path = tmp_path / "out.json"
    make = {"link": lambda: path.symlink_to(tmp_path / "other.json"), "pipe": lambda: os.mkfifo(path)}
    make |= {"folder": path.mkdir, "device": lambda: None}
    make[kind]()
    before = os.lstat(path) if kind != "device" else None
    assert main(["--json", "/dev/null" if kind == "device" else str(path)]) == 2
    assert "not a regular file" in capsys.readouterr().err
    assert before is None or os.lstat(path) == before
    assert not os.path.isfile("/dev/null")


def test_a_file_that_cannot_be_written_is_a_failure_and_no_traceback(tmp_path, capsys):
    report = Report({}, {}, tmp_path / "gone" / "out.json")
    report.write()
    assert "cannot be written" in report.failed["json"]
    assert capsys.readouterr().err.count("\n") == 1
    report.path.parent.mkdir()
    report.write()
    assert json.loads(report.path.read_text())["failed"] == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_table_that_nobody_can_read_ends_without_a_traceback():
    def run(stdout):
        command, buffered = (
            [sys.executable, "-m", "benchmarks", "--help"],
            os.environ | {"PYTHONUNBUFFERED": ""},
        )
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=buffered)
        return done.returncode, done.stderr

    with open("/dev/full", "w") as full:
        code, said = run(full)
    assert code == 1
    assert said.count("\n") == 1
    assert "No space left" in said
    reader, writer = os.pipe()
    os.close(reader)
    assert run(writer) == (141, "")
    os.close(writer)


@pytest.mark.parametrize(
    ("arguments", "closed", "code"),
    [
        *(("--help", closed, 0) for closed in (">&-", ">&- 2>&-")),
        *(("--bogus", closed, 2) for closed in (">&-", "2>&-", "2>/dev/full", ">&- 2>&-")),
    ],
)
def test_outputs_that_are_closed_or_full_end_without_a_traceback(arguments, closed, code):
    shell = f"{sys.executable} -m benchmarks {arguments} {closed}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("\n") <= 1 or arguments == "--help"


def test_a_deleted_working_directory_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["--preset", "debug"]) == 2
    assert "the working directory was deleted: change to another one" in capsys.readouterr().err


def test_sizes_reach_the_configuration():
    sizes = ["--batch-size", "3", "--batch-length", "90", "--horizon", "5"]
    config = make_config(parse(["--preset", "debug", *sizes]))
    algorithm = config.algorithm
    assert (algorithm.batch_size, algorithm.batch_length, algorithm.imagination_horizon) == (3, 90, 5)


def traced(function, *shapes):
    return jax.jit(function).trace(*(jnp.zeros(shape) for shape in shapes)).jaxpr


def test_operations_of_products_and_loops():
    assert operations.count(traced(jnp.matmul, (3, 4), (4, 5))) == 2 * 3 * 4 * 5
    batched = traced(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (7, 3, 4), (7, 4, 5))
    assert operations.count(batched) == 7 * 2 * 3 * 4 * 5

    def rounds(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=6)[0]

    assert operations.count(traced(rounds, (4, 4))) == 6 * 2 * 4**3
    assert operations.count(traced(jax.jit(rounds), (4, 4))) == 6 * 2 * 4**3
    assert operations.count(traced(jax.grad(lambda x: rounds(x).sum()), (4, 4))) == 3 * 6 * 2 * 4**3


@pytest.mark.parametrize("operator", [conv2d, conv2d_transpose])
def test_operations_of_a_convolution_do_not_depend_on_its_formulation(operator):
    def count(device):
        with tracing_for(device):
            shapes = (2, 8, 8, 3), (4, 4, 3, 5)
            return operations.count(traced(lambda x, k: operator(x, k, stride=2, padding=1), *shapes))

    pixels = 8 * 8 if operator is conv2d_transpose else 4 * 4
    assert count("gpu") == count("cpu") == 2 * 2 * pixels * 4 * 4 * 3 * 5


def test_convolutions_are_found_in_what_the_agent_draws():
    config = make_config(parse(["--preset", "debug"]))
    channels = [3, 4, 8, 16, 32]
    down = [
        Convolution(False, (64 >> i, 64 >> i, channels[i]), (4, 4, channels[i], channels[i + 1]), 2, 1)
        for i in range(4)
    ]
    up = [
        Convolution(True, (4 << i, 4 << i, channels[4 - i]), (4, 4, channels[4 - i], channels[3 - i]), 2, 1)
        for i in range(4)
    ]
    assert convolutions.layers(config) == [*down, *up]


def test_a_clock_threads_its_carry():
    clock = Clock(lambda x: x + 1, jnp.zeros(()), fill=0.0)
    times = clock.take(repeats=4, budget=60)
    assert len(times.samples) == 4
    assert float(clock.carry) == 2 + 4 * clock.calls
    assert 0 < times.low <= times.median <= times.high


def test_a_clock_beside_another_takes_a_sample_of_its_span_before_each(monkeypatch):
    now, calls = 0.0, ""
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: now)

    def step_of(name, seconds):
        def step(carry):
            nonlocal now, calls
            now, calls = now + seconds, calls + name
            return carry

        return step

    clock, beside = Clock(step_of("a", 1.0), None, fill=2.0), Clock(step_of("b", 0.5), None, fill=1.5)
    calls = ""
    times = clock.take(repeats=3, budget=60, beside=beside, beside_span=5)
    assert calls == ("b" * 3 * 5 + "a" * 2) * 3
    assert times.samples == (1.0, 1.0, 1.0)
    assert beside.times.samples == (0.5, 0.5, 0.5)


def test_rows_are_told_in_readable_units():
    text = Row("update", "one update", 0.01234, "s", 0.012, 0.0131, 5, "a note").text()
    assert text.split() == ["update", "one", "update", "12.34", "12.00", "13.10", "ms", "a", "note"]
    assert "1.714  " in Row("update", "products", 1.714e12, "FLOP").text()
    assert Row("update", "products", None, "FLOP", note="why").text().split() == (
        ["update", "products", "-", "-", "-", "FLOP", "why"]
    )


def event(name, start, length, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=length, stats=list(stats.items()))


def trace_of(planes):
    """Plane -> line -> events, as `jax.profiler.ProfileData` gives them."""
    return SimpleNamespace(
        planes=[
            SimpleNamespace(name=name, lines=[SimpleNamespace(name=n, events=e) for n, e in lines.items()])
            for name, lines in planes.items()
        ]
    )


def test_profile_counts_operations_without_what_runs_inside_them():
    first = [Span(0, 10, "while.1"), Span(1, 4, "dot.2"), Span(5, 4, "dot.2")]
    times = breakdown.operation_times([first, [Span(0, 3, "dot.2")]])
    assert list(times) == ["while.1", "dot.2"]
    assert times["while.1"] == pytest.approx([2e-9])
    assert times["dot.2"] == pytest.approx([3e-9, 4e-9, 4e-9])


def test_profile_leaves_the_first_update_out():
    times = {"dot": [9.0, 9.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0], "add": [8.0, 3.0, 3.0, 3.0]}
    kept = breakdown.without_first_update(times)
    assert kept == {"dot": [1.0, 2.0] * 3, "add": [3.0] * 3}


def test_profile_of_a_cpu_reads_the_operations_on_its_threads():
    python = [event("update", 0, 99)]
    worker = [event("dot.2", 0, 5, hlo_op="dot.2", run_id=1), event("end: dot.2", 5, 1)]
    trace = trace_of({"/host:CPU": {"python": python, "tf_XLAEigen/1": worker}})
    assert breakdown.threads(trace) == [[], [Span(0, 5, "dot.2")]]


def test_profile_of_an_accelerator_reads_its_streams():
    stream = [event("gemm_kernel", 0, 5, hlo_op="dot.2"), event("Memset", 5, 1)]
    device = {"Stream #13(Compute)": stream, "XLA Ops": [event("dot.2", 0, 5, hlo_op="dot.2")]}
    host = {"python": [event("launch", 0, 9, hlo_op="dot.2")]}
    trace = trace_of({"/host:CPU": host, "/device:GPU:0": device})
    assert breakdown.threads(trace) == [[Span(0, 5, "dot.2"), Span(5, 1, "Memset")]]


def test_parts_are_read_from_the_scopes_that_operations_were_traced_in():
    def update(x):
        with jax.named_scope("model"):
            x = jax.grad(lambda x: jnp.sum(jnp.tanh(x @ x) @ x))(x)
        with jax.named_scope("dream"):
            x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ x), x)
        return jnp.sort(x)

    text = jax.jit(update).lower(jnp.ones((64, 64))).compile().as_text()
    found = programs.parts(text, ("model", "dream"))
    sources = programs.source_lines(text)
    of = {
        part: {sources.get(name, "") for name in found if found[name] == part} for part in ("model", "dream")
    }
    assert any("transpose" in source or source.startswith("<-") for source in of["model"])
    assert any("while" in source for source in of["dream"])
    assert not any("sort" in source for source in of["model"] | of["dream"])
    assert programs.parts(text, ()) == {}


PARTS = """HloModule jit_update

%inside (x: f32[2]) -> f32[2] {
  %a = f32[2]{0} add(%x, %x), metadata={op_name="jit(update)/dream/add"}
  %b = f32[2]{0} add(%a, %x), metadata={op_name="jit(update)/dream/add"}
  ROOT %c = f32[2]{0} add(%b, %x), metadata={op_name="jit(update)/model/add"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %backward = f32[2]{0} negate(%x), metadata={op_name="jit(update)/transpose(jvp(model))/neg"}
  %nested = f32[2]{0} negate(%x), metadata={op_name="jit(update)/model/while/body/dream/neg"}
  %function = f32[2]{0} negate(%x), metadata={op_name="jit(update)/jit(dream)/neg"}
  %unknown = f32[2]{0} fusion(%x), kind=kLoop, calls=%inside
  ROOT %known = f32[2]{0} fusion(%x), kind=kLoop, calls=%inside, metadata={op_name="jit(update)/model/add"}
}
"""


def test_parts_of_gradients_nested_scopes_and_fusions():
    found = programs.parts(PARTS, ("model", "dream"))
    outside = {name: part for name, part in found.items() if len(name) > 1}
    assert outside == {"backward": "model", "nested": "dream", "unknown": "dream", "known": "model"}


PROGRAM = """HloModule jit_update

FileNames
1 "/home/me/site/jax/library.py"
2 "/home/me/twister_jax/nn/layers.py"

FunctionNames
1 "dot"
2 "Head.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=2 end_column=51}
2 {file_name_id=2 function_name_id=2 line=70 end_line=70 column=2 end_column=51}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}

  %dot.1 = f32[2]{0} dot(%a, %b), metadata={op_name="jit(update)/transpose(jvp())/dot" stack_frame_id=2}
  ROOT %copy.2 = f32[2]{0} copy(%dot.1), metadata={op_name="jit(update)/copy"}
"""


def test_operations_are_named_after_their_source():
    assert programs.source_lines(PROGRAM) == {
        "dot.1": "<- nn/layers.py:70 Head.__call__",
        "copy.2": "copy",
    }


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
def test_what_does_not_fit_is_an_error_and_nothing_is_killed(monkeypatch):
    resident, data = (int(Path("/proc/self/statm").read_text().split()[field]) for field in (1, 5))
    untouched = max(0, data - resident) * resource.getpagesize()  # counts against the limit all the same
    monkeypatch.setattr(machine, "host_available", lambda: untouched + (1 << 28))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    huge = jax.jit(lambda: jnp.ones(1 << 32, jnp.uint8)).lower().compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"), machine.limited_host_memory():
        jax.block_until_ready(huge())
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
