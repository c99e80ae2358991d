"""The thread that renews a worker's lease."""

import itertools
import json
import time
from pathlib import Path
from typing import Any, cast

import pytest

from hpo.space import SearchSpace
from hpo.spec import StudySpec
from hpo.worker import LeaseKeeper, Pulse
from storage import leases
from storage.leases import Renewal
from tests.parts import Hpo, TcpPostgres

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


def test_a_training_that_waits_for_the_database_longer_than_a_stall_does_not_hang(
    tcp_postgres: TcpPostgres, tmp_path: Path
) -> None:
    hpo = Hpo(tmp_path, {"HPO_STORAGE": tcp_postgres.url, "HPO_STALL_SECONDS": "2",
                         "HPO_LEASE_SECONDS": "2"})  # fmt: skip
    launcher = hpo.start(
        "launch", "--trials", "1", "--epochs", "60", "--backbone", "smallcnn", "--workers", "1"
    )
    while not json.loads(hpo.run("status", "--json").stdout or "{}").get("running"):
        assert launcher.poll() is None
    tcp_postgres.stop("immediate")
    time.sleep(6)
    tcp_postgres.start()
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, err
    assert "starting another" not in err
    (trial,) = json.loads(hpo.run("trials", "--json").stdout)
    assert (trial["state"], trial["attempts"]) == ("COMPLETE", 1)
