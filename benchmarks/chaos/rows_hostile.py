"""Row 26: hostile names wherever a command takes one, and hostile files among checkpoints."""

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy
import torch
from PIL import Image

from benchmarks.chaos.audit import Finding, audit
from benchmarks.chaos.faults import Fault, FaultPlan
from benchmarks.chaos.stage import STUDY, Arena, Command, Overdue, Stage
from tests.parts import PASSWORD

SQL = "x'; DROP TABLE trials; --"
HTML = "<img src=x onerror=alert(1)>"
NAMES = {
    "a path": "../../escaped",
    "600 characters": "n" * 600,
    "HTML": HTML,
    "SQL": SQL,
    "braces": "{0}{password}%s%(x)s",
    "a line break": "two\nlines",
    "an option": "-rf /",
}
CLASSES = (HTML.replace("/", ""), SQL, "{0}%s", "..x", "c" * 200, "-rf")
"""Names that a file system allows."""
MAGIC = b"hpo checkpoint 1\n"


def hostile(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 26."""
    with arena.stage() as stage:
        yield _names(stage)
        yield _storage_urls(stage)
    with arena.stage() as stage:
        yield _classes(stage)
    for what, forge in FORGERIES.items():
        with arena.stage(_DIES) as stage:
            yield _checkpoint(stage, what, forge)


def _names(stage: Stage) -> Finding:
    started = time.monotonic()
    finding = Finding(row="26", done=f"{len(NAMES)} names as --study, --data, --out, --space")
    if stage.launch(trials=1, workers=1, epochs=1).wait(240) != 0:
        raise Overdue("the study to ask about has not ended well")
    tables = _tables(stage)
    before = _files(stage)
    for what, name in NAMES.items():
        space = stage.home / "space.toml"
        space.write_text(f"[space]\nbackbone = [{_toml(name)}, {_toml(chr(0))}]\n")
        _refused(finding, f"{what} as --study", stage.start("launch", f"--study={name}"))
        _refused(finding, f"{what} as the study of status",
                 stage.start("status", f"--study={name}"))  # fmt: skip
        _refused(finding, f"{what} as --data", stage.start("launch", f"--data={name}"))
        _refused(finding, f"{what} as a backbone",
                 stage.start("launch", "--study", "other", "--space", str(space)))  # fmt: skip
        space.unlink()
    long_out = stage.start("best", "--export", "--out", NAMES["600 characters"])
    _refused(finding, "600 characters as --out", long_out)
    finding.check(_tables(stage) == tables, "the tables have changed")
    _nothing_made(finding, _files(stage) - before)
    finding.seconds = time.monotonic() - started
    return finding


def _storage_urls(stage: Stage) -> Finding:
    started = time.monotonic()
    url = sqlalchemy.make_url(stage.url)
    urls = {
        "a wrong password with braces": url.set(password="wr{0}ng%s"),
        "SQL as the database": url.set(database=SQL),
        "600 characters as the database": url.set(database="d" * 600),
        "HTML as the user": url.set(username=HTML),
        "braces as the host": url.set(host="{0}{password}"),
    }
    texts = {what: each.render_as_string(hide_password=False) for what, each in urls.items()}
    texts["NUL in the database"] = f"{stage.url}%00evil"
    texts["a file"] = "sqlite:///../../escaped.db"
    texts["no URL"] = SQL
    finding = Finding(row="26", done=f"{len(texts)} hostile storage URLs")
    before = _files(stage)
    for what, text in texts.items():
        refused = stage.start("studies", HPO_STORAGE=text)
        _refused(finding, what, refused)
        finding.check("wr{0}ng" not in refused.stderr, f"{what}: the password is in the message")
    _nothing_made(finding, _files(stage) - before)
    finding.seconds = time.monotonic() - started
    return finding


def _classes(stage: Stage) -> Finding:
    """A folder of pictures, from the search to the answers of its export."""
    started = time.monotonic()
    finding = Finding(row="26", done="class folders, a data folder and --out with hostile names")
    data = stage.home / "{0}'; DROP TABLE studies; --<b>"
    chance = np.random.default_rng(0)
    for index, name in enumerate(CLASSES):
        folder = data / name
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = chance.integers(40 * index, 40 * index + 40, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    outside = _files(stage)
    code = stage.launch("--data", str(data), "--study", "s", trials=1, workers=1, epochs=1).wait(
        240
    )
    finding.check(code == 0, f"launch ended with {code}")
    out = stage.home / SQL
    best = stage.start("best", "--export", "--out", str(out))
    code = best.wait(240)
    finding.check(code == 0, f"best --export ended with {code}: {best.stderr[-200:]}")
    picture = data / CLASSES[0] / "0.png"
    answer = stage.start("predict", str(out), str(picture), "--json")
    code = answer.wait(240)
    named = code == 0 and json.loads(answer.stdout)[0]["class"] in CLASSES
    finding.check(code == 0 and named, f"predict ended with {code}: {answer.stdout[-200:]}")
    (tables,) = stage.query("SELECT count(*) FROM trials")
    finding.check(tables == (1,), f"{tables} trials")
    made = _files(stage) - outside
    _nothing_made(finding, {path for path in made if stage.home not in path.parents})
    finding.seconds = time.monotonic() - started
    return finding


def _nothing_made(finding: Finding, made: set[Path]) -> None:
    """But what the harness itself writes."""
    strange = {path for path in made if path.suffix not in (".txt", ".jsonl")}
    finding.check(not strange, f"files were made: {sorted(map(str, strange))[:3]}")


def _refused(finding: Finding, what: str, command: Command) -> None:
    """With one line, whatever it was given; nothing trained."""
    code = command.wait(240)
    said = command.stderr.strip().splitlines()
    finding.check(code in (2, 3, 5), f"{what}: ended with {code}: {said[-1:]}")
    lines = [line for line in said if "waiting for the database" not in line]
    usage = any(line.startswith("Usage:") for line in lines)  # the command line's own refusal
    finding.check(len(lines) == 1 or usage, f"{what}: said {len(lines)} lines: {said[-1:]}")
    finding.check(len("".join(lines)) < 1000, f"{what}: said {len(''.join(lines))} characters")
    finding.check("Traceback" not in command.stderr, f"{what}: a traceback")
    finding.check(PASSWORD not in command.stderr, f"{what}: the password is in the message")


def _toml(text: str) -> str:
    escaped = "".join(f"\\u{ord(each):04x}" for each in text)
    return f'"{escaped}"'


def _tables(stage: Stage) -> list[tuple[Any, ...]]:
    return stage.query("SELECT study_name, number, state::text FROM studies LEFT JOIN trials"
                       " USING (study_id) ORDER BY 1, 2")  # fmt: skip


def _files(stage: Stage) -> set[Path]:
    """Below the stage and right beside it, where `..` leads to."""
    above = {path for path in stage.folder.parent.iterdir() if path != stage.folder}
    logs = stage.home / "logs"
    inside = {path for path in stage.folder.rglob("*") if logs not in path.parents}
    return above | inside


_DIES = FaultPlan(folder="", faults=(Fault(point="after report", after=2),), leg_seconds=0.05)


class _Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._mark),)


def _raw(mark: Path, _valid: bytes) -> bytes:
    return pickle.dumps(_Payload(mark))


def _signed(mark: Path, _valid: bytes) -> bytes:
    return _sealed(pickle.dumps(_Payload(mark)))


def _torch_file(mark: Path, _valid: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"format": 1, "history": [], "model": _Payload(mark)}, file)
    return _sealed(file.getvalue())


def _foreign(_mark: Path, _valid: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"format": 1}, file)
    return _sealed(file.getvalue())


def _of_other_weights(_mark: Path, valid: bytes) -> bytes:
    content = torch.load(io.BytesIO(valid[len(MAGIC) + 32 :]), weights_only=True)
    content["model"] = {name: torch.zeros(3, 3) for name in content["model"]}
    file = io.BytesIO()
    torch.save(content, file)
    return _sealed(file.getvalue())


def _sealed(payload: bytes) -> bytes:
    """As storage/checkpoints.py writes it: what an attacker can do as well as we."""
    return MAGIC + hashlib.sha256(payload).digest() + payload


FORGERIES: dict[str, Callable[[Path, bytes], bytes]] = {
    "a pickle": _raw,
    "a pickle with our header and checksum": _signed,
    "torch's format with a pickle in it, and our checksum": _torch_file,
    "a checkpoint without content, and our checksum": _foreign,
    "a checkpoint of other weights, and our checksum": _of_other_weights,
}


def _checkpoint(stage: Stage, what: str, forge: Callable[[Path, bytes], bytes]) -> Finding:
    """A worker is killed; what lies newest in its folder is forged before the next one comes."""
    stage.make_study(trials=3, epochs=5)
    worker = stage.start("worker", "--study", STUDY)
    if worker.wait(240) != -signal.SIGKILL:
        raise Overdue(f"the worker was not killed: {worker.stderr[-300:]}")
    mark = stage.folder / "executed"
    (newest,) = sorted(
        (stage.home / "checkpoints").rglob("*.ckpt"), key=lambda path: int(path.stem)
    )[-1:]
    newest.with_name("99.ckpt").write_bytes(forge(mark, newest.read_bytes()))
    newest.with_name("98.ckpt").symlink_to("/etc/passwd")
    legs_before = len(stage.witness("leg"))
    again = stage.start("worker", "--study", STUDY)
    code = again.wait(240)
    stage.num_signals += legs_before  # beginning anew is allowed: each leg may be run again
    finding = audit(stage, "26", done=f"{what} as the newest checkpoint", budget=3, epochs=5)
    finding.check(code == 0, f"the worker ended with {code}")
    finding.check(not mark.exists(), "code from a checkpoint was run")
    attempts = [line["attempts"] for line in stage.witness("claim")]
    finding.check(2 in attempts, "nobody took the trial over: nothing was tried")
    anew = "begins anew" in again.stderr
    finding.notes.append("begun anew" if anew else "resumed from the one before")
    shutil.rmtree(mark, ignore_errors=True)
    return finding
