"""Names of strangers are shown, and never obeyed by a terminal."""

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.terminal import escaped, say, say_lines, unguarded
from storage.database import Database
from tests.parts import Hpo, make_study

EVIL = "a\x1b[2J\x9b31m\x07\r\n\x85\u2028\u202eb\x7f\x00c\t\u200bd"
WRITTEN = r"a\x1b[2J\x9b31m\x07\r\n\x85\u2028\u202eb\x7f\x00c\t\u200bd"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("plain words, ~", "plain words, ~"),
        ("Füße, 猫, 🐈, é, \u00a0, نم\u200cک, 👩\u200d🔬", None),
        (EVIL, WRITTEN),
        (os.fsdecode(b"caf\xe9\xff.png"), r"caf\xe9\xff.png"),
        ("\ud800", r"\ud800"),
        ("\U000e0041\ufeff\u2066", r"\U000e0041\ufeff\u2066"),
        (r"C:\new", r"C:\new"),
        ("", ""),
    ],
)
def test_what_a_terminal_obeys_is_written_as_python_does(words: str, shown: str | None) -> None:
    assert escaped(words) == (words if shown is None else shown)
    assert escaped(escaped(words)) == escaped(words)


def test_every_control_character_is_escaped() -> None:
    for code in [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]:
        shown = escaped(chr(code))
        assert shown.startswith("\\")
        assert shown.isascii()
        assert shown.isprintable()


def test_a_line_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    say_lines(["one\ntwo", "three"], err=True)
    captured = capsys.readouterr()
    assert captured.out == WRITTEN + "\n"
    assert captured.err == "one\\ntwo\nthree\n"


def test_words_go_nowhere_where_there_is_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    say("words")


GUARDED = """
import logging, os, sys, warnings
from hpo.terminal import LineFormatter, guard_output
evil = os.environ["EVIL"]
guard_output()
guard_output()
{0}
"""


def run_guarded(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    checkout = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", GUARDED.format(code)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "EVIL": "a\x1b[2J\x9b\u202eb", "PYTHONPATH": checkout, **variables},
    )


SHOWN = r"a\x1b[2J\x9b\u202eb"


@pytest.mark.parametrize(
    "code",
    [
        "print(evil)",
        "print(evil, file=sys.stderr)",
        "sys.stdout.writelines([evil, chr(10)])",
        "import typer; typer.echo(evil, color=True)",
        "warnings.warn(evil)",
        "logging.warning(evil)",
        "raise ValueError(evil)",
        "from hpo.cli import main; main(['status', '--' + evil])",
        "from hpo.cli import main; main([evil])",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_whatever_writes_writes_past_the_guard(code: str, encoding: str) -> None:
    done = run_guarded(code, PYTHONIOENCODING=encoding)
    everything = done.stdout + done.stderr
    assert SHOWN in everything
    assert everything.replace("\n", "").isprintable()


def test_a_forged_line_of_the_log_is_part_of_its_own() -> None:
    done = run_guarded(
        "handler = logging.StreamHandler()\n"
        "handler.setFormatter(LineFormatter('%(levelname)s %(message)s'))\n"
        "logging.basicConfig(handlers=[handler])\n"
        "try: raise ValueError\n"
        "except ValueError: logging.exception('one%sERROR two', chr(10))"
    )
    first, *rest = done.stderr.splitlines()
    assert first == r"ERROR one\nERROR two"
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "ValueError"


def test_progress_bars_of_libraries_begin_their_line_anew() -> None:
    done = run_guarded("sys.stderr.write(chr(13) + '50 %'); sys.stderr.write('x' + chr(13) + 'y')")
    assert done.stderr == "\r50 %x\\ry" or done.stderr == "\n50 %x\\ry"  # text mode reads \r as \n


def test_the_guard_is_a_text_stream_on_the_same_descriptor() -> None:
    done = run_guarded(
        "assert sys.stdout.fileno() == 1 and not sys.stdout.isatty() and sys.stdout.writable()\n"
        "assert sys.stdout.encoding == 'utf-8' and not hasattr(sys.stdout, 'buffer')\n"
        "import subprocess; sys.stdout.flush()\n"
        "subprocess.run(['echo', 'child'], stdout=sys.stdout, check=True)\n",
        PYTHONIOENCODING="utf-8",
    )
    assert (done.stdout, done.stderr) == ("child\n", "")


def test_what_is_not_guarded_is_left_as_it_is() -> None:
    stream = io.StringIO()
    assert unguarded(stream) is stream


def test_the_last_line_of_a_worker_s_log_is_part_of_the_one_line_of_an_error(
    tmp_path: Path,
) -> None:
    log = tmp_path / "worker-0.log"
    log.write_bytes(b"first\n" + EVIL.partition("\r")[0].encode() + b"\xff\n\n")
    done = run_guarded(
        "from pathlib import Path\n"
        "from hpo import cli\n"
        "from hpo.errors import WorkersDie\n"
        "from hpo.watch import last_line\n"
        "def app(arguments, prog_name):\n"
        "    raise WorkersDie(f'they end: {last_line(Path(arguments[0]))}')\n"
        "cli.app = app\n"
        f"cli.main([{str(log)!r}])"
    )
    assert done.returncode == 1
    assert done.stderr == r"hpo: they end: a\x1b[2J\x9b31m\x07" + "\ufffd\n"


@pytest.fixture
def evil_hpo(hpo: Hpo, database: Database) -> Hpo:
    """The commands on a database in which a stranger has written."""
    study_id = make_study(database, name="study").study_id
    evil = EVIL.replace("\x00", "")
    space = {"name": "CategoricalDistribution", "attributes": {"choices": [evil]}}
    given = {
        "study": study_id,
        "evil": evil,
        "reason": json.dumps(evil),
        "spec": json.dumps({"space": {"epochs": 2}}),
        "space": json.dumps(space),
    }
    with database.engine.begin() as connection:
        for statement in (
            "UPDATE studies SET study_name = %(evil)s",
            "UPDATE hpo_studies SET spec = spec || CAST(%(spec)s AS jsonb)",
            "INSERT INTO trials (number, study_id, state) VALUES (0, %(study)s, 'FAIL')",
            "INSERT INTO trial_user_attributes (trial_id, key, value_json) "
            "SELECT trial_id, 'reason', %(reason)s FROM trials",
            "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) "
            "SELECT trial_id, %(evil)s, 0, %(space)s FROM trials",
        ):
            connection.exec_driver_sql(statement, given)
    return hpo


@pytest.mark.parametrize("command", ["trials", "status", "studies", "stop", "best"])
def test_a_hostile_database_is_shown_in_lines_of_ours(evil_hpo: Hpo, command: str) -> None:
    done = evil_hpo.run(command)
    text = done.stdout + done.stderr
    assert r"\x1b[2J" in text
    assert text.replace("\n", "").isprintable()
    assert len(text.splitlines()) == 1
    assert done.returncode == (4 if command == "best" else 0)


@pytest.mark.parametrize("command", ["trials", "studies", "status"])
def test_json_holds_what_is_there(evil_hpo: Hpo, command: str) -> None:
    done = evil_hpo.run(command, "--json")
    assert done.stdout.isascii()
    assert done.stdout.replace("\n", "").isprintable()
    found = json.loads(done.stdout)
    shown = json.dumps(found, ensure_ascii=False)
    assert "\u202e" in shown


def test_a_study_that_is_not_there_is_named_in_one_line(evil_hpo: Hpo) -> None:
    done = evil_hpo.run("status", "--study", "x\x1b[2J\ny")
    assert done.returncode == 2
    assert done.stderr.startswith(r"hpo: no study 'x\x1b[2J\ny' here: there is a\x1b[2J")
    assert done.stderr.count("\n") == 1
    assert done.stderr.rstrip("\n").isprintable()


def test_the_live_view_on_a_terminal_shows_escapes_as_words(evil_hpo: Hpo) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "hpo.cli", "status", "--watch"],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**evil_hpo.environment, "TERM": "xterm", "COLUMNS": "200"},
        cwd=evil_hpo.home,
    ) as process:
        os.close(theirs)
        shown = b""
        while b"trials" not in shown:
            shown += os.read(ours, 65536)
        process.kill()
    os.close(ours)
    assert rb"a\x1b[2J\x9b31m\x07" in shown
    assert b"\x1b[2J" not in shown
    assert "\u202e".encode() not in shown
