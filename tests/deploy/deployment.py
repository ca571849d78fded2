"""Where the files of the deployment are, and how tests read them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[2]
DEPLOY = PROJECT / "deploy"


def read_yaml(*parts: str) -> Any:
    """The one document of a file below deploy/."""
    return yaml.safe_load(DEPLOY.joinpath(*parts).read_text())


def program(name: str) -> str | None:
    """A program beside this Python or on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
