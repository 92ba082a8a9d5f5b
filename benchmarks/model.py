"""How the time of an update would grow with chips: `python -m benchmarks.model ONE.json MANY.json`.

The two files are of `--only compile`, of one chip and of several that share the same batch. All that is
printed is predicted. An update takes what does not depend on the batch (optimisers, launches), what does, a
share for each chip, and its collectives: bytes over the links as in `benchmarks.predict`, and for each
collective a microsecond (assumed) to every neighbour that a ring along each side of the grid has to pass.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import predict, targets
from benchmarks.kernels import COLLECTIVES
from benchmarks.targets import Chip

HOP = 1e-6
NETWORK = 50e9
"""Bytes per second, one direction, between nodes of eight GPUs: a port of 400 Gb/s for each."""
PAYS = 1.25
"""Speed-up that twice the chips must bring to be worth it."""


class Model:
    """Seconds of an update by chips and batch.

    Args:
      one: what was compiled for one chip.
      many: the same update, of the same batch, for several.
    """

    def __init__(self, one: dict[str, Any], many: dict[str, Any]):
        alone, shared = ({row["name"]: row["value"] for row in each["rows"]} for each in (one, many))
        target = targets.parse(many["settings"]["targets"][0])
        self.chip: Chip = target.chip
        self.batch = one["settings"]["config"]["algorithm"]["batch_size"]
        self.length = one["settings"]["config"]["algorithm"].get("batch_length")
        seconds = alone["time of an update"]
        apart = shared["time of an update"] - shared["of it links, by itself"]
        self.split = (seconds - apart) / (1 - 1 / target.count)
        self.fixed = seconds - self.split
        self.sent, self.number = {}, 0
        for name, value in shared.items():
            kind, _, rest = name.partition(", ")
            if kind in COLLECTIVES and rest.endswith("of them"):
                self.sent[kind] = value
                self.number += int(rest.split()[0])

    def seconds(self, count: int, batch: float) -> tuple[float, float]:
        """Of an update on so many chips with such a batch in all: computing, and collectives."""
        computing = self.fixed + self.split * batch / self.batch / count
        if count == 1:
            return computing, 0.0
        link = self.chip.link
        if self.chip.kind == "gpu" and count > 8:
            link = 2 * NETWORK
        bytes_over_links = sum(predict.ring(kind, sent, link, count) for kind, sent in self.sent.items())
        # The sides of a grid of TPUs as even as powers of two can be.
        log = count.bit_length() - 1
        sides = (2 ** (log // 2), 2 ** (log - log // 2))
        return computing, bytes_over_links + self.number * 2 * sum(side - 1 for side in sides) * HOP


def tell(model: Model, grows: bool) -> None:
    """Powers of two of chips, as long as each has a window."""
    columns = "{:>6} {:>6} {:>11} {:>12} {:>10} {:>7}"
    print(columns.format("chips", "batch", "update", "collectives", "windows/s", "faster"))
    rates: list[float] = []
    for count in (2**n for n in range(9)):
        batch = model.batch * count if grows else model.batch
        if batch % count:
            break
        computing, collectives = model.seconds(count, batch)
        rates.append(batch / (computing + collectives))
        times = (f"{1e3 * seconds:.2f} ms" for seconds in (computing + collectives, collectives))
        print(columns.format(count, batch, *times, f"{rates[-1]:.0f}", f"{rates[-1] / rates[0]:.1f}x"))
    stops = next((n for n in range(1, len(rates)) if rates[n] / rates[n - 1] < PAYS), None)
    print(f"twice the chips bring less than {PAYS} times from {2**stops} on" if stops else "it pays so far")


def main(paths: list[str]) -> int:
    """Two tables: a batch that all chips share, and a batch for each of them."""
    if len(paths) != 2:
        print("usage: python -m benchmarks.model ONE.json MANY.json", file=sys.stderr)
        return 2
    model = Model(*(json.loads(Path(path).read_text()) for path in paths))
    print(f"{model.chip.device_kind}: {model.fixed * 1e3:.2f} ms whatever the batch, "
          f"{model.split * 1e3:.2f} ms for a batch of {model.batch}, {model.number} collectives of "
          f"{sum(model.sent.values()) / 1e6:.1f} MB an update; all predicted")  # fmt: skip
    for title, grows in (("one batch, shared", False), (f"a batch of {model.batch} for each", True)):
        print(f"\n{title}")
        tell(model, grows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
