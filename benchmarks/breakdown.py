"""Where an update's time goes: its pieces, each compiled and timed alone."""

from typing import TYPE_CHECKING

from benchmarks.pieces import Pieces
from benchmarks.subject import update_keys
from benchmarks.timing import compile_program
from twister_jax.agents import in_precision

if TYPE_CHECKING:
    from benchmarks.bench import Bench

SECTION = "breakdown"


def run(bench: "Bench") -> None:
    """One row for each piece, and what those that make up the update come to together."""
    report, yardstick = bench.report, bench.yardstick
    pieces: Pieces = bench.pieces.pieces(bench.subject, update_keys(bench.config, 1)[0])
    piece, total = next(pieces), 0.0
    while True:
        program = compile_program(in_precision(piece.function, bench.config.precision), *piece.args)
        times = bench.measure(program, *piece.args)
        yardstick.clock.sample()  # by turns, so that both see the same machine
        share = program.operations / (times.median * yardstick.rate)
        note = "" if piece.whole else "part of others; "
        note += f"{program.operations / 1e9:.4g} GFLOP, {share:.0%} of peak" if program.operations else ""
        report.time(SECTION, piece.name, times, note.rstrip("; "))
        total += times.median if piece.whole else 0.0
        if bench.out_of_time:
            report.fail(SECTION, f"--minutes are over; not all pieces after {piece.name} were timed")
            return
        try:
            piece = pieces.send(program.call(*piece.args))
        except StopIteration:
            break
    note = "one update is one program, in which pieces share work and overlap"
    report.add(SECTION, "pieces together", total, "s", note)
    if bench.update_times:
        report.add(SECTION, "pieces together / one update", total / bench.update_times.median)
