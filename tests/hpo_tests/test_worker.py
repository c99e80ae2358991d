"""The thread that renews a worker's lease."""

import itertools
import time
from typing import Any, cast

import pytest

from hpo.space import SearchSpace
from hpo.spec import StudySpec
from hpo.worker import LeaseKeeper, Pulse
from storage import leases
from storage.leases import Renewal

SPEC = StudySpec(
    data="digits",
    fingerprint="none",
    space=SearchSpace(fields={"backbone": "smallcnn"}),
    seed=0,
    first_rung=4,
    lease_seconds=3.0,
)


def test_a_renewal_that_failed_is_tried_again_well_before_the_lease_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[float] = []

    def renew(*_: Any, **__: Any) -> Renewal:
        calls.append(time.monotonic())
        if len(calls) < 4:
            raise RuntimeError("too many clients")
        if len(calls) == 5:
            raise KeyboardInterrupt
        return Renewal(holds_lease=True, study_goes_on=True)

    monkeypatch.setattr(leases, "renew", renew)
    keeper = LeaseKeeper(cast(Any, None), "w", SPEC, Pulse())
    with pytest.raises(KeyboardInterrupt):
        keeper.run()
    pauses = [after - before for before, after in itertools.pairwise(calls)]
    assert max(pauses[:3]) < 0.9 < 1.0 <= pauses[3]
    assert caplog.messages == ["can't renew the lease now: too many clients"]
