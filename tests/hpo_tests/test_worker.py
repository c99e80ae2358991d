"""The thread that renews a worker's lease."""

import itertools
import json
import time
from pathlib import Path
from typing import Any, cast

import pytest

from hpo.launch import prepare_study
from hpo.options import LaunchOptions
from hpo.space import SearchSpace
from hpo.spec import StudySpec
from hpo.worker import LeaseKeeper, Pulse, Worker
from storage import leases
from storage.database import Database
from storage.leases import Renewal
from storage.snapshots import snapshot
from tests.parts import Hpo, TcpPostgres
from trainer.config import ConfigError

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


def test_a_worker_of_a_study_in_bf16_leaves_before_it_claims_where_bf16_is_emulated(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.device.available_devices", lambda: ["cpu"])
    monkeypatch.setattr("trainer.device.has_fast_bf16", lambda: True)
    options = LaunchOptions(trials=1, backbones="smallcnn", precision="bf16")
    record = prepare_study(database, options)
    monkeypatch.setattr("trainer.device.has_fast_bf16", lambda: False)
    monkeypatch.setattr("hpo.worker._LEAVE", ())  # signals stay with the tests' own process
    with pytest.raises(ConfigError, match="does not compute in bf16 itself"):
        Worker(database, record.name, device="cpu").run()
    now = snapshot(database, record.study_id)
    assert (now.trials, now.num_finished) == ((), 0)
    (sick,) = now.sick
    assert "does not compute in bf16 itself" in sick.reason
