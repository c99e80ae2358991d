"""What of a space reaches a LightningModule, by the options of a launch."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import UsageError
from hpo.launch import prepare_study
from hpo.options import LaunchOptions
from hpo.points import starting_point
from hpo.search import SearchOptions
from hpo.space import Range, SearchSpace
from hpo.spec import StudySpec
from storage.database import Database
from tests.parts import documented_module
from trainer import modules
from trainer.config import ConfigError

NET = "lightning:my_package:Net"
MORE = """
from my_package import Net

class Deep(Net):
    def __init__(self, num_classes, input_size, depth=2, optimizer="lion", flip=True):
        super().__init__(num_classes, input_size)

class NoLogits(Net):
    def forward(self, images):
        return images
"""


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package.py").write_text(documented_module())
    (tmp_path / "my_more.py").write_text(MORE)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_package", "my_more"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules.find_class.cache_clear()


def launched(
    database: Database, *, settings: tuple[str, ...] = (), tries: tuple[str, ...] = (), **more: Any
) -> SearchSpace:
    """The space of the study that these options make."""
    search = SearchOptions(settings=settings, tries=tries)
    options = LaunchOptions(trials=3, **{"modules": "my_package:Net", **more}, search=search)
    return StudySpec.from_json(prepare_study(database, options).spec).space


def test_the_default_space_is_what_the_class_takes_with_its_own_defaults(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    space = launched(database)
    assert set(space.searched) == {"lr", "batch_size", "backbone", "weight_decay"}
    assert space.fields["backbone"] == (NET,)
    assert space.fields["dropout"] == 0.1
    assert {"optimizer", "schedule"} & set(space.fields) == set()
    assert {"flip", "translate", "epochs"} <= set(space.fields)
    other = launched(database, study="deep", modules="my_more:Deep")
    assert set(other.searched) == {"batch_size", "backbone"}
    assert other.fields["module.optimizer"] == "lion"
    assert other.fields["flip"] is True
    told = launched(database, study="told", modules="my_more:Deep", settings=("optimizer=sgd",))
    assert told.fields["optimizer"] == "sgd"
    assert "module.optimizer" not in told.fields
    assert caplog.messages == []


def test_beside_a_backbone_of_ours_all_fields_are_searched(database: Database) -> None:
    space = launched(database, backbones="smallcnn", settings=("module.hidden=8",))
    assert space.choices("backbone") == ("smallcnn", NET)
    assert {"optimizer", "schedule", "module.hidden"} <= set(space.fields)


def test_a_field_that_reaches_no_network_is_said(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        launched(database, settings=("clip_norm=1", "lr=0.1", "module.hidden=8"))
        launched(database, study="ours", modules=None, settings=("module.hidden=8",))
    assert caplog.messages == [
        f"clip_norm is no argument of {NET}: here it changes nothing",
        "module.hidden counts only with a LightningModule as backbone: here it changes nothing",
    ]


@pytest.mark.parametrize(
    ("settings", "more", "said"),
    [
        (("module.hiden=8",), {}, "unknown argument 'hiden', did you mean hidden?"),
        (("module.hidden=8",), {"modules": "my_package:Net,my_more:Deep"}, "unknown argument"),
        (("mixup=0.2",), {}, f"mixup = 0.2 can't be had with {NET}"),
        (("trainable=head",), {"backbones": "smallcnn"}, "trainable = head can't be had"),
        ((), {"modules": "my_more:NoLogits"}, "not logits (2, 10)"),
        ((), {"modules": "my_nowhere:Net"}, "No module named 'my_nowhere'"),
        ((), {"modules": "my_package:Net,my_package:Net"}, "a choice stands twice"),
    ],
)
def test_what_can_not_be_ends_the_launch_with_one_line(
    settings: tuple[str, ...], more: dict[str, Any], said: str, database: Database
) -> None:
    with pytest.raises((ConfigError, UsageError)) as caught:
        launched(database, settings=settings, **more)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arguments_are_starting_points_and_are_compared_with_the_study(
    database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "space.toml"
    path.write_text("[space]\nmodule.hidden = { low = 8, high = 32 }\n")
    space = launched(database, space=path, tries=("module.hidden=16",))
    assert space.fields["module.hidden"] == Range(low=8, high=32)
    point = starting_point(space, {"module.hidden": 16})
    assert point.params == {"module.hidden": 16}
    for wrong, said in ((64, "lies outside 8 to 32"), ("wide", "is no number")):
        with pytest.raises(ConfigError, match=said):
            starting_point(space, {"module.hidden": wrong})
    with pytest.raises(ConfigError, match=r"module\.depth is not searched here"):
        starting_point(space, {"module.depth": 1})
    with pytest.raises(UsageError, match=r"module\.hidden is Range.* there and 64 here"):
        launched(database, settings=("module.hidden=64",))
