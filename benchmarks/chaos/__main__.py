"""python -m benchmarks.chaos: the rows that are asked for, and their table."""

import argparse
import contextlib
import signal
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from benchmarks.chaos.audit import Finding
from benchmarks.chaos.rows import ROWS, SHORT, findings_of
from benchmarks.chaos.stage import Arena
from hpo.measured import machine
from tests.parts import TcpPostgres, free_port

HEADER = (
    "row", "what was done", "s", "kills", "signals", "restarts", "complete", "pruned", "failed",
    "attempts", "epochs", "run twice", "cut", "lost", "doubled", "left RUNNING", "found",
)  # fmt: skip


def main() -> int:
    """0 if nothing was found."""
    # a shell's background job ignores Ctrl-C, and so would all that is started here
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = parse()
    rows = options.rows.split(",") if options.rows else SHORT if options.short else list(ROWS)
    form = "short" if options.short else "long"
    found: list[Finding] = []
    with arena(options.keep) as where:
        for row in rows:
            for finding in findings_of(where, row, long=not options.short):
                found.append(finding)
                print(line(finding), flush=True)
                if options.out is not None:
                    options.out.write_text(document(found, form))
    return int(any(finding.violations for finding in found))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos")
    parser.add_argument("--rows", help=f"of {', '.join(ROWS)}; default: all")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--short", action="store_true", help=f"rows {', '.join(SHORT)}, minutes")
    forms.add_argument("--long", action="store_true", help="all rows, about an hour; the default")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="of logs and witnesses, to look into them"
    )
    options = parser.parse_args()
    unknown = set((options.rows or "1").split(",")) - set(ROWS)
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}: there is {', '.join(ROWS)}")
    return options


@contextlib.contextmanager
def arena(keep: Path | None) -> Iterator[Arena]:
    """A Postgres of its own, which other users' processes may reach."""
    with tempfile.TemporaryDirectory(prefix="hpo-chaos") as folder:
        path = Path(folder)
        path.chmod(0o711)
        (path / "pg").mkdir()
        server = TcpPostgres(path / "pg", free_port())
        server.make()
        server.start()
        try:
            yield Arena((keep or path / "stages").absolute(), server)
        finally:
            server.stop("immediate")


def line(finding: Finding) -> str:
    """One row of the table, in Markdown."""
    counts = finding.counts
    numbers = ["-"] * 13
    if counts is not None:
        numbers = [f"{value:g}" for value in vars(counts).values()]
    said = "; ".join(finding.violations) or "as promised"
    notes = "; ".join(finding.notes)
    said = f"**{said}**" if finding.violations else said
    said += f" ({notes})" if notes else ""
    cells = [finding.row, finding.done, f"{finding.seconds:.0f}", *numbers, said]
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def document(found: list[Finding], form: str) -> str:
    """The whole file."""
    where = machine()
    bad = sum(bool(finding.violations) for finding in found)
    return "\n".join(
        [
            "# Faults, and what was found",
            "",
            f"Made by `python -m benchmarks.chaos --{form}` on {date.today()}: {where['cores']} "
            f"cores of {where['cpu']}, torch {where['torch']}, leases of 2 s. Rows and invariants "
            "are those of docs/faults.md. Epochs are counted by the witness, a log that workers "
            "write beside the tables: those run, those run to their end more than once, and the "
            "parts of an epoch that were begun and not ended.",
            "",
            f"{len(found)} runs, {bad} with something found.",
            "",
            "| " + " | ".join(HEADER) + " |",
            "|" + "---|" * len(HEADER),
            *map(line, found),
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
