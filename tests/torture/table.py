"""The table of what was tried: a line each, a count of each kind, and whether all of it held."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from torture.training import differences, finished

_COUNTED = {  # kind: how its count ends
    "kill": "kills exact",
    "signal": "signals saved with the right status",
    "damage": "damages refused or survived",
    "disk": "full disks survived",
    "writers": "pairs of writers kept apart",
    "rank": "killed ranks survived",
    "sweep": "sweeps completed",
}


@dataclasses.dataclass
class Row:
    """A line of the table; a case is a failure if anything was found wrong with it."""

    kind: str
    case: str
    found: str = ""
    wrong: list[str] = dataclasses.field(default_factory=list)
    tried: bool = True

    def expect(self, held: bool, wrong: str) -> None:
        """Note a fault unless something held."""
        if not held:
            self.wrong.append(wrong)

    def same(self, folder: Path, whole: Path) -> None:
        """Expect one finished run below a folder, bit for bit that of an unbroken one."""
        runs = finished(folder)
        self.expect(len(runs) == 1, f"{len(runs)} finished runs")
        if len(runs) == 1:
            self.wrong += [f"{name} differs" for name in differences(runs[0], whole)]

    def line(self) -> str:
        """Return the line of the table."""
        state = "not tried" if not self.tried else "FAILED" if self.wrong else "ok"
        return f"| {self.kind} | {self.case} | {'; '.join([*filter(None, [self.found]), *self.wrong])} | {state} |"


def summary(rows: list[Row]) -> Iterator[str]:
    """Yield the lines below the table."""
    for kind, ends in _COUNTED.items():
        of = [row for row in rows if row.kind == kind and row.tried]
        if of:
            yield f"{sum(not row.wrong for row in of)} of {len(of)} {ends}"
    if skipped := sum(not row.tried for row in rows):
        yield f"{skipped} not tried: this machine does not allow them"


def print_table(rows: list[Row]) -> int:
    """Print the table, and return the exit status."""
    print("\n| kind | case | found | |\n|---|---|---|---|")
    for row in rows:
        print(row.line())
    print(", ".join(summary(rows)))
    return int(any(row.wrong for row in rows))
