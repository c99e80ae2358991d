"""The exception tree, and which exit code each error means.

    Exception
    ├── HpoError                      raised here
    │   ├── UsageError            2   an option that can't be
    │   ├── NoTrialError          4   nothing to choose from
    │   ├── StudyFailsError       6   every trial fails for the same reason
    │   ├── WorkersDie            1   no worker comes up
    │   └── Interrupted         130   a signal, Ctrl-C
    ├── trainer.config.ConfigError    2
    ├── trainer.config.DataError      5
    ├── trainer.config.TrainingFailure  1   outside of a trial: of pretrain, best, replay
    │   ├── TrainingDiverged
    │   └── OutOfMemory
    ├── trainer.config.CheckpointError  1   bytes that aren't a checkpoint of this training
    ├── storage.errors.StorageError   3
    │   └── StudyNotFound             2
    └── OSError                       1   of the machine: a full disk, a file without rights

Only cli.py exits. Every message is one line: the cause, and the way out.
"""

import enum
import os
import re

from storage.errors import StorageError, StudyNotFound
from trainer.config import CheckpointError, ConfigError, DataError, DeviceBusy, TrainingFailure

_OF_A_DEVICE = re.compile(
    r"CUDA error|CUDA driver|cuDNN error|CUDNN_STATUS|CUBLAS_STATUS|CUFFT_|NCCL error|"
    r"no kernel image|device-side assert|MPS backend"
)
"""What torch's RuntimeErrors say of a device that can't go on."""


class ExitCode(enum.IntEnum):
    """What a command's end means to the script that called it."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    DATABASE = 3
    NO_TRIAL = 4
    DATA = 5
    STUDY_FAILS = 6
    GIVEN_BACK = 75
    """A worker has given its trial back after an error: another process is to try it."""
    INTERRUPTED = 130


class HpoError(Exception):
    """A message for the user, one line."""

    exit_code = ExitCode.UNEXPECTED


class UsageError(HpoError):
    """An option that can't be."""

    exit_code = ExitCode.USAGE


class NoTrialError(HpoError):
    """The study has no trial to choose from."""

    exit_code = ExitCode.NO_TRIAL


class StudyFailsError(HpoError):
    """Trial after trial fails."""

    exit_code = ExitCode.STUDY_FAILS


class WorkersDie(HpoError):
    """Worker processes end before they do any work."""


class Interrupted(HpoError):
    """A signal asked this process to leave."""

    exit_code = ExitCode.INTERRUPTED


_ELSEWHERE: dict[type[Exception], ExitCode] = {
    ConfigError: ExitCode.USAGE,
    DataError: ExitCode.DATA,
    StudyNotFound: ExitCode.USAGE,
    StorageError: ExitCode.DATABASE,
    TrainingFailure: ExitCode.UNEXPECTED,
    CheckpointError: ExitCode.UNEXPECTED,
    OSError: ExitCode.UNEXPECTED,
    DeviceBusy: ExitCode.UNEXPECTED,
}


def exit_code(error: Exception) -> ExitCode | None:
    """The code of an error that a user can cause; None for a bug."""
    if isinstance(error, HpoError):
        return error.exit_code
    for kind, code in _ELSEWHERE.items():
        if isinstance(error, kind):
            return code
    return None


def one_line(error: Exception) -> str:
    """The message of an error that a user can cause."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror:
        what = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        said = what + error.strerror
    return " ".join(said.split())


def is_of_the_machine(error: BaseException) -> bool:
    """Whether the machine that a training runs on is more likely at fault than the training.

    Such are files, packages, host memory and devices. Where a worker gives its trial back with such
    an error, nothing is held against the trial as long as another attempt comes further.
    """
    if isinstance(error, OSError | ImportError | MemoryError | DataError | DeviceBusy):
        return True
    if type(error).__name__ == "AcceleratorError":  # torch's, which isn't imported here
        return True
    return isinstance(error, RuntimeError) and bool(_OF_A_DEVICE.search(str(error)))


def described(error: BaseException) -> str:
    """The error in a line: its kind, and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
