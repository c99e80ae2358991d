"""The process of a command: `hpo`, or python -m hpo."""

import sys
from typing import NoReturn

from hpo.import_path import isolate


def run() -> NoReturn:
    """Run the command of this process's arguments, and end the process."""
    isolate()
    from hpo.signals import leave_at_once
    from hpo.streams import open_streams

    leave_at_once()
    open_streams()
    # what the process was started by: its own processes need nothing of it, and would run it again
    sys.modules["__main__"] = sys.modules[__name__]
    from hpo.cli import run as run_command

    run_command()


if __name__ == "__main__":
    run()
