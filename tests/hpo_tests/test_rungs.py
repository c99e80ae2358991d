import pytest

from hpo.rungs import first_rung, is_rung, judge


def rungs(*, first: int, num_epochs: int, eta: int = 4) -> list[int]:
    steps = [1, *range(4, 4 * num_epochs + 1, 4)]
    return [step for step in steps if is_rung(step, first=first, num_epochs=num_epochs, eta=eta)]


def test_rungs_lie_at_a_quarter_epoch_one_four_and_so_on_before_the_end() -> None:
    assert rungs(first=1, num_epochs=20) == [1, 4, 16, 64]
    assert rungs(first=4, num_epochs=20) == [4, 16, 64]
    assert rungs(first=1, num_epochs=16) == [1, 4, 16]
    assert rungs(first=1, num_epochs=4) == [1, 4]
    assert rungs(first=1, num_epochs=1) == [1]


@pytest.mark.parametrize(
    ("num_train", "largest_batch", "step"),
    [(54_000, 256, 1), (10_000, 256, 4), (4_096, 256, 4), (1_150, 128, 16), (100, 64, 16)],
)
def test_the_first_rung_waits_for_sixteen_optimizer_steps(
    num_train: int, largest_batch: int, step: int
) -> None:
    assert first_rung(num_train=num_train, largest_batch=largest_batch) == step


@pytest.mark.parametrize(
    ("value", "others", "goes_on"),
    [
        (0.1, [], True),
        (0.5, [0.4], True),
        (0.4, [0.5], False),
        (0.5, [0.5, 0.5], True),
        (0.7, [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], True),  # second of eight
        (0.7, [0.9, 0.1, 0.2, 0.3, 0.4, 0.5], False),  # second of seven
        (0.7, [0.9, 0.8, 0.2, 0.3, 0.4, 0.5, 0.6], False),
    ],
)
def test_one_in_four_goes_on_and_the_best_always(
    value: float, others: list[float], goes_on: bool
) -> None:
    verdict = judge(
        step=4,
        value=value,
        num_better=sum(theirs > value for theirs in others),
        num_others=len(others),
        num_epochs=10,
        eta=4,
    )
    assert verdict.goes_on is goes_on


def test_a_stop_says_why_and_what_it_saved() -> None:
    verdict = judge(step=1, value=0.4, num_better=2, num_others=2, num_epochs=10, eta=4)
    assert verdict.reason == (
        "0.4000 after 0.25 epochs is place 3 of 3, the best 1 go on: 9.75 of 10 epochs saved"
    )
