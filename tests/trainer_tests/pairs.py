"""Covering arrays: few configurations in which each two values of any two fields meet."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]
Meeting = tuple[tuple[str, Any], ...]
"""Values of two or three fields, in the order of the fields."""
NUM_TRIES = 12
"""Rows that are thought of for each that is taken."""


def meetings_of(row: Values, closely: Sequence[str] = ()) -> Iterator[Meeting]:
    """Each two of its values, and each three of those of the fields `closely`."""
    yield from itertools.combinations(row.items(), 2)
    yield from itertools.combinations([each for each in row.items() if each[0] in closely], 3)


def all_meetings(
    fields: Mapping[str, Sequence[Any]], closely: Sequence[str] = ()
) -> Iterator[Meeting]:
    """Each two values of any two fields, and each three of any three of `closely`."""
    groups: list[tuple[str, ...]] = [*itertools.combinations(fields, 2)]
    groups += itertools.combinations([name for name in fields if name in closely], 3)
    for names in groups:
        for values in itertools.product(*(fields[name] for name in names)):
            yield tuple(zip(names, values, strict=True))


def covering_array(
    fields: Mapping[str, Sequence[Any]],
    wanted: set[Meeting],
    fits: Callable[[Values], bool] = lambda _: True,
    closely: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Rows with a value of each field that hold all wanted meetings; the same ones each time.

    Greedy, as AETG (Cohen et al. 1997): a row begins with a meeting that is missing, and each
    further field has the value that meets most of what is missing. fits: whether a row, of some of
    the fields, is one that may be taken; what fits can be completed to a row that does.
    """
    chance = random.Random(0)
    missing, rows = dict.fromkeys(sorted(wanted, key=lambda each: (-len(each), repr(each)))), []
    while missing:
        first = next(iter(missing))
        tries = [
            _row(fields, dict(first), missing, fits, closely, chance) for _ in range(NUM_TRIES)
        ]
        best = max(
            tries, key=lambda row: sum(each in missing for each in meetings_of(row, closely))
        )
        rows.append(best)
        for each in meetings_of(best, closely):
            missing.pop(each, None)
    return rows


def _row(
    fields: Mapping[str, Sequence[Any]],
    row: dict[str, Any],
    missing: Mapping[Meeting, None],
    fits: Callable[[Values], bool],
    closely: Sequence[str],
    chance: random.Random,
) -> dict[str, Any]:
    position = {name: index for index, name in enumerate(fields)}
    order = [name for name in fields if name not in row]
    chance.shuffle(order)
    for name in order:
        known = list(row.items())
        others: list[Meeting] = [(each,) for each in known]
        if name in closely:
            others += itertools.combinations([each for each in known if each[0] in closely], 2)

        def met(value: Any, name: str = name, others: Sequence[Meeting] = others) -> int:
            return sum(
                tuple(sorted((*other, (name, value)), key=lambda pair: position[pair[0]]))
                in missing
                for other in others
            )

        choices = [value for value in fields[name] if fits({**row, name: value})]
        chance.shuffle(choices)
        row[name] = max(choices, key=met)
    return {name: row[name] for name in fields}
