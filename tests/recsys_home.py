"""Settings of an installation in a temporary folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recsys_core.settings import Settings, load_settings


def default_settings(home: Path, **sections: Any) -> Settings:
    """The defaults, whatever `recsys.toml` and RECSYS_CONFIG there are where the tests run."""
    home.mkdir(parents=True, exist_ok=True)
    nothing = home / "empty.toml"
    nothing.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_CONFIG", str(nothing))
        return load_settings(home=home, **sections)
