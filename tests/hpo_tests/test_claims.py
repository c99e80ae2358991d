"""Cores and GPUs that launches of one machine share out among them; real processes hold claims."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hpo.claims import claim_core, claim_gpu, device_key, least_used
from hpo.executors.local import LocalExecutor
from hpo.launch import devices_of_workers
from hpo.options import LaunchOptions
from hpo.space import SearchSpace
from hpo.spec import StudySpec

HOLD = """
import json, sys
from hpo.claims import claim_core, claim_gpu
kind, *given = json.loads(sys.argv[1])
found = claim_core(given) if kind == "core" else [claim_gpu(*given) for _ in range(2)]
print("claimed", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cores() -> list[int]:
    """Numbers that no machine has, so that nobody else claims them."""
    return [70_001, 70_002]


class Holder:
    """Another process of this machine that has claimed something, until it is killed."""

    def __init__(self, *claim: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLD, json.dumps(claim)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "claimed\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def other(cores: list[int]) -> Iterator[Holder]:
    """Another launch, which has the first core."""
    holder = Holder("core", cores[0])
    yield holder
    holder.kill()


def test_a_core_of_another_launch_is_passed_over_until_that_launch_has_ended(
    cores: list[int], other: Holder
) -> None:
    found = claim_core(cores)
    assert found is not None
    assert found[0] == cores[1]
    assert claim_core(cores) is None  # both are in use
    found[1].release()
    other.kill()  # however it ends
    again = claim_core(cores)
    assert again is not None
    assert again[0] == cores[0]
    again[1].release()


def test_of_several_gpus_the_one_comes_first_that_fewest_workers_use() -> None:
    holder = Holder("gpu", device_key("mps:70001"))
    try:
        assert least_used(["mps:70001", "mps:70002"]) == ["mps:70002", "mps:70001"]
        claim = claim_gpu(device_key("mps:70002"))
        assert claim is not None
        assert least_used(["mps:70001", "mps:70002"]) == ["mps:70002", "mps:70001"]
        claim.release()
    finally:
        holder.kill()


def test_two_launches_of_one_worker_each_have_a_core_each(
    cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.cores.cores", lambda: cores)
    launches = [
        LocalExecutor(
            f"study-{number}",
            study_key=number,
            devices=["cpu"],
            storage_url=None,
            command_line=lambda _: None,
        )
        for number in range(3)
    ]
    first, second, third = launches
    assert (first._claimed(0), second._claimed(0)) == (cores[0], cores[1])
    assert third._claimed(0) == cores[0]  # more workers than cores share one
    first.close()
    assert third._claimed(0) == cores[0]
    for launch in (second, third):
        launch.close()
    with_all_cores = LocalExecutor(
        "alone", study_key=9, devices=["cpu"], storage_url=None, command_line=lambda _: None,
        pins=False,
    )  # fmt: skip
    assert with_all_cores._claimed(0) is None


def test_workers_of_two_launches_have_different_ids_even_where_hosts_and_pids_are_the_same() -> (
    None
):
    launches = [
        LocalExecutor(
            "study", study_key=1, devices=["cpu"], storage_url=None, command_line=lambda _: None
        )
        for _ in range(2)
    ]
    assert launches[0]._launcher != launches[1]._launcher


def test_a_launch_takes_the_gpu_that_no_other_launch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.device.available_devices", lambda: ["mps:70003", "mps:70004"])
    spec = StudySpec(
        data="digits",
        fingerprint="none",
        space=SearchSpace(fields={"backbone": "smallcnn"}),
        seed=0,
        first_rung=4,
    )
    options = LaunchOptions(workers="1")
    assert devices_of_workers(spec, options, print) == ["mps:70003"]
    holder = Holder("gpu", device_key("mps:70003"))
    try:
        assert devices_of_workers(spec, options, print) == ["mps:70004"]
    finally:
        holder.kill()
