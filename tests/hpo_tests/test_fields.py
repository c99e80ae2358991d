"""The fields of a training: described, reachable, and said where they do nothing."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import trainer
from hpo.fields import FieldDescription, describe_fields
from hpo.settings import parse_settings
from hpo.space import SearchSpace, read_space
from hpo.status import tried
from storage.snapshots import TrialSnapshot
from trainer import conditions
from trainer.config import TrainConfig
from trainer.optim import make_optimizer

FIELDS = describe_fields()


def test_all_fields_are_described_in_their_order() -> None:
    assert [field.name for field in FIELDS] == [
        field.name for field in dataclasses.fields(TrainConfig)
    ]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_field_is_described_and_a_space_file_and_a_command_line_reach_it(
    field: FieldDescription, tmp_path: Path
) -> None:
    assert len(field.text) > 15, field
    assert "class" not in field.kind
    if field.name == "module":
        return  # below: its fields have names of their own
    default = field.default
    default = str(default).lower() if isinstance(default, bool) else default
    written = f'"{default}"' if isinstance(field.default, str) else default
    path = tmp_path / "space.toml"
    path.write_text(f"[space]\n{field.name} = {written}\n")
    assert read_space(path).fields == {field.name: field.default}
    if default != "":
        given = parse_settings("--set", [f"{field.name}={default}"])
        assert given == {field.name: field.default}
        assert type(given[field.name]) is type(field.default)


@pytest.mark.parametrize(
    ("written", "fixed"),
    [("64", 64), ("1e-3", 1e-3), ("true", True), ('"relu"', "relu"), ("-2", -2)],
)
@pytest.mark.parametrize("key", ["module.hidden", '"module.hidden"'])
def test_an_argument_of_a_module_is_reached_by_a_space_file_and_a_command_line(
    key: str, written: str, fixed: Any, tmp_path: Path
) -> None:
    path = tmp_path / "space.toml"
    path.write_text(f"[space]\n{key} = {written}\n")
    assert read_space(path).fields == {"module.hidden": fixed}
    given = parse_settings("--set", ["module.hidden=" + written.strip('"')])
    assert given == {"module.hidden": fixed}
    assert type(given["module.hidden"]) is type(fixed)
    assert TrainConfig.from_dict(given).module == {"hidden": fixed}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_field_is_read_by_the_training(field: FieldDescription) -> None:
    folder = Path(next(iter(trainer.__path__)))
    files = [path for path in folder.rglob("*.py") if path.name != "config.py"]
    assert any(re.search(rf"config\.{field.name}\b", path.read_text()) for path in files)


def test_what_is_searched_by_default_is_said() -> None:
    assert {field.name for field in FIELDS if field.searched} == {
        "lr", "batch_size", "backbone", "weight_decay",
    }  # fmt: skip


def test_the_command_prints_them_without_torch() -> None:
    code = (
        "import sys, hpo.cli\n"
        "try: hpo.cli.main(['space'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("False\n")
    assert "lr: number, default 0.001, searched unless told otherwise\n    Peak" in shown.stdout
    assert "optimizer: sgd | adam | adamw, default adamw\n" in shown.stdout


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize(("field", "value"), [("momentum", 0.5), ("weight_decay", 0.5)])
def test_a_field_that_an_optimizer_ignores_is_known_to_be_idle(
    optimizer: Any, field: str, value: float
) -> None:
    layer = nn.Linear(2, 2)
    plain = TrainConfig(optimizer=optimizer)
    other = TrainConfig.from_dict({"optimizer": optimizer, field: value})
    groups = [
        [{k: v for k, v in group.items() if k != "params"} for group in made.param_groups]
        for made in (
            make_optimizer(plain, layer),
            make_optimizer(other, layer),
        )
    ]
    is_idle = conditions.idle_because(field, {"optimizer": optimizer}) is not None
    assert (groups[0] == groups[1]) == is_idle


def snapshot_of(params: Mapping[str, Any], config: Mapping[str, Any]) -> TrialSnapshot:
    return TrialSnapshot(
        trial_id=1, number=0, state="COMPLETE", value=0.5, params=params,
        attributes={"config": config}, steps=(), values=(), is_feasible=True, attempts=1,
        seconds=1.0, images_per_second=1.0,
    )  # fmt: skip


def test_what_does_not_count_is_not_shown_with_a_trial_and_said_of_a_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conditions, "CONDITIONS", {"momentum": ("optimizer", ("sgd",))})
    params = {"lr": 0.1, "momentum": 0.5}
    assert tried(snapshot_of(params, {"optimizer": "sgd"})) == params
    assert tried(snapshot_of(params, {"optimizer": "adam"})) == {"lr": 0.1}
    assert tried(snapshot_of({**params, "optimizer": "adam"}, {})) == {
        "lr": 0.1, "optimizer": "adam",
    }  # fmt: skip
    never = SearchSpace(fields={"optimizer": ("adam", "adamw"), "momentum": (0.5, 0.9)})
    assert never.idle() == ["momentum counts only with optimizer = sgd"]
    assert SearchSpace(fields={"optimizer": ("adam", "sgd"), "momentum": 0.5}).idle() == []
    assert SearchSpace(fields={"momentum": 0.5}).idle() == never.idle()  # adamw by default
