"""The code on the pages runs as it stands there."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page):
    """Python blocks of a page; those that name a file in their first line, by that name."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    named = [(re.match(r"# (\S+\.py)\n", text), text) for text in found]
    return {match[1] if match else f"block{index}.py": text for index, (match, text) in enumerate(named)}


def run(folder, *command):
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write(folder, page):
    for name, text in blocks(page).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_the_agent_on_the_page_trains(tmp_path):
    write(tmp_path, "docs/agents.md")
    flags = ["--agent", "little_q", "--game", "Catch", "--preset", "debug", "--logdir", "run"]
    run(tmp_path, "play.py", "train", *flags)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["agent"] == "little_q"


def test_the_environment_on_the_page_is_played(tmp_path):
    write(tmp_path, "docs/environments.md")
    play = "from tests import third; third.register()\n" + (tmp_path / "play.py").read_text()
    (tmp_path / "play.py").write_text(play)
    flags = ["--agent", "minimal", "--game", "arena:reach", "--preset", "debug", "--logdir", "run"]
    run(tmp_path, "play.py", "train", *flags)
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (record["game"], record["protocol"]["time_limit"]) == ("arena:reach", 10)


def test_the_environment_of_gymnasium_on_the_page_is_played_and_saved(tmp_path):
    write(tmp_path, "docs/environments.md")
    saving = textwrap.indent(blocks("docs/environments.md")["block1.py"], "    ").rstrip()
    module = tmp_path / "my_package.py"
    assert module.read_text().count("\n\n\ngymnasium.register") == 1
    (tmp_path / "saved.py").write_text(
        module.read_text().replace("\n\n\ngymnasium.register", f"\n\n{saving}\n\ngymnasium.register")
    )
    code = "from tests import third; third.register()\nfrom twister_jax import cli; cli.run()\n"
    (tmp_path / "play.py").write_text(code)
    for package, resumption in [("my_package", "with a new episode"), ("saved", "exact")]:
        flags = ["--agent", "minimal", "--game", f"gym:{package}:Reach-v0", "--preset", "debug"]
        run(tmp_path, "play.py", "train", *flags, "--logdir", package)
        protocol = json.loads((tmp_path / package / "evaluation.json").read_text())["protocol"]
        assert (protocol["time_limit"], protocol["resumption"]) == (50, resumption)
