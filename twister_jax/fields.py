"""Settings as fields of frozen dataclasses: names, ranges, JSON, command-line flags, and messages about them.

A field's range stands with it, as in `steps: PositiveInt = 100_000`, and its meaning in the string below it.
Nothing here imports JAX, so that the command line answers at once.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import math
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from twister_jax import files
from twister_jax.errors import UserError

Settings = TypeVar("Settings")

# ----------------------------------------------------------------------------------------------- ranges


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an end that is `open` does not belong to it."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        high = f"{'below' if self.open_high else 'at most'} {self.high:g}"
        if math.isinf(self.high):
            return low
        if not (self.open_low or self.open_high):
            return f"between {self.low:.15g} and {self.high:.15g}"
        return f"{low} and {high}"


@dataclasses.dataclass(frozen=True)
class Increasing:
    """Two numbers between `low` and `high`, the second not below the first."""

    low: float
    high: float

    def __contains__(self, pair: Sequence[float]) -> bool:
        return self.low <= pair[0] <= pair[1] <= self.high

    def __str__(self) -> str:
        return f"two increasing numbers between {self.low:g} and {self.high:g}"


@dataclasses.dataclass(frozen=True)
class _LayerWidths:
    def __contains__(self, widths: Sequence[int]) -> bool:
        return 0 < len(widths) <= MOST_PARTS and min(widths) >= 1 and max(widths) <= MOST_WIDE

    def __str__(self) -> str:
        return f"at most {MOST_PARTS} widths between 1 and {MOST_WIDE}"


MOST = 10**9
"""Upper limit of every count: larger values are typing errors, or do not fit into 32 bits."""

MOST_WIDE = 10**5  # an axis of an array
MOST_LONG = 10**4  # steps in a row: some arrays have two such axes
MOST_PARTS = 100  # what is built one by one

PositiveInt = Annotated[int, Range(1, MOST)]
Size = Annotated[int, Range(1, MOST_WIDE)]
SizeFromTwo = Annotated[int, Range(2, MOST_WIDE)]
Length = Annotated[int, Range(1, MOST_LONG)]
LengthFromTwo = Annotated[int, Range(2, MOST_LONG)]
Parts = Annotated[int, Range(1, MOST_PARTS)]
NonNegativeInt = Annotated[int, Range(0, MOST)]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(0, 1, open_low=True)]
FractionBelowOne = Annotated[float, Range(0, 1, open_high=True)]
Widths = Annotated[tuple[int, ...], _LayerWidths()]

CHANGEABLE = "changeable"
"""Marks a field that may differ when a run is resumed."""


# ------------------------------------------------------------------------------------------ names, values


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting: its type without annotations, what its value must be, and whether it may change later."""

    kind: Any
    range: Any = None
    changeable: bool = False


def flatten(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings as (dotted name, value)."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def describe(settings: Any, prefix: str = "", changeable: bool = False) -> dict[str, Field]:
    """Dotted name -> `Field` of all settings; of a section that is CHANGEABLE, every field is."""
    fields: dict[str, Field] = {}
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value, kind = getattr(settings, field.name), hints[field.name]
        notes = getattr(kind, "__metadata__", ())
        may_change = changeable or CHANGEABLE in notes
        if dataclasses.is_dataclass(value):
            fields |= describe(value, f"{prefix}{field.name}.", may_change)
        else:
            limits = next((note for note in notes if note != CHANGEABLE), None)
            base = typing.get_args(kind)[0] if notes else kind
            fields[prefix + field.name] = Field(base, limits, may_change)
    return fields


@functools.cache
def documentation(settings: Any) -> dict[str, str]:
    """Field name -> the string that stands below the field in the class."""
    texts: dict[str, str] = {}
    for parent in settings.__mro__[-2::-1]:
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        except (OSError, TypeError):
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(field.target, ast.Name)
                texts[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return texts


def meaning(settings: Any, name: str) -> str:
    """The documentation of the setting of this dotted name."""
    *sections, last = name.split(".")
    for section in sections:
        settings = getattr(settings, section)
    return documentation(type(settings)).get(last, "")  # type: ignore[arg-type]


def replace(settings: Settings, overrides: Mapping[str, Any]) -> Settings:
    """`settings` with new values by dotted name.

    Raises:
      UserError: an unknown name, or a value of another type than the field's.
    """
    known = describe(settings)
    for name, value in overrides.items():
        if name not in known:
            raise UserError(f"unknown field {name}{did_you_mean(name, known)}")
        settings = _set(settings, name.split("."), convert(name, value, known[name].kind))
    return settings


def _set(node: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    return dataclasses.replace(node, **{head: _set(getattr(node, head), rest, value) if rest else value})


_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def convert(name: str, value: Any, kind: Any) -> Any:
    """`value` as a `kind`, as JSON and Python write it.

    Raises:
      UserError: it is of another type.
    """
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        near = did_you_mean(str(value), choices)
        raise UserError(f"{name} = {show(value)}: must be one of {', '.join(choices)}{near}")
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * (len(value) if isinstance(value, list | tuple) else 1)
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            return tuple(convert(name, item, of) for item, of in zip(value, kinds, strict=True))
        raise UserError(f"{name} = {show(value)}: must be {len(kinds)} values")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{name} = {str(value)[:20]}…: too large a number") from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name} = {show(value)}: must be {_KINDS[kind]}")
    return value


def out_of_range(settings: Any) -> Iterator[str]:
    """What is wrong with single values: `name = value: must be …`."""
    known = describe(settings)
    for name, value in flatten(settings):
        numbers = value if isinstance(value, tuple) else (value,)
        limits = known[name].range
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            yield f"{name} = {show(value)}: must be finite"
        elif limits is not None and value not in limits:
            yield f"{name} = {show(value)}: must be {limits}"


def show(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        text = "(" + ", ".join(map(show, value)) + ")"
    else:
        text = repr(value) if isinstance(value, str) and not value.isidentifier() else str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean a or b?)`, or nothing where nothing is close."""
    known = list(known)
    lowered = {candidate.lower(): candidate for candidate in known}
    close = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)]
    last = name.rsplit(".", 1)[-1].lower()  # the right name in the wrong section
    close += [candidate for candidate in known if candidate.lower().rsplit(".", 1)[-1] == last]
    close = list(dict.fromkeys(close))[:3]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def differences(settings: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value in `settings`, value in `other`), for the fields that differ."""
    mine, theirs = dict(flatten(settings)), dict(flatten(other))
    return {name: (mine[name], theirs.get(name)) for name in mine if mine[name] != theirs.get(name)}


def from_nested(settings: Settings, data: Mapping[str, Any], source: str) -> Settings:
    """`settings` with all values from nested dictionaries, as `dataclasses.asdict` writes them.

    Raises:
      UserError: a field is unknown, missing or of the wrong type; the message names it and `source`.
    """
    given, known = dict(_flatten_nested(data, settings)), describe(settings)
    for name in given:
        if name not in known:
            raise UserError(f"{source}: unknown field {files.printable(name)}{did_you_mean(name, known)}")
    if missing := [name for name in known if name not in given]:
        raise UserError(f"{source}: field {missing[0]} is missing; it was written by another version")
    try:
        return replace(settings, given)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _flatten_nested(data: Mapping[str, Any], like: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        inner = getattr(like, name, None)
        if isinstance(value, dict) and dataclasses.is_dataclass(inner):
            yield from _flatten_nested(value, inner, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# ------------------------------------------------------------------------------------------------ flags


def full_name(name: str, known: Iterable[str]) -> str | None:
    """The field that a flag means: its dotted name, or a last part that only one field has."""
    known = list(known)
    name = name.replace("-", "_")
    if name in known:
        return name
    named_so = [candidate for candidate in known if candidate.rsplit(".", 1)[-1] == name]
    return named_so[0] if len(named_so) == 1 else None


def parse_flags(settings: Settings, arguments: Sequence[str], program: str, required: str = "") -> Settings:
    """`settings` changed by flags: `--train.steps 500`, `--train.steps=5e2`, `--steps 500`.

    Args:
      settings: the defaults.
      arguments: what was typed; one without dashes is the value of the field `required`, if there is one.
      program: what was called, for usage and messages.
      required: a field that must not stay empty.

    Raises:
      UserError: an unknown flag, or a value of another type than the field's.
      SystemExit: after --help.
    """
    known = describe(settings)
    if any(argument in ("-h", "--help") for argument in arguments):
        _parser(settings, known, program).print_help()
        raise SystemExit(0)
    flags: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            found = full_name(name, known)
            if found is None:
                near = did_you_mean(name.replace("-", "_"), known)
                raise UserError(f"unknown option {argument.partition('=')[0]}{near}; see {program} --help")
            flags.append((found, [value] if equals else []))
        elif flags:
            flags[-1][1].append(argument)
        elif required:
            flags.append((required, [argument]))
        else:
            raise UserError(f"unknown argument {argument!r}; see {program} --help")
    for name, values in flags:
        settings = _set(settings, name.split("."), _from_texts(name, values, known[name].kind, program))
    if required and not dict(flatten(settings))[required]:
        raise UserError(f"--{required} is missing: see {program} --help")
    return settings


def _from_texts(name: str, values: list[str], kind: Any, program: str) -> Any:
    kinds = typing.get_args(kind) if typing.get_origin(kind) is tuple else (kind,)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * max(1, len(values))
    if len(values) != len(kinds):
        given = " ".join(values) or "nothing"
        count = "one value" if len(kinds) == 1 else f"{len(kinds)} values"
        raise UserError(f"--{name} takes {count}, not {given}; see {program} --help")
    several = typing.get_origin(kind) is tuple
    for value in values if several else ():
        if "," in value:  # a list, not thousands
            raise UserError(
                f"{name} = {value[:40]}: must be {_KINDS[kinds[0]]}; blanks stand between several"
            )
    converted = tuple(_from_text(name, value, of) for value, of in zip(values, kinds, strict=True))
    return converted if several else converted[0]


_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _from_text(name: str, value: str, kind: Any) -> Any:
    """A value as people type it: `1e5` is a whole number too, and `true` a truth value."""
    try:
        if kind is bool:
            return _TRUTH[value.lower()]
        if kind is int:
            digits = value.replace(",", "") if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", value) else value
            if digits.lstrip("+-").isdecimal():
                return int(digits[:40])
            number = float(digits)
            if not number.is_integer() or abs(number) > 2**63:
                raise ValueError
            return int(number)
        if kind is float:
            return float(value)
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"{name} = {value[:40]}: must be {_KINDS[kind]}") from None
    return convert(name, value, kind)


def _parser(settings: Any, known: Mapping[str, Field], program: str) -> argparse.ArgumentParser:
    """Only for its help; `parse_flags` says in one line what is wrong with a flag."""
    description = inspect.getdoc(type(settings))
    parser = argparse.ArgumentParser(program, description=description, add_help=False, allow_abbrev=False)
    values, groups = dict(flatten(settings)), {"": parser.add_argument_group("options")}
    for name, field in known.items():
        section = name.rpartition(".")[0]
        if section not in groups:
            node = functools.reduce(getattr, section.split("."), settings)
            groups[section] = parser.add_argument_group(
                section, (inspect.getdoc(type(node)) or "").split("\n")[0]
            )
        limits = f"; {field.range}" if field.range is not None else ""
        choices = typing.get_args(field.kind) if typing.get_origin(field.kind) is Literal else ()
        limits = f"; one of {', '.join(choices)}" if choices else limits
        text = f"{meaning(settings, name)} (default: {show(values[name])}{limits})"
        groups[section].add_argument(
            f"--{name.replace('_', '-')}", help=text.replace("%", "%%"), metavar=_metavar(field.kind)
        )
    return parser


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return " ".join(_metavar(of) if of is not Ellipsis else "..." for of in typing.get_args(kind))
    return {int: "INT", float: "FLOAT", bool: "True|False"}.get(kind, "TEXT")
