import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import hpo.measured
from hpo.measured import MOST_DAYS, measured_once


class Ruler:
    """Counts how often it is asked."""

    def __init__(self, value: Any = 7) -> None:
        self.value, self.num_calls = value, 0

    def __call__(self) -> Any:
        self.num_calls += 1
        return self.value


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPO_HOME", str(tmp_path))
    return tmp_path


def as_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpo.measured, "_known", {})


def test_what_was_measured_is_known_to_the_next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ruler = Ruler({"a": [1.5, None]})
    for _ in range(3):
        as_another_process(monkeypatch)
        assert measured_once("length", ruler) == {"a": [1.5, None]}
    assert ruler.num_calls == 1
    assert measured_once("width", ruler) == ruler.value
    assert ruler.num_calls == 2


def test_another_machine_with_the_same_home_measures_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ruler = Ruler()
    measured_once("length", ruler)
    as_another_process(monkeypatch)
    monkeypatch.setattr(hpo.measured, "machine", lambda: {"cpu": "another"})
    measured_once("length", ruler)
    assert ruler.num_calls == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"machine": "x", "value": 7}', b"\xff"])
def test_a_file_that_is_broken_or_foreign_is_measured_anew(
    content: bytes, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_once("length", Ruler())
    (path,) = (home / "measured").iterdir()
    path.write_bytes(content)
    as_another_process(monkeypatch)
    assert measured_once("length", Ruler(8)) == 8


def test_a_value_that_the_check_refuses_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_once("peak", Ruler("fast")) == "fast"
    as_another_process(monkeypatch)
    assert measured_once("peak", Ruler(3.5), float) == 3.5


def test_it_is_measured_again_after_a_month(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_once("length", Ruler())
    (path,) = (home / "measured").iterdir()
    long_ago = time.time() - (MOST_DAYS + 1) * 86_400
    os.utime(path, (long_ago, long_ago))
    as_another_process(monkeypatch)
    assert measured_once("length", Ruler(8)) == 8


def test_a_home_that_can_not_be_written_costs_a_measurement_and_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "file"))
    ruler = Ruler()
    assert [measured_once("length", ruler) for _ in range(3)] == [7, 7, 7]
    assert ruler.num_calls == 1
    assert "can't be kept" in caplog.text


def test_nobody_else_can_hold_the_lock(home: Path) -> None:
    (home / "measured").mkdir(mode=0o755)  # as earlier versions made it
    measured_once("length", Ruler())
    assert (home / "measured").stat().st_mode & 0o7777 == 0o700


def test_what_is_measured_below_another_users_home_is_that_users(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:
        os.chown(home, 54_321, 54_321)
    measured_once("length", Ruler())
    made = list(home.rglob("*"))
    assert len(made) == 2
    assert {path.stat().st_uid for path in made} == {home.stat().st_uid}
    as_another_process(monkeypatch)
    assert measured_once("length", Ruler(8)) == 7


def test_whoever_waits_for_a_measurement_is_told_on_whom(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measured_once("length", Ruler())
    holder = subprocess.Popen(
        ["flock", str(home / "measured"), "sh", "-c", "echo held; exec sleep 4"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert measured_once("width", Ruler()) == 7
    assert f"waiting for process {holder.pid}, which holds the lock" in caplog.text
    holder.communicate()


def test_processes_that_begin_together_measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Ruler):
        def __call__(self) -> Any:
            time.sleep(0.3)
            return super().__call__()

    class Forgetful(dict[Path, Any]):
        """No two of them know the same."""

        def __contains__(self, _: object) -> bool:
            return False

    monkeypatch.setattr(hpo.measured, "_known", Forgetful())
    ruler = Slow()
    together = [threading.Thread(target=measured_once, args=("length", ruler)) for _ in range(4)]
    for each in together:
        each.start()
    for each in together:
        each.join()
    assert ruler.num_calls == 1
