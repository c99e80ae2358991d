"""What any place for checkpoints must do: test classes of the places inherit it."""

import pytest

from storage.checkpoints import Checkpoints
from storage.errors import LeaseLost


class CheckpointsContract:
    """Inherited by a class with a fixture `place`."""

    def test_a_new_trial_has_no_checkpoint(self, place: "Place") -> None:
        assert place.attempt(0).take_over() is None

    def test_the_next_attempt_gets_the_newest_one(self, place: "Place") -> None:
        first = place.begun(0)
        for step in (1, 4, 8, 12):
            first.save(step, b"at %d" % step)
        second = place.attempt(0)
        assert second.take_over() == b"at 12"
        second.save(16, b"at 16")
        assert place.attempt(0).take_over() == b"at 16"

    def test_two_are_kept_of_many(self, place: "Place") -> None:
        first = place.begun(0)
        for step in range(6):
            first.save(step, bytes(1000))
        assert len(place.names()) == 2

    @pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "flipped", "missing"])
    def test_a_bad_one_is_passed_over_for_the_one_before(self, place: "Place", damage: str) -> None:
        first = place.begun(0)
        first.save(4, b"four" * 50)
        first.save(8, b"eight" * 50)
        newest = max(place.names(), key=lambda name: int(name.split("/")[-1].split(".")[0]))
        content = place.read(newest)
        changed = {
            "truncated": content[:-1],
            "empty": b"",
            "foreign": b"something else",
            "flipped": content[:60] + b"?" + content[61:],
            "missing": None,
        }[damage]
        place.put(newest, changed)
        assert place.attempt(0).take_over() == b"four" * 50

    def test_what_an_old_attempt_writes_after_a_take_over_is_never_read(
        self, place: "Place"
    ) -> None:
        old = place.begun(0)
        old.save(4, b"four")
        place.begun(0)
        with pytest.raises(LeaseLost):
            old.save(8, b"late")
        assert place.attempt(0).take_over() == b"four"

    def test_an_attempt_that_wakes_up_late_takes_nothing(self, place: "Place") -> None:
        place.begun(0).save(4, b"four")
        late = place.attempt(0)
        place.begun(0).save(8, b"eight")
        with pytest.raises(LeaseLost):
            late.take_over()
        assert place.attempt(0).take_over() == b"eight"

    def test_trials_do_not_share_checkpoints(self, place: "Place") -> None:
        place.begun(0).save(4, b"four")
        assert place.attempt(1).take_over() is None

    def test_a_trial_that_has_ended_leaves_nothing(self, place: "Place") -> None:
        checkpoints = place.begun(0)
        checkpoints.save(4, b"four")
        checkpoints.save(8, b"eight")
        place.end(0, "COMPLETE")
        checkpoints.remove()
        assert place.names() == []


class Place:
    """How a test class speaks to its place."""

    def attempt(self, trial: int) -> Checkpoints:
        """The next attempt at the trial of this number."""
        raise NotImplementedError

    def begun(self, trial: int) -> Checkpoints:
        """The same, which has taken over."""
        checkpoints = self.attempt(trial)
        checkpoints.take_over()
        return checkpoints

    def end(self, trial: int, state: str) -> None:
        """The trial has ended; its attempt will remove or stop."""

    def names(self) -> list[str]:
        """Of all that is kept: .../STUDY/TRIAL/TOKEN/STEP.ckpt."""
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        """What is kept under the name."""
        raise NotImplementedError

    def put(self, name: str, content: bytes | None) -> None:
        """None: remove it."""
        raise NotImplementedError
