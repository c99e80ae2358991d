"""The command line: what it takes, and how it answers what can't be."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.parts import PASSWORD, Hpo, TcpPostgres, free_port

_COMMANDS = {
    "launch": {
        "--study", "--data", "--image-size", "--max-broken", "--max-memory", "--trials",
        "--epochs", "--workers", "--devices", "--space", "--backbone", "--module", "--seed",
        "--folds", "--objective", "--precision", "--timeout", "--weights", "--max-params",
        "--max-megabytes", "--max-latency-ms", "--sampler", "--pruner", "--try", "--from", "--set",
        "--detach", "--storage", "--json",
    },
    "worker": {"--study", "--device", "--storage"},
    "status": {"--study", "--watch", "--storage", "--json"},
    "trials": {"--study", "--storage", "--json"},
    "studies": {"--storage", "--json"},
    "stop": {"--study", "--storage"},
    "dashboard": {"--port", "--host", "--token-file", "--no-token", "--storage"},
    "best": {
        "--study", "--export", "--out", "--top-k", "--seeds", "--formats", "--workers", "--devices",
        "--storage", "--json",
    },
    "pretrain": {
        "--out", "--data", "--backbone", "--method", "--epochs", "--batch-size", "--lr", "--seed",
        "--image-size", "--device", "--json",
    },
    "doctor": {
        "--data", "--image-size", "--max-broken", "--trials", "--epochs", "--workers", "--devices",
        "--space", "--backbone", "--module", "--weights", "--folds", "--precision",
        "--max-params", "--max-megabytes", "--max-latency-ms", "--pruner", "--set", "--storage",
        "--json",
    },
    "replay": {"--trial", "--study", "--epochs", "--storage", "--json"},
    "space": {"--json"},
    "predict": {"--format", "--json"},
}  # fmt: skip


BY_ITS_NAME = "from hpo.__main__ import run; run()"


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line that a refusal is."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return lines[-1]


def run_without_database(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return Hpo(tmp_path).run(*args)


def test_the_commands_and_their_options_are_these(tmp_path: Path) -> None:
    listed = run_without_database(tmp_path, "--help").stdout
    assert set(re.findall(r"^  (\w+)  ", listed, re.MULTILINE)) == set(_COMMANDS)
    for command, options in _COMMANDS.items():
        shown = run_without_database(tmp_path, command, "--help").stdout
        assert set(re.findall(r"(--[a-z-]+)", shown)) - {"--help"} >= options, command
        listed_options = set(re.findall(r"^  (--[a-z-]+)", shown, re.MULTILINE))
        assert listed_options - {"--help"} == options, command


@pytest.mark.parametrize("start", [["-m", "hpo"], ["-m", "hpo.cli"], ["-c", BY_ITS_NAME]])
def test_the_help_calls_the_command_as_users_type_it(start: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", *start, "best", "--help"],
        capture_output=True,
        text=True,
        env=Hpo(tmp_path).environment,
    )
    assert done.stdout.startswith("Usage: hpo best "), done.stdout


def test_the_version_is_told(tmp_path: Path) -> None:
    assert re.fullmatch(r"hpo \d+\.\d+\.\d+\n", run_without_database(tmp_path, "--version").stdout)


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    heavy = {"torch", "optuna", "rich", "numpy", "sqlalchemy"}
    code = f"import hpo.cli, sys; print(sorted({heavy} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_help_loads_nothing_heavy_either() -> None:
    heavy = {"torch", "optuna", "rich", "numpy", "sqlalchemy"}
    code = (
        "import sys, hpo.cli\n"
        "try: hpo.cli.main(['launch', '--help'])\n"
        f"except SystemExit: print(sorted({heavy} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("[]\n")
    assert "--trials" in shown.stdout


@pytest.mark.parametrize(("command", "code"), [(["--version"], 0), (["nonsense"], 2)])
def test_a_process_ends_at_once_but_not_before_what_is_to_be_done_at_its_end(
    command: list[str], code: int
) -> None:
    program = (
        "import atexit, sys, hpo.cli\n"
        "class Late:\n"
        "    def __del__(self): print('taken apart')\n"
        "late = Late()\n"
        "atexit.register(print, 'at the end')\n"
        f"sys.argv = ['hpo', *{command}]\n"
        "hpo.cli.run()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout.endswith("at the end\n")
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_left_is_no_fault() -> None:
    command = [sys.executable, "-m", "hpo.cli", "space"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("trials", ["0", "-3", "many"])
def test_a_budget_that_is_none_is_refused(tmp_path: Path, trials: str) -> None:
    done = run_without_database(tmp_path, "launch", "--trials", trials)
    assert done.returncode == 2
    assert "--trials" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--backbone", "resnet88"), "unknown backbone 'resnet88', did you mean resnet"),
        (("--workers", "none"), "--workers must be"),
        (("--timeout", "soon"), "--timeout takes a time"),
        (("--study", "../x"), "a study's name has"),
        (("--seed", "-1"), "--seed must be >= 0"),
        (("--devices", "cuda:99"), "no device 'cuda:99'"),
        (("--space", "nothing.toml"), "can't read the space file"),
        (("--sampler", "cmaes"), "unknown sampler 'cmaes'"),
        (("--try", "lr=9"), "lr = 9 lies outside 0.0003 to 0.03"),
        (("--from", "nothing"), "--from: no study 'nothing' here: there is none"),
    ],
)
def test_an_option_that_can_not_be_is_a_usage_error(
    hpo: Hpo, args: tuple[str, ...], says: str
) -> None:
    assert says in refused(hpo.run("launch", *args), 2)


def test_unknown_data_is_refused(hpo: Hpo) -> None:
    assert "did you mean digits" in refused(hpo.run("launch", "--data", "digts"), 5)


def test_an_empty_folder_is_no_data(hpo: Hpo, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    assert "pictures" in refused(hpo.run("launch", "--data", str(folder)), 5)


def test_a_broken_space_file_is_a_usage_error(hpo: Hpo, tmp_path: Path) -> None:
    for content, says in {
        "[space]\nlr = {low = 1, high = 0}": "above high",
        "[space]\nnothing = 1": "unknown field",
        "[[": "no TOML",
    }.items():
        path = tmp_path / "space.toml"
        path.write_text(content)
        assert says in refused(hpo.run("launch", "--space", str(path)), 2)


def test_torchvision_which_imports_as_long_as_torch_waits_for_a_network_of_its_own() -> None:
    code = (
        "import sys, hpo.worker, hpo.launch, hpo.settle; from trainer.backbones import build;"
        "from trainer.config import TrainConfig as C; print('torchvision' in sys.modules);"
        "build(C(backbone='resnet8'), input_size=(1, 8, 8), num_classes=2);"
        "print('torchvision' in sys.modules);"
        "build(C(backbone='resnet18'), input_size=(1, 8, 8), num_classes=2);"
        "print('torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True"]


@pytest.mark.parametrize("command", ["status", "trials", "stop", "best", "launch"])
@pytest.mark.parametrize("url", ["mysql://root@localhost/x", "nonsense"])
def test_another_database_is_refused(tmp_path: Path, command: str, url: str) -> None:
    line = refused(run_without_database(tmp_path, command, "--storage", url), 3)
    assert "postgresql://" in line


def test_a_wrong_port_is_an_unreachable_database(tmp_path: Path) -> None:
    url = f"postgresql://me:{PASSWORD}@127.0.0.1:{free_port()}/x"
    done = run_without_database(tmp_path, "status", "--storage", url)
    assert "gives no answer" in refused(done, 3)
    assert PASSWORD not in done.stderr


def test_a_wrong_password_is_refused_and_shown_nowhere(
    tmp_path: Path, tcp_postgres: TcpPostgres
) -> None:
    wrong = "hunter2-" + PASSWORD[-8:]
    url = f"postgresql://postgres:{wrong}@127.0.0.1:{tcp_postgres.port}/postgres"
    done = run_without_database(tmp_path, "launch", "--storage", url)
    assert "password authentication failed" in refused(done, 3)
    assert wrong not in done.stdout + done.stderr
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or wrong.encode() not in file.read_bytes()


def test_commands_name_the_studies_there_are(hpo: Hpo) -> None:
    assert "which study" in refused(hpo.run("status"), 2)
    assert "no study 'nothing' here: there is none" in refused(
        hpo.run("trials", "--study", "nothing"), 2
    )


def test_a_study_without_a_finished_trial_has_no_best(hpo: Hpo) -> None:
    done = hpo.run("launch", "--trials", "3", "--timeout", "0.01s")
    assert done.returncode == 0
    assert "3 of 3 trials are left" in done.stdout
    assert "no trial to choose from" in refused(hpo.run("best"), 4)
    assert "no trial to choose from" in refused(hpo.run("best", "--export"), 4)


def test_stopping_a_study_that_has_ended_tells_nobody_to_go_on(hpo: Hpo) -> None:
    small = ("--trials", "1", "--epochs", "1", "--workers", "1", "--backbone", "smallcnn")
    assert hpo.run("launch", *small).returncode == 0
    done = hpo.run("stop")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "all 1 trials of digits have ended: no worker is left to stop\n"


def test_a_study_with_another_spec_is_refused_with_the_difference(hpo: Hpo) -> None:
    hpo.run("launch", "--trials", "3", "--epochs", "2", "--timeout", "0.01s")
    line = refused(hpo.run("launch", "--epochs", "4"), 2)
    assert "epochs is 2 there and 4 here" in line
    again = hpo.run("launch", "--trials", "3", "--timeout", "0.01s")
    assert again.returncode == 0, again.stderr


def test_json_is_one_document(hpo: Hpo) -> None:
    hpo.run("launch", "--trials", "3", "--timeout", "0.01s")
    assert json.loads(hpo.run("status", "--json").stdout)["budget"] == 3
    assert json.loads(hpo.run("trials", "--json").stdout) == []
    assert [row["study"] for row in json.loads(hpo.run("studies", "--json").stdout)] == ["digits"]


def test_predict_refuses_a_folder_that_is_no_export(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    done = run_without_database(tmp_path, "predict", str(tmp_path), str(tmp_path / "x.png"))
    refused(done, 2)
