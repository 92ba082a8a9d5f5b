"""Array scripts: what bash accepts, what SLURM would read, and that members train their runs."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import runs
from experiments.__main__ import main
from experiments.launchers import slurm
from tests.experiments.test_local import ROOT, fake, wait_for  # noqa: F401

pytest.importorskip("submitit")


def launch(root, *flags):
    return main(["run", "smoke", "--root", str(root), "--launcher", "slurm", *flags])


def options(script):
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE)
    return {name: value.strip("'") for name, value in found}


def test_a_dry_run_writes_an_array_that_bash_accepts(tmp_path, capsys):
    assert launch(tmp_path, "--dry-run", "--slurm", "partition=gpu", "time=600", "array_parallelism=4") == 0
    (script,) = tmp_path.rglob("*.sh")
    assert str(script) in capsys.readouterr().out
    subprocess.run(["bash", "-n", script], check=True)
    found = options(script.read_text())
    assert found["array"] == "0-7%4"
    assert (found["partition"], found["time"], found["gpus-per-node"]) == ("gpu", "600", "1")
    assert "requeue" in found
    assert found["signal"] == "URG@180"
    assert Path(found["output"]).parent.is_dir()
    jobs = json.loads(script.with_suffix(".json").read_text())["jobs"]
    assert len(jobs) == 8
    assert ["twm/Breakout/seed1"] in jobs
    assert launch(tmp_path, "--dry-run") == 0  # the first array may still wait in the queue
    assert len(list(tmp_path.rglob("*.sh"))) == 2


def test_members_of_a_submitted_array_train_their_runs(tmp_path, fake, monkeypatch, capsys):  # noqa: F811
    """A stand-in for sbatch starts the script once for each member, and srun runs its command."""
    bin = tmp_path / "bin"
    bin.mkdir()
    sbatch = '#!/bin/bash\necho "Submitted batch job 7"\necho "$1" > "$(dirname "$0")/submitted"\n'
    # It skips srun's own options: --unbuffered --output FILE.
    srun = '#!/bin/bash\nshift 3\nexec "$@"\n'
    for name, text in (("sbatch", sbatch), ("srun", srun)):
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")
    assert launch(tmp_path, "--games", "Catch", "--sets", "twister") == 0
    assert "Submitted batch job 7" in capsys.readouterr().out
    script = Path((bin / "submitted").read_text().strip())
    (command,) = [line for line in script.read_text().splitlines() if "experiments job" in line]
    assert command.endswith('"$SLURM_ARRAY_TASK_ID"')
    shown = subprocess.run(
        ["bash", "-c", command.replace(" experiments job ", " experiments job --help ")],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "usage: python -m experiments job" in shown.stdout, shown.stderr
    array = script.with_suffix(".json")
    assert main(["job", str(array), "1"]) == 0
    assert (tmp_path / "smoke/twister/Catch/seed1/evaluation.json").exists()
    assert not (tmp_path / "smoke/twister/Catch/seed0").exists()
    assert main(["job", str(array), "0"]) == 0
    assert launch(tmp_path, "--games", "Catch", "--sets", "twister") == 0
    assert "2 runs, 2 finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "state", "queued_again"),
    [
        (signal.SIGURG, "RUNNING", True),  # time is over: the member tells its run
        (signal.SIGTERM, "RUNNING", True),  # preempted: SLURM has told both
        (signal.SIGTERM, "COMPLETING", False),  # cancelled
    ],
)
def test_a_member_that_is_interrupted_saves_and_queues_again_unless_cancelled(
    tmp_path,
    fake,  # noqa: F811
    monkeypatch,
    number,
    state,
    queued_again,
):
    """SLURM signals all processes of a job; a run that hears of it twice would end unsaved."""
    assert launch(tmp_path, "--dry-run", "--games", "Catch") == 0
    (array,) = tmp_path.rglob("array-*.json")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    asked = []

    def scontrol(words, **_):
        asked.append(words[1])
        return subprocess.CompletedProcess(words, 0, f"JobId=77 JobState={state} Reason=None", "")

    monkeypatch.setattr(slurm.subprocess, "run", scontrol)
    fake(wait=str(tmp_path / "never"))

    def interrupt():
        (starts,) = wait_for(lambda: list(tmp_path.rglob("starts")))
        record = wait_for(lambda: runs.read_json(starts.with_name(runs.RECORD)))
        time.sleep(0.3)  # until it can hear
        for pid in (record["pid"], os.getpid()):
            os.kill(pid, number)

    threading.Thread(target=interrupt).start()
    assert main(["job", str(array), "0"]) == 1
    assert asked == ["show", "requeue"][: 1 + queued_again]
    (saved,) = tmp_path.rglob("saved")
    assert saved.read_text() == "told once\n"
    assert runs.read_json(saved.with_name(runs.RECORD))["state"] == "interrupted"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slurm", "partitoin=gpu"], "--slurm partitoin=gpu: must be NAME=VALUE"),
        (["--slurm", "partition"], "must be NAME=VALUE"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, flags, message, capsys):
    assert launch(tmp_path, "--dry-run", *flags) == 2
    assert message in capsys.readouterr().err


def test_without_sbatch_or_submitit_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch(tmp_path) == 2
    assert "there is no sbatch on this machine" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit.slurm.slurm", None)
    assert launch(tmp_path) == 2
    assert "pip install 'twister_jax[slurm]'" in capsys.readouterr().err
    assert main(["job", str(tmp_path / "none.json"), "0"]) == 2
