"""A function in step with its caller: turns, errors, and the end."""

import threading

import pytest

from trainer.handover import Handover, Stopped


def test_one_of_the_two_runs_at_a_time_and_the_end_is_known() -> None:
    said: list[str] = []

    def work() -> None:
        for turn in "abc":
            said.append(f"{turn} in {threading.current_thread().name}")
            handover.pause()

    handover = Handover(work, name="worker")
    for turn in "abc":
        handover.advance()
        assert said[-1] == f"{turn} in worker"
        assert not handover.ended
    handover.advance()
    assert handover.ended
    handover.close()
    assert len(said) == 3


def test_what_it_raises_is_raised_in_its_caller() -> None:
    error = ValueError("x")

    def work() -> None:
        raise error

    handover = Handover(work, name="worker")
    with pytest.raises(ValueError, match="x") as caught:
        handover.advance()
    assert caught.value is error
    assert handover.ended
    handover.close()


def test_closed_it_ends_where_it_is() -> None:
    ended: list[type] = []

    def work() -> None:
        try:
            handover.pause()
        except Stopped as stopped:
            ended.append(type(stopped))
            raise

    handover = Handover(work, name="worker")
    handover.close()
    handover = Handover(work, name="worker")
    handover.advance()
    handover.close()
    assert ended == [Stopped]
    assert handover.ended
    assert "worker" not in {thread.name for thread in threading.enumerate()}
