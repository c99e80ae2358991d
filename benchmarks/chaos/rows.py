"""The rows of docs/faults.md, by number, and how one is run."""

import sys
import traceback
from collections.abc import Callable, Iterator

from benchmarks.chaos import (
    rows_database,
    rows_disk,
    rows_export,
    rows_hostile,
    rows_ill,
    rows_kills,
    rows_launches,
    rows_network,
    rows_preempted,
    rows_signals,
    rows_steering,
    rows_trials,
)
from benchmarks.chaos.audit import Finding
from benchmarks.chaos.stage import Arena, Overdue

Row = Callable[[Arena, bool], Iterator[Finding]]

ROWS: dict[str, Row] = {
    "1": rows_kills.killed_at_random,
    "2": rows_kills.killed_at_each_point,
    "3": rows_kills.reaper_killed,
    "4": rows_kills.all_killed,
    "5": rows_signals.told_to_leave,
    "6": rows_signals.stopped_past_the_lease,
    "7": rows_signals.hanging,
    "8": rows_database.postgres_restarted,
    "9": rows_database.postgres_down,
    "10": rows_network.cut_in_a_commit,
    "11": rows_network.black_hole,
    "12": rows_network.slow_network,
    "13": rows_network.crowded,
    "14": rows_database.empty_database,
    "15": rows_database.coming_and_going,
    "16": rows_trials.sick_trainings,
    "17": rows_trials.only_sick_trainings,
    "18": rows_kills.killed_while_saving,
    "19": rows_disk.full_disk,
    "20": rows_trials.other_clocks,
    "21": rows_trials.other_versions,
    "22": rows_steering.steered,
    "24": rows_steering.launch_interrupted,
    "25": rows_export.export_killed,
    "26": rows_hostile.hostile,
    "28": rows_ill.poison,
    "29": rows_ill.sick_workers,
    "30": rows_preempted.preempted,
    "31": rows_database.away_for_long,
    "32": rows_ill.slow_data,
    "33": rows_export.retraining_killed,
    "34": rows_launches.second_launch,
    "35": rows_launches.refused_launches,
    "36": rows_database.few_connections,
}
SHORT = ["1", "2", "5", "8", "14", "15", "18", "36"]


def findings_of(arena: Arena, row: str, *, long: bool) -> Iterator[Finding]:
    """What a row comes to; what breaks it off is a finding, too."""
    try:
        yield from ROWS[row](arena, long)
    except Overdue as error:
        yield Finding(row=row, done="broken off", violations=[str(error)])
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        yield Finding(row=row, done="broken off by the harness", violations=[reason])
