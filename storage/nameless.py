"""initdb for a user without a name, as in containers that are started with --user 1234.

initdb, and the server that it starts to fill the cluster, ask the C library for the name of their
user (getpwuid), though they need none, and end when the machine has none. Docker's own image of
Postgres puts a library in front of that function (libnss_wrapper). A machine that has only Python
packages has no such library and no compiler: the one here has one function, which returns one
record, and is written by hand into a file in memory.
"""

import contextlib
import os
import platform
import pwd
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from storage.errors import StorageError

_PAGE = 0x10000  # the largest that a kernel for these machines has
_NAME = b"postgres"
_FUNCTION = b"getpwuid"


@dataclass(frozen=True, kw_only=True)
class _Machine:
    number: int
    """In an ELF header."""
    relative: int
    """The relocation that adds the address to which the library was loaded."""
    distance_from: int
    """From which byte of the code the distance to the record counts."""

    def code(self, distance: int) -> bytes:
        """Returns the address of what lies so many bytes further on."""
        raise NotImplementedError


class _X86(_Machine):
    def code(self, distance: int) -> bytes:
        # endbr64; lea rax, [rip + distance]; ret
        return b"\xf3\x0f\x1e\xfa\x48\x8d\x05" + struct.pack("<i", distance) + b"\xc3"


class _Arm(_Machine):
    def code(self, distance: int) -> bytes:
        # adr x0, distance; ret
        adr = 0x10000000 | (distance & 3) << 29 | (distance >> 2 & 0x7FFFF) << 5
        return struct.pack("<II", adr, 0xD65F03C0)


_MACHINES: dict[str, _Machine] = {
    "x86_64": _X86(number=62, relative=8, distance_from=11),
    "aarch64": _Arm(number=183, relative=1027, distance_from=0),
}


@contextlib.contextmanager
def with_a_name(uid: int, gid: int) -> Iterator[tuple[dict[str, str], list[int]]]:
    """Variables and descriptors for a process of this user, by which it has a name.

    Raises StorageError if the machine is of a kind that no library was written for.
    """
    try:
        pwd.getpwuid(uid)
    except KeyError:
        pass
    else:
        yield {}, []
        return
    machine = _MACHINES.get(platform.machine())
    if machine is None or not hasattr(os, "memfd_create"):
        raise StorageError(
            f"Postgres needs a name for user {uid}: add one to /etc/passwd, or give --storage"
        )
    descriptor = os.memfd_create("hpo-user")
    try:
        os.write(descriptor, library(machine, uid, gid))
        yield {"LD_PRELOAD": f"/proc/self/fd/{descriptor}"}, [descriptor]
    finally:
        os.close(descriptor)


def library(machine: _Machine, uid: int, gid: int) -> bytes:
    """An ELF library with a getpwuid that knows this user alone."""
    # What is only read: the header, symbols, relocations, code. In the page behind it what the
    # loader writes to: its own table, and the record with pointers to texts.
    names = b"\0" + _FUNCTION + b"\0"
    texts = _NAME + b"\0/\0"
    symbols = 64 + 4 * 56
    strings = symbols + 2 * 24
    hashes = strings + len(names) + -len(names) % 8
    relocations = hashes + 24
    code = relocations + 5 * 24
    dynamic = _PAGE
    record = dynamic + 9 * 16
    text = record + 48
    end = text + len(texts)
    empty, root = text + len(_NAME), text + len(_NAME) + 1

    instructions = machine.code(record - code - machine.distance_from)
    pointers = {0: text, 8: empty, 24: empty, 32: root, 40: empty}  # name, password, ..., shell
    read = b"".join(
        [
            b"\x7fELF\2\1\1" + bytes(9),
            struct.pack("<HHIQQQIHHHHHH", 3, machine.number, 1, 0, 64, 0, 0, 64, 56, 4, 64, 0, 0),
            # type, flags, offset, virtual and physical address, size in file and memory, alignment
            *(
                struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, align)
                for kind, flags, at, size, align in (
                    (1, 5, 0, code + len(instructions), _PAGE),
                    (1, 6, _PAGE, end - _PAGE, _PAGE),
                    (2, 6, dynamic, record - dynamic, 8),
                    (0x6474E551, 6, 0, 0, 16),  # without this, stacks become executable
                )
            ),
            bytes(24),
            struct.pack("<IBBHQQ", 1, 0x12, 0, 1, code, len(instructions)),
            names.ljust(hashes - strings, b"\0"),
            struct.pack("<IIIIII", 1, 2, 1, 0, 0, 0),  # one chain: the one function
            *(
                struct.pack("<QQq", record + at, machine.relative, pointer)
                for at, pointer in pointers.items()
            ),
            instructions,
        ]
    )
    written = b"".join(
        [
            *(
                struct.pack("<qQ", tag, value)
                for tag, value in (
                    (4, hashes), (5, strings), (6, symbols), (10, len(names)), (11, 24),
                    (7, relocations), (8, len(pointers) * 24), (9, 24), (0, 0),
                )
            ),
            struct.pack("<QQIIQQQ", 0, 0, uid, gid, 0, 0, 0),
            texts,
        ]
    )  # fmt: skip
    return read.ljust(_PAGE, b"\0") + written
