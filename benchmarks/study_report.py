"""The tables and pictures of benchmarks.study, from its JSON alone.

python -m benchmarks.study_report [benchmarks/study.json]
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).with_name("study.json")
Rounds = Sequence[Mapping[str, Mapping[str, Any]]]


def report(path: Path) -> str:
    """Markdown of all that this file has; draws the curves of the pruned studies beside it."""
    found = json.loads(path.read_text())
    parts = []
    for name, part in found.items():
        rounds = [each for each in part["rounds"] if "hpo" in each]
        if not rounds:
            continue
        machine = part["machine"]
        possible = machine["cores"] * peak(rounds)
        parts += [
            f"### {name}: {len(rounds)} rounds, {part['images']:,} images, "
            f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}",
            "",
            (pruned if name.startswith("pruned") else equal)(rounds, possible),
            profile([each["hpo"] for each in rounds]),
        ]
        if name.startswith("pruned"):
            draw(rounds, path.with_name(f"{path.stem}-{name.replace(' ', '-')}.png"))
    return "\n".join(parts)


def equal(rounds: Rounds, possible: float) -> str:
    """The same work: seconds, how much longer than hpo in the same round, what it came to.

    possible: floating-point operations a second that the machine was once seen to do.
    """
    rows = []
    for arm in arms_of(rounds):
        took = [each[arm]["seconds"] for each in rounds if arm in each]
        ratios = [each[arm]["seconds"] / each["hpo"]["seconds"] for each in rounds if arm in each]
        rows.append([
            arm, spread(took, 1), spread(ratios, 2),
            spread([each[arm]["trials_per_hour"] for each in rounds if arm in each], 0),
            spread([each[arm]["images_per_second"] for each in rounds if arm in each], 0),
            spread([100 * mfu(each[arm], possible) for each in rounds if arm in each], 1),
            spread([each[arm]["mean_value"] for each in rounds if arm in each], 4),
            f"{rounds[0][arm]['optimizer_steps']:,}" if arm in rounds[0] else "",
        ])  # fmt: skip
    header = ["arm", "s", "times hpo's", "trials/h", "images/s", "study MFU %",
              "mean accuracy", "optimizer steps"]  # fmt: skip
    return table(header, rows)


def pruned(rounds: Rounds, possible: float) -> str:
    """Each tool's own pruning: seconds until an accuracy that all arms of the round reach."""
    rows = []
    for arm in arms_of(rounds):
        done = [each for each in rounds if arm in each]
        until = [seconds_until(each[arm]["curve"], target(each)) for each in done]
        ratios = [
            mine / seconds_until(each["hpo"]["curve"], target(each))
            for mine, each in zip(until, done, strict=True)
        ]
        rows.append([
            arm, spread([each[arm]["seconds"] for each in done], 0),
            ", ".join(trials_of(each[arm]) for each in done), spread(until, 1),
            spread(ratios, 2), spread([each[arm]["best"] for each in done], 4),
            spread([best_at(each[arm]["curve"], each["hpo"]["seconds"]) for each in done], 4),
            spread([100 * mfu(each[arm], possible) for each in done], 1),
        ])  # fmt: skip
    goals = ", ".join(f"{target(each):.4f}" for each in rounds)
    header = ["arm", "s", "trials", f"s until {goals}", "times hpo's", "best accuracy",
              "best when hpo is done", "study MFU %"]  # fmt: skip
    return table(header, rows)


def profile(studies: Sequence[Mapping[str, Any]]) -> str:
    """Where the seconds of hpo's workers went: of one worker in one study, by what it did."""
    pairs = [(row, study["seconds"]) for study in studies for row in study.get("spent", ())]
    if not pairs:
        return ""
    workers, whole = zip(*pairs, strict=True)
    parts = [part for part in workers[0] if part not in ("worker", "num_trials")]
    spent = {part: [row[part] for row in workers] for part in parts}
    spent["start and end of the command"] = [
        seconds - sum(row[part] for part in parts) for row, seconds in pairs
    ]
    rows = [
        [part, spread(seconds, 2), f"{100 * sum(seconds) / sum(whole):.1f}"]
        for part, seconds in spent.items()
    ]
    return table([f"of hpo's {len(workers)} workers", "s", "%"], rows)


def peak(rounds: Rounds) -> float:
    """The best that one core was seen to do: measured after each arm, neighbours lower it."""
    return max(float(row["peak_flops"]) for each in rounds for row in each.values())


def mfu(row: Mapping[str, Any], possible: float) -> float:
    """Of a whole study: operations of its steps over what could have been done meanwhile."""
    return float(row["flops"] / (row["seconds"] * possible))


def trials_of(row: Mapping[str, Any]) -> str:
    """How many it began, and whether it was given no more time."""
    return f"{row['num_trials']}" + (", broken off" if row.get("broken_off") else "")


def arms_of(rounds: Rounds) -> list[str]:
    """hpo first, then in the order of the first round."""
    names = {arm for each in rounds for arm in each}
    return ["hpo", *sorted(names - {"hpo"})]


def target(arms: Mapping[str, Mapping[str, Any]]) -> float:
    """The least of the arms' best values: all of them got there."""
    return min(float(row["best"]) for row in arms.values())


def seconds_until(curve: Sequence[Sequence[float]], value: float) -> float:
    """curve: (seconds, best so far)."""
    return next(seconds for seconds, best in curve if best >= value)


def best_at(curve: Sequence[Sequence[float]], seconds: float) -> float:
    """The best value so far; 0 before the first report."""
    return max((best for at, best in curve if at <= seconds), default=0.0)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation, where there are several."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):,.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:], ""])


def draw(rounds: Rounds, path: Path) -> None:
    """The best accuracy so far against time, a line for each arm and round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, arm in enumerate(arms_of(rounds)):
        for number, each in enumerate(row for row in rounds if arm in row):
            curve = [*each[arm]["curve"], (each[arm]["seconds"], each[arm]["best"])]
            seconds, best = zip(*curve, strict=True)
            axes.step(seconds, best, where="post", color=f"C{index}",
                      label=None if number else arm)  # fmt: skip
    axes.set(xscale="log", xlabel="seconds", ylabel="best validation accuracy so far")
    lowest = min(target(each) for each in rounds) - 0.1
    axes.set_ylim(lowest, None)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    print(report(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT))
