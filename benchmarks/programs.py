"""What the text of a compiled program says: computations, instructions, and where they come from."""

import collections
import re
from collections.abc import Iterable


def computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry computation, and the instructions of each, a line each."""
    entry, current = "", ""
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if head is not None:
            current = head[2]
            lines[current] = []
            entry = current if head[1] else entry
        elif line.startswith("}"):
            current = ""
        elif current and " = " in line:
            lines[current].append(line)
    return entry, lines


def name_of(line: str) -> str:
    """Of an instruction."""
    return line.partition(" = ")[0].strip().removeprefix("ROOT ").lstrip("%")


def operation_of(line: str) -> str:
    """`fusion`, `while`, …; the type before it may hold blanks inside of its brackets."""
    rest, depth = line.partition(" = ")[2], 0
    for index, letter in enumerate(rest):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and not depth:
            operation = re.match(r"[\w\-]+", rest[index + 1 :])
            return operation[0] if operation else ""
    return ""


def called(line: str, attributes: str) -> list[str]:
    """Names of the computations that an instruction calls by these attributes."""
    found = re.findall(rf"\b(?:{attributes})=(?:{{([^}}]*)}}|%?([\w.\-]+))", line)
    return [name.strip().lstrip("%") for several, one in found for name in (several or one).split(",")]


def _source(line: str) -> str:
    """JAX's name of the operation that an instruction was made for."""
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1] if found else ""


# ---------------------------------------------------------------------------------------- named scopes


def parts(text: str, names: Iterable[str]) -> dict[str, str]:
    """Instruction -> the innermost of the `jax.named_scope`s in `names` that it was traced in.

    The scope's name is found under transformations too, as in `transpose(jvp(NAME))`; instructions of no
    such scope are left out. A fusion is of the scope of its last operation or, where XLA does not say which
    that is, of the scope of most operations in it.
    """
    alternatives = "|".join(map(re.escape, names)) or "(?!)"
    component = re.compile(rf"(?:(?!p?jit\()\w+\()*({alternatives})\)*")

    def scope(line: str) -> str | None:
        for each in reversed(_source(line).split("/")):
            if found := component.fullmatch(each):
                return found[1]
        return None

    _, lines_of = computations(text)
    own = {name: [scope(line) for line in lines] for name, lines in lines_of.items()}
    found: dict[str, str] = {}
    for computation, lines in lines_of.items():
        for line, part in zip(lines, own[computation], strict=True):
            if part is None:
                inner = [each for name in called(line, "calls") for each in own.get(name, ()) if each]
                part = collections.Counter(inner).most_common(1)[0][0] if inner else None
            if part is not None:
                found[name_of(line)] = part
    return found


# ------------------------------------------------------------------------------------------ source lines


def source_lines(text: str) -> dict[str, str]:
    """Instruction -> the line of ours that it comes from.

    Of a fusion it is its last operation's. `<-` marks what the backward pass does; where no line of ours is
    known, JAX's name of the operation stands for it.
    """
    frames, names = _Frames(text), {}
    for line in text.splitlines():
        if " = " in line and (source := _source(line)):
            frame = re.search(r"stack_frame_id=(\d+)", line)
            place = frames.place(int(frame[1])) if frame else None
            backward = "<- " if "transpose(" in source else ""
            names[name_of(line)] = backward + (place or source.removeprefix("jit(update)/"))
    return names


class _Frames:
    """The tables at the head of a compiled program's text, from a stack frame to file, line and function."""

    def __init__(self, program: str):
        def table(name: str, row: str) -> dict[int, tuple[str, ...]]:
            part = re.search(rf"^{name}\n((?:\d+ .*\n)*)", program, re.MULTILINE)
            rows = re.findall(rf"^(\d+) {row}", part[1] if part else "", re.MULTILINE)
            return {int(number): tuple(values) for number, *values in rows}

        self.files = table("FileNames", '"(.*)"')
        self.functions = table("FunctionNames", '"(.*)"')
        location = r"{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
        self.locations = table("FileLocations", location)
        self.frames = table("StackFrames", r"{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
        # Some versions print the parent's number plus one: there the first frame has a parent.
        self.shift = 1 if self.frames.get(1, ("", ""))[1] == "1" else 0

    def place(self, frame: int) -> str | None:
        """The innermost line of the package that a frame was called from."""
        while frame in self.frames:
            location, parent = self.frames[frame]
            file, function, line = self.locations[int(location)]
            _, ours, path = self.files[int(file)][0].rpartition("/twister_jax/")
            if ours:
                return f"{path}:{line} {self.functions[int(function)][0].replace('<locals>.', '')}"
            frame = int(parent or 0) - self.shift
        return None
