"""Processes that measure, as workers would train."""

from pathlib import Path

import pytest

from hpo.errors import WorkersDie
from hpo.space import SearchSpace
from hpo.spec import StudySpec
from hpo.speeds import Crew
from trainer.data.registry import load

NETWORK = """
import os
def net(**_):
    os._exit(1)
"""


def spec(backbone: str) -> StudySpec:
    return StudySpec(
        data="digits",
        fingerprint=load("digits", seed=0).fingerprint,
        space=SearchSpace(fields={"backbone": backbone, "batch_size": 32}),
        seed=0,
        first_rung=4,
    )


def test_each_process_of_a_crew_says_how_fast_it_is() -> None:
    with Crew(spec("smallcnn"), ["cpu", "cpu"]) as crew:
        speeds = crew.speeds("smallcnn", seconds=0.1)
    assert len(speeds) == 2
    assert all(speed.train > 0 and speed.evaluate > 0 for speed in speeds)


def test_a_network_that_ends_its_process_is_an_error_and_not_measured_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ending_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    with (
        pytest.raises(WorkersDie, match="a process that measured ending_network:net died"),
        Crew(spec("ending_network:net"), ["cpu"]) as crew,
    ):
        crew.speeds("ending_network:net", seconds=0.1)
