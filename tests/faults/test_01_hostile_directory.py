"""1. Loading a run from a stranger is safe: whatever lies in its directory, no file elsewhere changes."""

import json
import os
import shutil
import struct
import zlib

import pytest

from twister_jax import cli
from twister_jax.training import manifest

SEGMENT = "000000000-000000003-0123abcd.npy"


def state_of(folder):
    """Everything that can change about files: names, content, times, modes, links."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        stat = os.lstat(path)
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (content, stat.st_mode, stat.st_mtime_ns, stat.st_nlink, stat.st_ino)
    return found


def replace(path, make):
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    make(path)


def link(name, target):
    """In place of something of the run there is a link to something of the user's."""
    return lambda run, home: replace(run / name, lambda path: path.symlink_to(home / target))


def forge(change):
    """All manifests say something else, with the right checksum."""

    def act(run, home):
        for path in run.glob("checkpoints/0*/manifest.json"):
            content = json.loads(path.read_text())["content"]
            change(content, home)
            text = json.dumps([manifest.FORMAT, content], sort_keys=True).encode()
            whole = {"format": manifest.FORMAT, "crc32": zlib.crc32(text), "content": content}
            path.write_text(json.dumps(whole, sort_keys=True, indent=1) + "\n")

    return act


def overwritten_rows(content, home):
    content["host"] |= {"metrics_offset": 0, "metrics_pending": ["evil\n"]}


def segments_elsewhere(content, home):
    for segment in content["segments"]:
        segment["name"] = f"../../../home/{segment['name']}"


def files_elsewhere(content, home):
    content["files"]["../../../home/shell-start-up"] = content["files"].pop("env.bin")


def rows(run, home):
    link("metrics.jsonl", "shell-start-up")(run, home)
    forge(overwritten_rows)(run, home)


def hard_linked_rows(run, home):
    replace(run / "metrics.jsonl", lambda path: os.link(home / "shell-start-up", path))
    forge(overwritten_rows)(run, home)


def linked_leftovers(run, home):
    for name in ("tmp-000000009-0123abcd", "unusable-000000009-0-0123abcd", "000000999-0"):
        (run / "checkpoints" / name).symlink_to(home)
    (run / "checkpoints" / "replay" / SEGMENT).symlink_to(home / SEGMENT)


def linked_results(run, home):
    for name in ("evaluation.json", "evaluation.partial", "report.html", "policy.safetensors"):
        replace(run / name, lambda path: path.symlink_to(home / "shell-start-up"))


def linked_folders(run, home):
    for name in ("pretraining", "pictures", "videos", "dreams"):
        replace(run / name, lambda path: path.symlink_to(home))


def linked_pictures(run, home):
    for path in (run / "pictures").glob("*.png"):
        replace(path, lambda path: path.symlink_to(home / "shell-start-up"))
    os.mkfifo(run / "pictures" / "open_loop-9999999.png")


def a_picture_of_all_memory(run, home):
    """20,000 x 20,000 pixels in 50 bytes."""
    (run / "pictures").mkdir(exist_ok=True)
    header = struct.pack(">4sIIBBBBB", b"IHDR", 20_000, 20_000, 8, 2, 0, 0, 0)
    parts = (header, b"IDAT", b"IEND")
    data = b"".join(struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts)
    (run / "pictures" / "open_loop-9999999.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def junk_rows(run, home):
    rows = ["[" * 100_000, '{"env_steps": true}', '{"env_steps": 5, "updates": "x", "wall_seconds": []}', "5"]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    forge(lambda content, home: content["host"].update(metrics_offset=10**9))(run, home)


def linked_state(run, home):
    for path in run.glob("checkpoints/0*/state"):
        replace(path, lambda path: path.symlink_to(home / "state"))


def pipes(run, home):
    for name in ("metrics.jsonl", "evaluation.json", "evaluation.partial"):
        replace(run / name, os.mkfifo)


KINDS = {
    "rows are somebody's file": rows,
    "rows are a second name of it": hard_linked_rows,
    "the lock is a link": link("run.lock", "shell-start-up"),
    "the configuration is a link": link("config.json", "manifest.json"),
    "checkpoints are a link": link("checkpoints", "."),
    "the replay is a link": link("checkpoints/replay", "replay"),
    "segments lie elsewhere": forge(segments_elsewhere),
    "files lie elsewhere": forge(files_elsewhere),
    "what is cleared away is links": linked_leftovers,
    "results are links": linked_results,
    "folders for results are links": linked_folders,
    "pictures are links and pipes": linked_pictures,
    "a picture would fill the memory": a_picture_of_all_memory,
    "rows are junk": junk_rows,
    "states are links": linked_state,
    "pipes in place of files": pipes,
}


TRAIN = "train --agent minimal --game Catch --preset debug --precision float32 --env.num-envs 2"
TRAIN += " --checkpoint-every 4 --keep-checkpoints 1 --report-every 3 --steps 130"
COMMANDS = [
    ["evaluate --episodes 2", TRAIN],
    pytest.param(
        [
            "watch --episodes 1",
            "dream --starts 4 --horizon 2",
            "report",
            "export",
            TRAIN,
            "watch --episodes 1",
        ],
        marks=pytest.mark.faults,
    ),
]


def test_every_command_that_takes_a_run_is_tried():
    tried = {line.split()[0] for line in (*COMMANDS[0], *COMMANDS[1].values[0])}
    assert tried == cli.COMMANDS.keys() - {"parity", "doctor"}


@pytest.mark.parametrize("commands", COMMANDS, ids=["evaluate and train", "views"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_canary_changes(kind, commands, tmp_path, home, undisturbed, monkeypatch, capsys):
    """Commands that take a run directory are run on it: each works or refuses in one line."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    KINDS[kind](run, home)
    before = state_of(home)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        try:
            code = cli.main([*command.split(), "--logdir", str(run)])
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        assert code in (0, 1, 2), said.err
        assert "Traceback" not in said.err + said.out
        assert state_of(home) == before, (kind, command)
    assert sorted(os.listdir(tmp_path)) == ["home", "run"]
