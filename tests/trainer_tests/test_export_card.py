"""The model card says what is known, in Markdown that no name of the user's can break."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from trainer.config import TrainConfig
from trainer.export.card import model_card
from trainer.export.card_text import safe
from trainer.export.curves import curves_png
from trainer.export.tested import final_metrics

HOSTILE = (
    "<script>alert(1)</script>",
    "a | b\n| --- |",
    "[click](javascript:alert(1))",
    "`` ` ``` # * _x_ ~~",
    "![](x.png) www.example.org \u202e",
)


def a_card(class_names: tuple[str, ...] = HOSTILE, **about: Any) -> str:
    num_classes = len(class_names)
    labels = torch.arange(40) % num_classes
    logits = torch.nn.functional.one_hot(labels, num_classes).float()
    tested = final_metrics(logits, labels, class_names)
    counts = [8] * num_classes
    entry = {"file": "model.onnx", "bytes": 1234567, "max_abs_diff": 1e-6, "accuracy": 1.0}
    entry |= {"latency_ms_1": 0.5, "latency_ms_32": 7.25, "num_threads": 3, "method": "made"}
    manifest = {
        "input_size": [3, 9, 12],
        "class_names": list(class_names),
        "config": TrainConfig().to_dict(),
        "data": {
            "source": HOSTILE[0],
            "fingerprint": "0" * 64,
            "images": {"train": counts, "val": [0] * num_classes, "test": counts},
        },
        "tolerance": 0.01,
        "formats": {"onnx": {**entry, "passed_over": {}}},
        "refused": {"onnx-int8": "its accuracy is 0.1 | <b>"},
        "safe_to_load": {"onnx": "yes"},
        **about,
    }
    return model_card(manifest, tested, pictures=["confusion_matrix.png"])


def test_names_of_the_user_s_are_no_markup() -> None:
    card = a_card()
    for part in ("<script>", "<b>", "](javascript", "![](x", "`` `", "_x_", "www.", "\u202e"):
        assert part not in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    widths = {line.count(" | ") for line in rows if "script" in line or "click" in line}
    assert widths == {3, 4}, "each class has its row in two tables, and no further cells"


def test_ordinary_names_stay_readable() -> None:
    assert safe("T-shirt 2") == "T-shirt 2"
    assert safe("猫 café") == "猫 café"
    assert safe("a\n\tb") == "a b"
    assert safe("ab_c") == "ab&#95;c"
    assert len(safe("x" * 500)) == 80 + len("&#8230;") - 1


def test_the_search_and_its_candidates_are_told() -> None:
    card = a_card(
        trial={"number": 7, "value": 0.98, "params": {"lr": 1e-3}},
        candidates=[
            {"number": 7, "search_value": 0.98, "mean": 0.96, "std": 0.01, "values": [0.95, 0.97]},
            {"number": 3, "search_value": 0.97, "mean": 0.965, "std": 0.0, "values": [0.965]},
        ],
        search={
            "num_trials": 50,
            "complete": 12,
            "pruned": 37,
            "failed": 1,
            "num_epochs": 300.25,
            "seconds": 120.0,
            "space": {
                "lr": {"low": 1e-5, "high": 1e-2, "log": True},
                "backbone": ["resnet8", "resnet20"],
                "epochs": 10,
            },
        },
        averaging={"chosen": "ema", "tried": {"ema": {"mean": 0.97, "values": [0.96, 0.98]}}},
        test_openings=2,
    )
    for part in (
        "50 trials (12 complete, 37 pruned, 1 failed)",
        "- lr: 1e-05 to 0.01, logarithmic",
        "- backbone: one of resnet8, resnet20",
        "- epochs: always 10",
        "| 7 | 0.9800 | 0.9600 | 0.0100 | 0.9500, 0.9700 |",
        "The winner's value in the search was 0.0200 too high.",
        "chosen: ema",
        "| ema | 0.9700 | 0.9600, 0.9800 |",
        "opened 2 times: choosing by their result makes it too good",
    ):
        assert part in card


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("accuracy", "accuracy"),
        ("balanced_accuracy", "balanced accuracy"),
        ("macro_f1", "macro f1"),
    ],
)
def test_values_of_the_search_are_called_by_its_objective(objective: str, words: str) -> None:
    trial = {"number": 0, "value": 0.5, "params": {}}
    run = {"number": 0, "search_value": 0.5, "mean": 0.4, "std": 0.0, "values": [0.4]}
    card = a_card(trial=trial, objective=objective, candidates=[run])
    assert f"Best: trial 0, validation {words} 0.5000 in the search" in card
    assert f"with fresh seeds; validation {words}:" in card
    assert "and 1.0000 on the test images" in a_card(trial=trial, objective=objective)


def test_what_is_not_known_is_said() -> None:
    card = a_card(trial={"number": 0, "value": 0.98, "params": {}})
    assert "How the model was searched for isn't recorded here." in card
    assert "No candidate was trained again." in card
    assert "Training curves weren't handed over." in card
    assert "TensorRT was not run" in card
    assert "- no onnx-int8: its accuracy is" in card


def test_each_file_stands_in_the_table_with_what_was_measured() -> None:
    card = a_card()
    row = "| onnx | `model.onnx` | 1,234,567 | 1.0e-06 | 1.0000 | 0.5 | 7.25 | 3 | made |"
    assert row in card.splitlines()
    assert "safetensors and ONNX are safe, .pt2 and TorchScript are not" in card


@pytest.mark.parametrize("label", ["plain", "_hidden (x)", "$\\frac{1}$ (training loss)", "猫", ""])
def test_curves_with_any_label_can_be_drawn(label: str) -> None:
    points = [(1.0, 0.5), (2.0, float("nan")), (3.0, float("inf")), (4.0, 0.7)]
    picture = curves_png({label: points, "seed 1 (training loss)": [], "b (training loss)": points})
    assert picture.startswith(b"\x89PNG")


WITHOUT_A_HOME = """
import logging
logging.basicConfig(level=logging.WARNING)
from trainer.export.curves import curves_png
curves_png({"a (value)": [(0.0, 1.0)]})
"""


def test_a_user_without_a_home_hears_nothing_of_where_fonts_are_listed() -> None:
    ours = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_HOME],
        capture_output=True,
        text=True,
        env={**ours, "HOME": "/proc/nobody"},  # a folder that root can't make either
    )
    assert (done.returncode, done.stderr) == (0, "")
