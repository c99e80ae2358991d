"""The doctor as a user calls it, and what it makes of sick studies."""

import json
from pathlib import Path

import pytest
from PIL import Image

from hpo.doctor import Finding, examine
from hpo.errors import ExitCode
from hpo.options import LaunchOptions
from storage.database import Database
from tests.parts import Hpo, free_port
from trainer.data.options import no_progress


def test_a_healthy_study_has_no_warning_and_a_forecast(hpo: Hpo) -> None:
    done = hpo.run("doctor", "--backbone", "smallcnn,resnet8", "--trials", "4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    by_subject = {each["about"]: each for each in found}
    assert {"database", "disk", "data", "classes", "space", "memory", "speed", "end"} <= set(
        by_subject
    )
    assert [each for each in found if each["level"] == "problem"] == []
    speeds = [each["text"] for each in found if each["about"] == "speed"]
    assert [text.partition(":")[0] for text in speeds] == ["smallcnn", "resnet8"]
    assert by_subject["end"]["text"].startswith("4 trials take about")
    assert "a round trip takes" in by_subject["database"]["text"]


def test_the_forecast_is_of_the_studys_pruner_limits_and_frozen_parts(
    hpo: Hpo, tmp_path: Path
) -> None:
    space = tmp_path / "space.toml"
    space.write_text(
        "[space]\nlr = { low = 1e-4, high = 1e-2, log = true }\nbatch_size = [32, 64]\n"
        'backbone = ["smallcnn", "resnet20"]\nepochs = 6\ntrainable = ["all", "head"]\n'
        "flip = false\ntranslate = 0\n"
    )
    options = ("--space", str(space), "--trials", "20", "--pruner", "none", "--max-params", "1e5")
    done = hpo.run("doctor", *options, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    small, smalls_head, large = [each for each in found if each["about"] == "speed"]
    assert small["text"].startswith("smallcnn, trainable = all: ")
    assert smalls_head["text"].startswith("smallcnn, trainable = head: ")
    assert "s for the features of all images" in smalls_head["text"]
    assert large["level"] == "warning"
    assert "above --max-params 100,000" in large["text"]
    (end,) = [each["text"] for each in found if each["about"] == "end"]
    # half of the trials are of the network that is too large, the others have six epochs each
    assert "(60 epochs in all)" in end


def test_the_forecast_is_of_the_workers_devices_and_precision_that_are_given(hpo: Hpo) -> None:
    options = ("--backbone", "smallcnn", "--workers", "1", "--devices", "cpu")
    done = hpo.run("doctor", *options, "--precision", "fp32", "--json")
    assert done.returncode == 0, done.stderr
    found = {each["about"]: each["text"] for each in json.loads(done.stdout)}
    assert "(fp32 channels_last)" in found["speed"]
    assert "with 1 at work" in found["speed"]
    assert "on 1 workers" in found["end"]
    refused = hpo.run("doctor", *options, "--precision", "fp8")
    assert refused.returncode == 2
    assert "unknown precision 'fp8'" in refused.stderr


def test_bf16_on_a_processor_that_emulates_it_is_a_problem_before_anything_is_timed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.device.available_devices", lambda: ["cpu"])
    monkeypatch.setattr("trainer.device.has_fast_bf16", lambda: False)
    options = LaunchOptions(backbones="smallcnn", precision="bf16")
    *_, last = examine(lambda: database, options, no_progress)
    assert (last.about, last.level, last.code) == ("speed", "problem", ExitCode.USAGE)
    assert "does not compute in bf16 itself" in last.text


def test_a_database_that_is_not_there_and_data_that_is_none_are_both_said(tmp_path: Path) -> None:
    hpo = Hpo(tmp_path, {"HPO_STORAGE": f"postgresql://nobody@127.0.0.1:{free_port()}/none"})
    done = hpo.run("doctor", "--data", str(tmp_path / "nothing"))
    assert done.returncode == ExitCode.DATABASE
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    assert len(problems) == 2
    assert "no such folder" in problems[1]
    assert "Traceback" not in done.stderr


def findings(database: Database, options: LaunchOptions) -> dict[str, Finding]:
    """Those of data and space, by what they are about; nothing is timed."""
    found: dict[str, Finding] = {}
    for finding in examine(lambda: database, options, no_progress):
        if finding.about in ("cpu", "speed"):
            break
        found[finding.about] = finding
    return found


def test_a_home_that_can_t_be_written_is_a_problem_and_no_free_disk(
    hpo: Hpo, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    there = Hpo(hpo.home, {**hpo.variables, "HPO_HOME": str(file / "home")})
    done = there.run("doctor", "--backbone", "smallcnn", "--trials", "4")
    assert done.returncode == ExitCode.USAGE
    (line,) = [line for line in done.stdout.splitlines() if " disk: " in line]
    assert line.startswith("problem")
    assert "set HPO_HOME" in line


def test_fields_that_can_not_matter_are_said(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "space.toml"
    file.write_text(
        '[space]\nlr = { low = 1e-3, high = 1e-3 }\nbackbone = ["smallcnn"]\n'
        "batch_size = 4096\nepochs = 2\npatience = 5\ntranslate = 9\nweight_decay = 0.0\n"
        'policy = ["none", "trivialaugment"]\npolicy_magnitude = [9, 20]\n'
    )
    said = [
        finding.text
        for finding in examine(
            lambda: database, LaunchOptions(space=file, workers="1"), no_progress
        )
        if finding.about == "space"
    ]
    assert said == [
        "policy_magnitude counts only with policy = randaugment",
        "lr can only be 0.001",
        "backbone has one choice, 'smallcnn'",
        "patience is never used up in 2 epochs",
        "translate of 9 can hide all of an image of 8 pixels",
        "a batch of 4096 is more than the 1150 images there are",
    ]


def test_broken_and_double_pictures_and_rare_classes_are_said(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "cache"))
    for name, count in (("cat", 30), ("dog", 300)):
        folder = tmp_path / "pets" / name
        folder.mkdir(parents=True)
        for index in range(count):
            noise = Image.effect_noise((40, 40), 90 + index % 7)
            noise.save(folder / f"{index:03d}.png")
    (tmp_path / "pets" / "cat" / "broken.png").write_bytes(b"no picture")
    twin = (tmp_path / "pets" / "dog" / "000.png").read_bytes()
    (tmp_path / "pets" / "dog" / "twin.png").write_bytes(twin)
    found = findings(database, LaunchOptions(data=str(tmp_path / "pets")))
    assert found["classes"].level == "warning"
    assert "'cat'" in found["classes"].text
    assert "broken.png" in found["pictures"].text
    assert found["duplicates"].text.startswith("2 pictures in 1 groups")


def test_an_unknown_backbone_is_a_problem_with_the_launchs_exit_code(database: Database) -> None:
    found = findings(database, LaunchOptions(backbones="resnet88"))
    assert (found["data"].level, found["data"].code) == ("problem", ExitCode.USAGE)
    assert "did you mean" in found["data"].text
