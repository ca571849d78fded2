"""What the tests of the deployment share: a PostgreSQL of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from databases import NoPostgres, Postgres, postgres_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Started once, when a test asks for it."""
    try:
        with postgres_server() as server:
            yield server
    except NoPostgres as reason:
        pytest.skip(str(reason))
