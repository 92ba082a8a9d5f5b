"""`python -m twister_jax report`: a run, or several, as one HTML file that needs nothing else.

It reads the files of a run directory alone, so it can be written while the run goes on.
"""

import base64
import datetime
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from twister_jax import fields, files, presets
from twister_jax.config import Config
from twister_jax.training.progress import duration
from twister_jax.view import plots, warnings
from twister_jax.view.drawing import save
from twister_jax.view.extras import require
from twister_jax.view.record import Record, read

LARGEST_VIDEO = 3_000_000
"""Bytes of a video that is put into the page; of others it has the name."""
PICTURES = 4
"""Training's pictures that are shown, from the first to the newest."""
CAPTIONS = {
    "watch-sheet": "These games at a glance",
    "watch-best": "The best game",
    "watch-median": "The median game",
    "watch-worst": "The worst game",
    "dream-trust": "How far the world model can be trusted",
    "dream-open_loop": "What it foresees, beside the truth",
    "dream-free-sheet": "Free dreams at a glance",
    "dream-free-best": "A free dream, played by the policy: the best",
    "dream-free-median": "The median dream",
    "dream-free-worst": "The worst dream",
    "open_loop": "Truth, reconstruction, imagination and difference; the red line parts what was seen",
}
"""Of pictures and videos, in their order on the page."""
_UNKNOWN = "—"


def write(directories: Sequence[Path], out: Path) -> None:
    """Writes the page.

    Raises:
      UserError: a directory is no run, something is not installed, or the file cannot be written.
    """
    save(out, render([read(directory) for directory in directories]))


def render(records: Sequence[Record]) -> str:
    """The page of a run, or the comparison of several.

    Raises:
      UserError: jinja2 or matplotlib is not installed.
    """
    jinja2 = require("jinja2", "view", "a report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8"))
    alone = records[0] if len(records) == 1 else None
    labels = [record.name if alone else _label(record, records) for record in records]
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    found = {record_label: warnings.of(record) for record_label, record in zip(labels, records, strict=True)}
    return template.render(
        title=alone.name if alone else f"{len(records)} runs compared",
        written=f"written {now} · {', '.join(str(record.directory) for record in records)}",
        warnings=[text if alone else f"{name}: {text}" for name, texts in found.items() for text in texts],
        heads=[] if alone else labels,
        table=table(records),
        curves=plots.curves({name: record.rows for name, record in zip(labels, records, strict=True)}),
        media=media(alone) if alone else {},
        details=details(records, labels),
    )


def _label(record: Record, among: Sequence[Record]) -> str:
    """The run's name, with as much of its directory as tells it from others."""
    alike = [other for other in among if other.name == record.name]
    if len(alike) == 1:
        return record.name
    same = [other for other in alike if other.directory.name == record.directory.name]
    return f"{record.name} ({record.directory.name if len(same) == 1 else record.directory})"


def table(records: Sequence[Record]) -> dict[str, list[str]]:
    """For each fact its value in every run; without those that are known of none."""
    rows: dict[str, list[str]] = {}
    for record in records:
        for name, value in facts(record).items():
            rows.setdefault(name, []).append(value)
    return {name: values for name, values in rows.items() if set(values) != {_UNKNOWN}}


def facts(record: Record) -> dict[str, str]:
    """What is known of a run in a few words each; the same names for all."""
    config, newest, evaluation = record.config, record.newest, record.evaluation or {}
    steps, seconds = record.steps, float(newest.get("wall_seconds") or 0.0)
    recent = [row["episode/score"] for row in record.rows if row.get("episode/score") is not None][-10:]
    numerics = record.host.get("numerics")
    machine = numerics if isinstance(numerics, dict) else {}
    protocol = evaluation.get("protocol", {})
    human = evaluation.get("human_normalized")
    threads = machine.get("threads")
    return {
        "state": f"{steps:,} of {config.train.steps:,} steps, {newest.get('updates', 0):,} updates",
        "evaluation": (
            f"mean {evaluation['mean']:g}, median {evaluation['median']:g}, std {evaluation['std']:.3g} over "
            f"{evaluation['episodes']} games"
            if evaluation
            else "not yet"
        ),
        "human-normalised": _UNKNOWN if human is None else f"{human:.3f}",
        "score while training": f"{sum(recent) / len(recent):.4g}, mean of the newest {len(recent)} rows"
        if recent
        else _UNKNOWN,
        "time": f"{duration(seconds)}{_resumed(record)}",
        "pace": f"{steps / seconds:.2f} steps/s in all" if seconds else _UNKNOWN,
        "preset": config.preset,
        "differs from paper in": f"{len(presets.different_from_paper(config))} settings, listed below",
        "precision": config.precision,
        "machine": ", ".join(
            [
                *([f"{machine.get('devices', 1)} × {machine['device']}"] if machine.get("device") else ()),
                *([f"{threads} thread{'s' if threads > 1 else ''}"] if isinstance(threads, int) else ()),
            ]
        )
        or _UNKNOWN,
        "JAX": str(machine.get("jax", _UNKNOWN)),
        "commit": str(protocol.get("commit") or _UNKNOWN)[:12],
    }


def _resumed(record: Record) -> str:
    """How often: every start of a run opens a file of events."""
    times = len(list(record.directory.glob("events.*"))) - 1
    return f", resumed {times} time{'s' if times > 1 else ''}" if times > 0 else ""


def media(record: Record) -> dict[str, list[dict[str, Any]]]:
    """The newest of what `watch` and `dream` wrote, and pictures through training, by title of a section."""
    directory = record.directory
    pictures = sorted((directory / "pictures").glob("*.png"))
    if len(pictures) > PICTURES:
        last = len(pictures) - 1
        pictures = [pictures[round(i * last / (PICTURES - 1))] for i in range(PICTURES)]
    found: dict[str, list[dict[str, Any]]] = {}
    for title, paths in (
        ("How it plays", _newest(directory / "videos")),
        ("What it dreams", _newest(directory / "dreams")),
        ("What it saw while training", pictures),
    ):
        if items := [item for path in paths if (item := _item(directory, path))]:
            found[title] = items
    return found


def _kind_and_step(path: Path) -> tuple[str, int]:
    """Of `watch-0001000-best.mp4`: what is left without the step, and the step."""
    found = re.fullmatch(r"(\w+?)-(\d+)(-[\w-]+)?", path.stem)
    return (found[1] + (found[3] or ""), int(found[2])) if found else (path.stem, 0)


def _newest(folder: Path) -> list[Path]:
    """The newest file of every kind, in the order of `CAPTIONS`."""
    newest = {}
    for path in sorted(folder.glob("*.*"), key=lambda path: (_kind_and_step(path)[1], path.name)):
        newest[_kind_and_step(path)[0] + path.suffix] = path
    order = list(CAPTIONS)

    def place(path: Path) -> int:
        kind = _kind_and_step(path)[0]
        return order.index(kind) if kind in order else len(order)

    return sorted(newest.values(), key=lambda path: (place(path), path.name))


def _item(directory: Path, path: Path) -> dict[str, Any] | None:
    kinds = {".png": "picture", ".mp4": "video"}
    if path.suffix not in kinds or path.name.startswith("."):
        return None
    name, (kind, step) = str(path.relative_to(directory)), _kind_and_step(path)
    caption = f"{CAPTIONS[kind]}, after {step:,} steps" if kind in CAPTIONS else name
    item = {"kind": kinds[path.suffix], "name": name, "data": "", "width": 0}
    try:
        files.check_directory(path.parent)
        data = files.read(path, LARGEST_VIDEO)
        if path.suffix == ".png":
            with Image.open(io.BytesIO(data)) as picture:
                item["width"] = picture.width
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or "damaged"
        return item | {"caption": f"{caption}: {name} is not shown here ({why})"}
    return item | {"data": base64.b64encode(data).decode(), "caption": caption}


def details(records: Sequence[Record], labels: Sequence[str]) -> dict[str, str]:
    """What is folded away: settings, and how the evaluation played."""
    found = {}
    if len(records) > 1:
        configs = [dict(fields.describe(record.config)) for record in records]
        names = {name for config in configs for name in config}
        different = {
            name: [_shown(record.config, name) for record in records]
            for name in sorted(names)
            if len({_shown(record.config, name) for record in records}) > 1 and name != "logdir"
        }
        found["Settings that differ"] = "\n".join(f"{n}: {' | '.join(v)}" for n, v in different.items())
    for label, record in zip(labels, records, strict=True):
        prefix = "" if len(records) == 1 else f"{label}: "
        if different_here := presets.different_from_paper(record.config):
            found[f"{prefix}differences from the paper, whose settings stand in brackets"] = "\n".join(
                different_here
            )
        found[f"{prefix}all settings"] = json.dumps(record.config.to_dict(), indent=1)
        if record.evaluation:
            found[f"{prefix}evaluation and its protocol"] = json.dumps(record.evaluation, indent=1)
    return found


def _shown(config: Config, name: str) -> str:
    value: Any = config.to_dict()
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return "absent"
        value = value[part]
    return json.dumps(value)
