"""What an update asks of a device: memory, kernels, collectives, and the time that it would take.

With `--target` it is compiled for machines that are not there; without, the measured program of this machine
is read, which has to be a GPU or a TPU.
"""

import collections

import jax

from benchmarks import absent, kernels, predict, targets
from benchmarks.bench import Bench
from benchmarks.report import Report
from benchmarks.targets import Chip
from twister_jax.fields import replace

SECTION = "compile"
LINES = 10


def run(bench: Bench) -> None:
    """A table for each target, or of this machine."""
    options = bench.options
    for name in options.targets:
        target = targets.parse(name)
        precision = options.precision if options.precision != "auto" else "bfloat16"
        config = replace(bench.config, {"precision": precision})
        program = absent.compile_update(target, config)
        section = f"{SECTION} {name}" if len(options.targets) > 1 else SECTION
        report = bench.report
        report.add(section, "device", target.count, "", f"{target.chip.device_kind}, absent, {precision}")
        needed = program.argument_bytes + program.temp_bytes
        share = f"of {target.chip.memory / 1e9:.0f} GB, each device"
        report.add(section, "state and replay", program.argument_bytes, "B", share)
        report.add(section, "scratch memory", program.temp_bytes, "B", "as the compiler plans it")
        report.add(section, "memory", needed / target.chip.memory, "", "of what the device has")
        tell(report, section, kernels.read(program.text, target.chip.tile), target.chip, target.count)
    if not options.targets:
        if jax.default_backend() == "cpu":
            note = "not of a CPU: name a machine, as in --target v5e:2x4 or --target H200"
            bench.report.add(SECTION, "kernels", None, "", note)
            return
        chip = targets.chip_of(jax.devices()[0].device_kind)
        text = bench.compile_update().text()
        tell(bench.report, SECTION, kernels.read(text, chip.tile if chip else 1), chip, 1)


def tell(report: Report, section: str, found: list[kernels.Kernel], chip: Chip | None, count: int) -> None:
    """The rows of a program, those that are predicted only for a known chip."""
    launched = [each for each in found if not each.hidden]

    def total(of: str) -> float:
        return sum(each.times * float(getattr(each.work, of)) for each in found)

    report.add(section, "kernels", sum(each.times for each in launched), "", "loops multiplied")
    loops: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    for each in launched:
        kinds["single numbers" if each.scalar else each.kind] += each.times
        if each.loop:
            loops[each.loop] += each.times
    for name, number in loops.most_common():
        report.add(section, f"in {name}"[:44], number, "", "all its rounds")
    for name, number in kinds.most_common(LINES):
        report.add(section, name[:44], number, "", "by what they are")
    report.add(section, "products", total("products"), "FLOP", "each device")
    report.add(section, "products, padded", total("padded"), "FLOP", "features as the matrix unit has them")
    report.add(section, "element-wise operations", total("vector"), "FLOP", "padded to tiles where there are")
    report.add(section, "memory traffic", sum(each.times * each.bytes for each in found), "B", "each device")

    for kind in kernels.COLLECTIVES:
        of_kind = [each for each in found if each.collective == kind]
        if of_kind:
            sent = sum(each.times * each.sent for each in of_kind)
            number = sum(each.times for each in of_kind)
            report.add(section, f"{kind}, {number} of them", sent, "B", "that each device gives")
            if chip:
                seconds = predict.ring(kind, sent, chip.link, count)
                report.add(section, f"{kind}, time", seconds, "s", "predicted")
    if chip is None:
        return

    costs = [predict.cost(each, chip, count) for each in found]
    report.add(section, "time of an update", sum(each.total for each in costs), "s", "predicted")
    for part in ("memory", "products", "vector", "launch", "links"):
        alone = sum(getattr(each, part) for each in costs)
        bounded = sum(each.total for each in costs if each.bound == part)
        note = f"predicted; {bounded * 1e3:.3g} ms in kernels that it bounds"
        report.add(section, f"of it {part}, by itself", alone, "s", note)
    cycles = sum(each.times * each.cycles for each in found)
    if cycles and chip.clock:
        report.add(
            section, "by the compiler's cycles", cycles / chip.clock, "s", "its own estimate of kernels"
        )
    for line, seconds, bound in predict.by_line(found, chip, count)[:LINES]:
        report.add(section, line[:44], seconds, "s", f"predicted, mostly {bound}")
