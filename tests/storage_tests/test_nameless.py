"""A user without a name, as containers have it."""

import os
import platform
import pwd
import subprocess
import sys

import pytest

from storage import nameless
from storage.errors import StorageError

_SHOWS = """
import ctypes, sys
class Record(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p), ("password", ctypes.c_char_p),
        ("uid", ctypes.c_uint), ("gid", ctypes.c_uint),
        ("gecos", ctypes.c_char_p), ("folder", ctypes.c_char_p), ("shell", ctypes.c_char_p),
    ]
function = ctypes.CDLL(None).getpwuid
function.restype = ctypes.POINTER(Record)
found = function(int(sys.argv[1])).contents
print(*(getattr(found, name) for name, _ in Record._fields_))
"""


def a_uid_without_a_name() -> int:
    uid = 54_321
    while uid in {user.pw_uid for user in pwd.getpwall()}:
        uid += 1
    return uid


def test_a_user_without_a_name_has_one_in_the_processes_of_the_database() -> None:
    uid = a_uid_without_a_name()
    with nameless.with_a_name(uid, 7) as (variables, descriptors):
        shown = subprocess.run(
            ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", _SHOWS, str(uid)],
            env={**os.environ, **variables},
            pass_fds=descriptors,
            capture_output=True,
            text=True,
            check=True,
        )
    assert shown.stdout == f"b'postgres' b'' {uid} 7 b'' b'/' b''\n"
    assert shown.stderr == ""


def test_a_user_with_a_name_needs_nothing() -> None:
    with nameless.with_a_name(0, 0) as given:
        assert given == ({}, [])


def test_on_another_kind_of_machine_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with (
        pytest.raises(StorageError, match=r"a name for user \d+: add one to /etc/passwd, or give"),
        nameless.with_a_name(a_uid_without_a_name(), 0),
    ):
        pass
