"""Read by Python at its start where this folder is on PYTHONPATH: installs the faults."""

import os

if "HPO_CHAOS" in os.environ:
    from benchmarks.chaos.wraps import install

    install()
