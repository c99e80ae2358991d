import os
from pathlib import Path
from typing import Any

import optuna
import pytest

from hpo.points import fitting
from hpo.space import Range, SearchSpace, default_space, read_space
from trainer.config import ConfigError, TrainConfig


def space_file(folder: Path, content: str) -> Path:
    path = folder / "space.toml"
    path.write_text(content)
    return path


def test_a_space_file_gives_ranges_choices_and_fixed_values(tmp_path: Path) -> None:
    space = read_space(
        space_file(
            tmp_path,
            "[space]\nlr = { low = 1e-5, high = 1e-2, log = true }\n"
            'backbone = ["resnet8", "resnet20"]\nepochs = 10\n',
        )
    )
    assert space.fields["lr"] == Range(low=1e-5, high=1e-2, log=True)
    assert space.searched == ("lr", "backbone")
    assert SearchSpace.from_json(space.to_json()) == space


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[space]\nlr = {low = 1, high = 0.1}", "low = 1 is above high = 0.1"),
        ("[space]\nlr = {low = 0, high = 1, log = true}", "above 0"),
        ("[space]\nlr = {low = 0, high = 1}", "lr must be > 0"),
        ("[space]\nlr = {lo = 0, high = 1}", "a range is"),
        ("[space]\nlr = {low = 'a', high = 1}", "must be numbers"),
        ("[space]\nweightdecay = 1", "did you mean weight_decay?"),
        ("[space]\nbatch_size = [32, 1]", "batch_size must be >= 2"),
        ("[space]\nbatch_size = [32, 32]", "stands twice"),
        ("[space]\nbackbone = []", "can't be empty"),
        ("[space]\nbackbone = {low = 1, high = 2}", "backbone must be a word"),
        ("[space]\nepochs = [5, 10]", "epochs can't be searched"),
        ("[space]\noptimizer = ['sgd', 'lion']", "unknown optimizer 'lion'"),
        ("[space]\nmodule = 3", "module holds arguments by name"),
        ("[space]\nmodule.width = {low = 8, high = 4}", "module.width: low = 8 is above high"),
        ("[space]\nmodule.when = 2020-01-01", "module.when must be true, false, a number"),
        ("[space]\noptimizer = true", "unknown optimizer True"),
        ("[space]\noptimizer = [1, 2.5]", "unknown optimizer 1"),
        ("[space]\nlr = [[0.1], [0.2]]", "lr must be true, false, a number"),
        ("[space]\nlr = [{a = 1}, {a = 2}]", "lr must be true, false, a number"),
        ("[space]\nlr = 0x" + "f" * 300, "lr: a whole number has 64 bits, got one of 1200"),
        ("[space]\nseed = {low = 1, high = 0x" + "f" * 300 + "}", "a whole number has 64 bits"),
        ("[space]\nlr = " + "9" * 5000, "is no TOML"),
        ("[space]\nlr = " + "[" * 100_000, "nested too deep"),
        ("[space]", "no table [space]"),
        ("", "no table [space]"),
        ("[space", "is no TOML"),
        ("\x00", "is no TOML"),
    ],
)
def test_a_bad_space_file_is_refused_in_one_line(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_space(space_file(tmp_path, content))
    assert says in str(refused.value)
    assert "space.toml" in str(refused.value)


def test_a_space_file_may_begin_with_a_byte_order_mark_and_must_be_utf_8(tmp_path: Path) -> None:
    path, text = tmp_path / "space.toml", "[space]\nlr = 0.25\n"
    path.write_bytes(text.encode("utf-8-sig"))
    assert read_space(path).fields == {"lr": 0.25}
    for encoding in ("utf-16", "utf-16-le", "latin-1"):
        path.write_bytes((text + "# \N{LATIN SMALL LETTER E WITH ACUTE}").encode(encoding))
        with pytest.raises(ConfigError, match=r"space\.toml (is no text in UTF-8|is no TOML)"):
            read_space(path)


def test_what_is_no_file_with_an_end_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    for name, said in {
        "pipe": "no regular file",
        "endless": "no regular file",
        "huge": "more than 67,108,864 bytes",
        ".": "Is a directory",
    }.items():
        with pytest.raises(ConfigError, match=f"can't read the space file .*{said}"):
            read_space(tmp_path / name)


def test_a_missing_space_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't read the space file .*: No such file"):
        read_space(tmp_path / "nothing.toml")


def test_a_trial_gets_a_config_within_the_space() -> None:
    space = SearchSpace.from_json(
        {
            "lr": {"low": 1e-4, "high": 1e-2, "log": True},
            "batch_size": {"low": 16, "high": 64},
            "backbone": ["smallcnn", "resnet8"],
            "cutout": 3,
        }
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        config = space.suggest(study.ask(), seed=9)
        assert 1e-4 <= config.lr <= 1e-2
        assert 16 <= config.batch_size <= 64
        assert config.backbone in ("smallcnn", "resnet8")
        assert (config.cutout, config.seed) == (3, 9)


@pytest.mark.parametrize("num_cores", [None, 2, 64])
@pytest.mark.parametrize("input_size", [(1, 8, 8), (3, 32, 32), (3, 224, 224)])
@pytest.mark.parametrize("num_train", [500, 54_000, 2_000_000])
def test_the_default_space_always_searches_the_three_that_matter(
    num_cores: int | None, input_size: Any, num_train: int
) -> None:
    space = default_space(
        input_size=input_size, num_train=num_train, flips=True, num_cores=num_cores
    )
    assert {"lr", "batch_size", "backbone"} <= set(space.searched)
    assert space.fields["epochs"] >= 5
    assert SearchSpace.from_json(space.to_json()) == space


@pytest.mark.parametrize(
    "fields",
    [
        {"balance": ("none", "smote")},
        {"balance": "smote", "trainable": ("head", "all")},
        {"balance": "smote", "trainable": "head", "cutout": Range(low=0, high=4)},
    ],
)
def test_smote_beside_what_leaves_it_no_features_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="balance smote needs features"):
        SearchSpace(fields=fields).check_together()


def test_smote_beside_a_head_alone_is_taken() -> None:
    fields = {"balance": ("loss", "smote"), "trainable": "head", "flip": False}
    SearchSpace(fields=fields).check_together()
    SearchSpace(fields={"flip": True, "balance": "loss"}).check_together()


def test_arguments_of_a_module_are_searched_as_fields_by_themselves(tmp_path: Path) -> None:
    space = read_space(
        space_file(
            tmp_path,
            "[space.module]\nhidden = [64, 128]\ndepth = { low = 1, high = 4 }\n"
            "rate = { low = 0.0, high = 1 }\nbias = true\n",
        )
    )
    assert space.searched == ("module.hidden", "module.depth", "module.rate")
    assert SearchSpace.from_json(space.to_json()) == space
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(10):
        trial = study.ask()
        config = space.suggest(trial, seed=1)
        assert config.module == {
            name.removeprefix("module."): value
            for name, value in {**trial.params, "module.bias": True}.items()
        }
        assert [type(config.module[name]) for name in ("hidden", "depth", "rate")] == [
            int, int, float,
        ]  # fmt: skip
        assert fitting(space, config.to_dict()) == trial.params
        assert TrainConfig.from_dict(config.to_dict()) == config
