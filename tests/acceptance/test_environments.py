"""The main job as containers run it: an unknown user, no home, hostile names, little /dev/shm."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tests.acceptance.test_strangers_code import START, hostile_folder

UNKNOWN_UID = 54_321
ROOT = Path(__file__).parents[2]
NAME = 'Doe, Jane\'s\n"a\\b" $HOME 100%d e\u0301'
IN_A_CONTAINER = """
set -e
shm_left=$1 uid=$2 num_open=$3
shift 3
keep=$(mktemp -d)
trap 'rmdir "$keep"' EXIT
while [ "$num_open" -gt 0 ]; do  # folder A is closed to others: all but folder B in it goes away
    mount --bind "$1" "$keep"
    mount -t tmpfs -o mode=755 tmpfs "$1"
    mkdir -p "$2"
    mount --bind "$keep/${2#"$1"/}" "$2"
    umount "$keep"
    num_open=$((num_open - 1))
    shift 2
done
mount -t tmpfs -o size=1m,mode=1777 tmpfs /dev/shm
code=0
setpriv --reuid "$uid" --regid "$uid" --clear-groups -- "$@" || code=$?
ls -A /dev/shm > "$shm_left"
exit "$code"
"""


@dataclass(frozen=True, kw_only=True)
class Container:
    """Runs commands in a folder, as nobody whom the machine knows, where this process may do that.

    An ordinary user, and root in a container without the right to mount, run them as themselves.
    """

    folder: Path
    script: Path
    variables: Mapping[str, str]
    shm_left: Path

    @property
    def is_isolated(self) -> bool:
        """Whether commands get a user and mounts of their own."""
        return may_mount()

    def run(self, *args: str) -> str:
        """What the command prints. It ends well, without a warning, and leaves no shared memory."""
        command = [sys.executable, str(self.script), *args]
        if self.is_isolated:
            opened = [str(path) for pair in closed_folders() for path in pair]
            given = [str(self.shm_left), str(UNKNOWN_UID), str(len(opened) // 2), *opened]
            unshare = ["unshare", "--mount", "--propagation", "private"]
            command = [*unshare, "sh", "-c", IN_A_CONTAINER, "sh", *given, *command]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.variables,
            timeout=240,
        )
        assert done.returncode == 0, (args, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert "WARNING" not in done.stderr.upper(), done.stderr
        if self.is_isolated:
            assert self.shm_left.read_text() == ""
        return done.stdout


def may_mount() -> bool:
    """Whether this process is root, with all the rights of root."""
    if os.geteuid() != 0:
        return False
    try_it = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return subprocess.run(try_it, capture_output=True).returncode == 0


def closed_folders() -> list[tuple[Path, Path]]:
    """Folders that other users can't enter, as /root is, and what they need in each."""
    paths = sysconfig.get_paths()
    libraries = {sys.base_prefix, sys.prefix, paths["purelib"], paths["platlib"], *sys.path}
    found: list[tuple[Path, Path]] = []
    for needed in sorted({Path(os.path.realpath(each)) for each in libraries if each} | {ROOT}):
        above = next((p for p in reversed(needed.parents) if not p.stat().st_mode & 0o001), None)
        if above is not None and not any(needed.is_relative_to(other) for _, other in found):
            found.append((above, needed))
    assert len({above for above, _ in found}) == len(found), "two things in one closed folder"
    return found


def a_container(short_folder: Path) -> Container:
    """In a folder of a hostile name that is full of modules with the names of real ones."""
    top = short_folder / "environments"
    top.mkdir()
    folder = hostile_folder(top / NAME, ran=top / "ran")
    long = folder / ("t" * 120)
    long.mkdir()
    script = top / "bin" / "hpo"
    script.parent.mkdir()
    script.write_text(START)
    Image.new("L", (8, 8)).save(folder / "picture.png")
    made = Container(
        folder=folder,
        script=script,
        variables={
            "PATH": os.environ["PATH"],
            "HPO_HOME": "home",  # below the folder
            "TMPDIR": str(long),
            "TERM": "dumb",
            "PGHOST": "127.0.0.1",
            "PGPORT": "1",
            "PGSERVICE": "none",
        },
        shm_left=top / "shm",
    )
    if made.is_isolated:
        for path in (folder, long, top / "ran"):
            os.chown(path, UNKNOWN_UID, UNKNOWN_UID)
    return made


def test_the_main_job_works_for_an_unknown_user_without_a_home_or_shared_memory(
    short_folder: Path,
) -> None:
    container = a_container(short_folder)
    small = ("--trials", "2", "--epochs", "1", "--backbone", "smallcnn")
    assert container.run("launch", *small).startswith("digits: 2/2 trials")
    quick = ("--top-k", "1", "--seeds", "0", "--formats", "onnx,safetensors")
    best = json.loads(container.run("best", "--export", "--out", "out", *quick, "--json"))
    assert set(best["export"]["formats"]) == {"onnx", "safetensors"}
    manifest = json.loads((container.folder / "out" / "manifest.json").read_text())
    assert manifest["metrics"]["test"]["accuracy"] == best["test"]["accuracy"] > 0.2
    (found,) = json.loads(container.run("predict", "out", "picture.png", "--json"))
    assert found["file"] == "picture.png"
    assert found["class"] in manifest["class_names"]
    assert os.listdir(container.folder.parent / "ran") == []
    if container.is_isolated:
        assert (container.folder / "home").stat().st_uid == UNKNOWN_UID
