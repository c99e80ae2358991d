"""Label Studio's exports: found pictures, counted tasks, and what can't be used in one line."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.config import DataError
from trainer.data.options import DataOptions
from trainer.data.registry import load


def _task(number: int, picture: str, *labels: str, **words: Any) -> dict[str, Any]:
    """A task as Label Studio 1.x exports it, with one annotation."""
    region = {
        "id": f"r{number}",
        "type": "choices",
        "from_name": "choice",
        "to_name": "image",
        "origin": "manual",
        "value": {"choices": list(labels)},
    }
    annotation = {
        "id": 10 + number,
        "completed_by": 1,
        "was_cancelled": False,
        "ground_truth": False,
        "result": [region] if labels else [],
    }
    return {
        "id": number,
        "annotations": [annotation],
        "predictions": [],
        "data": {"image": picture},
        **words,
    }


@pytest.fixture
def tasks(tmp_path: Path) -> list[dict[str, Any]]:
    """Forty pictures beside the export, uploaded ones."""
    folder = tmp_path / "images"
    folder.mkdir()
    values = np.random.default_rng(0)
    for number in range(40):
        pixels = values.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"0a1b2c3d-кот {number}.png")
    return [
        _task(n, f"/data/upload/1/0a1b2c3d-кот%20{n}.png", ("cat", "dog")[n % 2]) for n in range(40)
    ]


def _export(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "project-1.json"
    path.write_text(json.dumps(content))
    return path


def _refusal(export: Path, options: DataOptions | None = None) -> str:
    with pytest.raises(DataError) as caught:
        load(str(export), seed=0, options=options or DataOptions())
    message = str(caught.value)
    assert message.isprintable(), "one line"
    return message


def test_an_exports_choices_are_the_labels(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    data = load(str(_export(tmp_path, tasks)), seed=0)
    assert data.name == "project-1"
    assert data.class_names == ("cat", "dog")
    assert [len(data.train), len(data.val), len(data.open_test())] == [26, 6, 8]
    assert dict(data.findings.class_counts) == {"cat": 20, "dog": 20}


@pytest.mark.parametrize(
    "reference",
    [
        "images/0a1b2c3d-кот 0.png",
        "0a1b2c3d-кот 0.png",
        "/data/local-files/?d=images%2F0a1b2c3d-%D0%BA%D0%BE%D1%82%200.png",
        "s3://bucket/deep/images/0a1b2c3d-кот 0.png",
        "https://somewhere/x/images/0a1b2c3d-%D0%BA%D0%BE%D1%82%200.png?token=x",
        "../../images/0a1b2c3d-кот 0.png",
        "/data/upload/1/ffffffff-plain.png",
    ],
)
def test_pictures_are_found_by_the_end_of_their_reference(
    tmp_path: Path, tasks: list[dict[str, Any]], reference: str
) -> None:
    if "plain" in reference:
        (tmp_path / "images" / "0a1b2c3d-кот 0.png").rename(tmp_path / "images" / "plain.png")
    tasks[0]["data"] = {"text": "a cat", "photo": reference}
    assert load(str(_export(tmp_path, tasks)), seed=0).findings.unusable == ()


def test_tasks_without_a_label_are_passed_over_and_counted(
    tmp_path: Path, tasks: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    tasks += [_task(50 + n, "/data/upload/1/none.png") for n in range(3)]
    skipped = _task(60, "/data/upload/1/none.png", "cat")
    skipped["annotations"][0]["was_cancelled"] = True
    with caplog.at_level(logging.WARNING):
        data = load(str(_export(tmp_path, [*tasks, skipped])), seed=0)
    assert data.findings.num_pictures == 40
    assert "4 tasks without a label passed over" in caplog.text


def test_several_labels_for_a_picture_make_it_unusable(
    tmp_path: Path, tasks: list[dict[str, Any]]
) -> None:
    tasks[0]["annotations"][0]["result"][0]["value"]["choices"] = ["dog", "cat"]
    tasks[1]["annotations"].append(_task(1, "", "cat")["annotations"][0])
    tasks[2]["annotations"].append(tasks[2]["annotations"][0])  # two people agree
    export = _export(tmp_path, tasks)
    message = _refusal(export)
    assert "2 of 40 pictures can't be used" in message
    assert "task 0 (several labels: cat, dog)" in message
    data = load(str(export), seed=0, options=DataOptions(max_broken=0.1))
    assert len(data.findings.unusable) == 2


def test_a_picture_that_is_not_there_is_named(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    tasks[3]["data"]["image"] = "/data/upload/1/gone\n.png"
    assert "task 3 (no file for '/data/upload/1/gone\\n.png')" in _refusal(_export(tmp_path, tasks))
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert "put the pictures beside the export" in _refusal(_export(tmp_path, tasks))


@pytest.mark.parametrize(
    "content",
    [
        {"tasks": []},
        [1, 2],
        [{"id": 1, "image": "/data/upload/1/x.png", "choice": "cat"}],  # JSON-MIN
        [{"data": "x", "annotations": []}],
    ],
)
def test_what_is_no_export_of_tasks_is_one_line(tmp_path: Path, content: Any) -> None:
    assert "export as JSON there, not as JSON-MIN" in _refusal(_export(tmp_path, content))


def test_what_is_no_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff{")
    assert "x.json: no JSON" in _refusal(tmp_path / "x.json")


@pytest.mark.parametrize("annotations", [None, 3, [None], [{}], [{"result": [3]}]])
def test_a_task_that_label_studio_would_not_write_is_named(
    tmp_path: Path, tasks: list[dict[str, Any]], annotations: Any
) -> None:
    tasks[7]["annotations"] = annotations
    assert "task 7: not as Label Studio exports it" in _refusal(_export(tmp_path, tasks))


def test_answers_to_several_questions_are_refused(
    tmp_path: Path, tasks: list[dict[str, Any]]
) -> None:
    other = json.loads(json.dumps(tasks[0]["annotations"][0]["result"][0]))
    other["from_name"] = "weather"
    tasks[0]["annotations"][0]["result"].append(other)
    assert "several questions (choice, weather)" in _refusal(_export(tmp_path, tasks))


def test_an_export_without_any_choice_is_refused(
    tmp_path: Path, tasks: list[dict[str, Any]]
) -> None:
    for task in tasks:
        task["annotations"][0]["result"][0]["type"] = "rectanglelabels"
    assert "none of its 40 tasks has a label" in _refusal(_export(tmp_path, tasks))


def test_one_picture_in_two_tasks_with_two_labels_is_refused(
    tmp_path: Path, tasks: list[dict[str, Any]]
) -> None:
    tasks.append(_task(99, tasks[0]["data"]["image"], "dog"))
    assert "has another label in another task" in _refusal(_export(tmp_path, tasks))


def test_one_label_for_all_is_one_class_only(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    assert "one class only (cat)" in _refusal(_export(tmp_path, tasks[::2]))


def test_a_task_without_a_picture_is_named(tmp_path: Path, tasks: list[dict[str, Any]]) -> None:
    tasks[5]["data"] = {"text": "words"}
    assert "task 5: which of text is the picture?" in _refusal(_export(tmp_path, tasks))
