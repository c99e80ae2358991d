from pathlib import Path
from typing import Any

import pytest

from hpo.errors import UsageError
from hpo.options import LaunchOptions
from hpo.quantities import parse_bytes, parse_duration
from hpo.space import Range
from hpo.watch import last_line
from trainer.config import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), (" 3s ", 3)]
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration("--timeout", text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1s", "2 hours", "1d", "inf", "nan", "h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--timeout takes a time above 0"):
        parse_duration("--timeout", text)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("2G", 2 << 30), ("500M", 500 << 20), (" 64K", 65_536), ("7", 7)]
)
def test_a_size_is_read(text: str, num_bytes: int) -> None:
    assert parse_bytes("--max-memory", text) == num_bytes


@pytest.mark.parametrize("text", ["", "2GB", "-1M", "1.5G", "many", "9" * 20])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--max-memory takes a size like 500M"):
        parse_bytes("--max-memory", text)


@pytest.mark.parametrize(
    "options", [{"image_size": 0}, {"max_broken": 2.0}, {"max_memory_bytes": 10}]
)
def test_data_options_that_can_not_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--"):
        LaunchOptions(**options)


def test_flags_go_before_the_space_file(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text('[space]\nlr = {low = 0.1, high = 0.2}\nbackbone = "resnet8"\nepochs = 7\n')
    options = LaunchOptions(space=path, backbones="smallcnn, resnet20", epochs=3)
    assert options.given_fields() == {
        "lr": Range(low=0.1, high=0.2),
        "backbone": ("smallcnn", "resnet20"),
        "epochs": 3,
    }


@pytest.mark.parametrize(
    "options", [{"trials": 0}, {"epochs": 0}, {"study": "a b"}, {"seed": -1}, {"objective": "f1"}]
)
def test_options_that_can_not_be_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        LaunchOptions(**options)  # type: ignore[arg-type]


def test_the_last_line_of_a_log_is_the_last_that_says_anything(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == "no log"
    log.write_text("first\nlast\n\n  \n")
    assert last_line(log) == "last"
