import dataclasses
import json

import pytest

from hpo.errors import UsageError
from hpo.space import SearchSpace
from hpo.spec import StudySpec, can_work_together, check_study_name
from trainer.data.options import DataOptions

SPEC = StudySpec(
    data="digits",
    fingerprint="f" * 64,
    space=SearchSpace.from_json({"lr": {"low": 1e-3, "high": 1e-1}, "epochs": 3}),
    seed=0,
    first_rung=4,
    data_options=DataOptions(image_size=64, max_broken=0.05, max_memory_bytes=2**30),
)


def test_a_spec_is_the_same_after_a_journey_as_json() -> None:
    assert StudySpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC


def test_a_spec_without_data_options_has_the_usual_ones() -> None:
    values = SPEC.to_json()
    del values["data_options"]
    assert StudySpec.from_json(values).data_options == DataOptions()


@pytest.mark.parametrize("part", ["hpo", "optuna", "spec"])
def test_a_study_of_another_version_is_refused(part: str) -> None:
    values = SPEC.to_json()
    if part == "spec":
        values["version"] = 99
    else:
        values["versions"][part] = "99"
    with pytest.raises(UsageError, match=f"made with {part} 99"):
        StudySpec.from_json(values)


@pytest.mark.parametrize(
    ("made_with", "here", "together"),
    [
        ("0.1.0", "0.1.7", True),
        ("0.1.7", "0.1.0", True),
        ("0.1.0", "0.2.0", False),
        ("1.1.0", "0.1.0", False),
        ("0.1.0", "0.10.0", False),
        ("0.1.0.dev1", "0.1.0", True),
        (3, 3, True),
        (3, 4, False),
        (None, "0.1.0", False),
    ],
)
def test_releases_that_differ_in_their_patch_number_work_together(
    made_with: object, here: object, together: bool
) -> None:
    assert can_work_together(made_with, here) is together


def test_a_study_made_by_a_patch_release_goes_on() -> None:
    values = SPEC.to_json()
    for name, version in SPEC.versions.items():
        values["versions"][name] = version.rpartition(".")[0] + ".99"
    assert StudySpec.from_json(values).space == SPEC.space


def test_a_spec_with_fields_of_a_later_release_is_refused_by_their_names() -> None:
    with pytest.raises(UsageError, match="which knows of haste: update hpo here"):
        StudySpec.from_json({**SPEC.to_json(), "haste": 3})


def test_a_precision_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown precision 'fp8'"):
        dataclasses.replace(SPEC, precision="fp8")
    assert SPEC.given_precision is None
    assert dataclasses.replace(SPEC, precision="bf16").given_precision == "bf16"


def test_only_given_options_are_compared() -> None:
    assert SPEC.differences({}) == []
    assert SPEC.differences({"data": "digits", "epochs": 3}) == []
    assert SPEC.differences({"data": "cifar10", "epochs": 4}) == [
        "data is 'digits' there and 'cifar10' here",
        "epochs is 3 there and 4 here",
    ]
    assert SPEC.differences({"objective": "macro_f1"}) == [
        "objective is 'accuracy' there and 'macro_f1' here"
    ]
    assert SPEC.differences({"image_size": 32, "max_broken": 0.05}) == [
        "image_size is 64 there and 32 here"
    ]


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 65, "a/b", "a\x00", "é", "<b>", "a;--"])
def test_a_hostile_study_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="a study's name has 1 to 64"):
        check_study_name(name)


@pytest.mark.parametrize("name", ["digits", "A.b_c-9", "x" * 64])
def test_a_plain_study_name_is_taken(name: str) -> None:
    assert check_study_name(name) == name


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UsageError, match="seed"):
        dataclasses.replace(SPEC, seed=-1)
