"""HPO_HOME: the one folder below which this project keeps its files."""

import os
from pathlib import Path

import platformdirs


def home() -> Path:
    """HPO_HOME, or the platform's user data folder. It need not exist yet."""
    return Path(os.environ.get("HPO_HOME") or platformdirs.user_data_dir("hpo")).expanduser()
