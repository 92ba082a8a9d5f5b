"""Stands in for `train`: takes its flags, writes what it writes, and fails or dawdles when told so."""

import json
import os
import signal
import sys
import time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
told = json.loads(os.environ.get("FAKE_TRAINING", "{}"))
if "--seeds" in flags:
    logdirs = {int(seed): Path(flags["--logdir"], f"seed{seed}") for seed in flags["--seeds"].split(",")}
else:
    logdirs = {int(flags["--seed"]): Path(flags["--logdir"])}
for logdir in logdirs.values():
    with (logdir / "starts").open("a") as file:
        file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')} {sorted(os.sched_getaffinity(0))}\n")


def save_and_stop(*_):
    """Takes a moment, in which a second signal would be noticed."""
    for logdir in logdirs.values():
        with (logdir / "saved").open("a") as file:
            file.write("told once\n")
    time.sleep(0.5)
    print("saved; the same command goes on from there", flush=True)
    sys.exit(143)


def is_unlucky(logdir):
    often = len((logdir / "starts").read_text().splitlines())
    return "fail" in told and told["fail"] in str(logdir) and often <= told["times"]


signal.signal(signal.SIGTERM, save_and_stop)
while told.get("wait") and not Path(told["wait"]).exists():
    time.sleep(0.05)
unlucky = [seed for seed, logdir in logdirs.items() if is_unlucky(logdir)]
if unlucky and len(logdirs) == 1:
    print("some lines\ntwister_jax: cannot start: out of luck", flush=True)
    sys.exit(2)
for seed in unlucky:
    print(f"seed {seed} stops: out of luck", flush=True)
for seed, logdir in logdirs.items():
    if seed in unlucky:
        continue
    print(f"seed {seed}: evaluated", flush=True)
    (logdir / "metrics.jsonl").write_text('{"env_steps": 300, "wall_seconds": 3.0}\n')
    result = {"game": flags["--game"], "env_steps": 300, "mean": float(seed), "seed": seed}
    (logdir / "evaluation.json").write_text(json.dumps(result))
sys.exit(1 if unlucky else 0)
