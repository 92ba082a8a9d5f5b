"""Stands in for `train`: takes its flags, writes what it writes, and fails or dawdles when told so."""

import json
import os
import signal
import sys
import time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
logdir = Path(flags["--logdir"])
told = json.loads(os.environ.get("FAKE_TRAINING", "{}"))
starts = logdir / "starts"
with starts.open("a") as file:
    file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')} {sorted(os.sched_getaffinity(0))}\n")


def save_and_stop(*_):
    (logdir / "saved").touch()
    print("saved; the same command goes on from there", flush=True)
    sys.exit(143)


signal.signal(signal.SIGTERM, save_and_stop)
if "fail" in told and told["fail"] in str(logdir) and len(starts.read_text().splitlines()) <= told["times"]:
    print("some lines\ntwister_jax: cannot start: out of luck", flush=True)
    sys.exit(2)
while told.get("wait") and not Path(told["wait"]).exists():
    time.sleep(0.05)
(logdir / "metrics.jsonl").write_text('{"env_steps": 300, "wall_seconds": 3.0}\n')
result = {
    "game": flags["--game"],
    "env_steps": 300,
    "mean": float(flags["--seed"]),
    "seed": int(flags["--seed"]),
}
(logdir / "evaluation.json").write_text(json.dumps(result))
