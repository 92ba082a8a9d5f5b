"""What a checkpoint costs: how long training stands still, how long the disk works, and what is written."""

import dataclasses
import tempfile
import time
from pathlib import Path

from benchmarks.bench import Bench
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.save import Snapshot

SECTION = "checkpoints"


def run(bench: Bench) -> None:
    """The first checkpoint of a full replay, and the next one `train.checkpoint_every` steps later."""
    subject, every = bench.subject, bench.config.train.checkpoint_every
    replay, written = subject.replay, 0
    with tempfile.TemporaryDirectory(prefix="benchmarks-checkpoints-") as directory:
        checkpointer = Checkpointer(Path(directory) / "checkpoints")
        for name, note in (("first", f"{replay.capacity} steps"), ("next", f"{every} steps later")):
            snapshot = Snapshot(subject.state, replay, b"", {})
            started = time.perf_counter()
            checkpointer.save(int(replay.inserted), snapshot, wait=False)
            held = time.perf_counter() - started
            checkpointer.wait()
            total = time.perf_counter() - started
            size = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
            bench.report.add(SECTION, f"{name}, training stands still", held, "s", note)
            bench.report.add(SECTION, f"{name}, on disk after", total, "s", note)
            bench.report.add(SECTION, f"{name}, written", size - written, "B", note)
            written = size
            replay = dataclasses.replace(replay, inserted=replay.inserted + every)
    if bench.update_times is not None:
        training = every * bench.config.train.updates_per_step * bench.update_times.median
        bench.report.add(
            SECTION, "next, share of the training between", held / training, "", "the updates alone"
        )
