"""A real PostgreSQL of the tests, with the roles and databases of deploy/compose/databases.sh."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
from deployment import DEPLOY

from recsys_cli.processes import free_port
from recsys_core.errors import UserError

PASSWORDS = {"DAGSTER_PG_PASSWORD": 'it\'s a "secret"', "MLFLOW_PG_PASSWORD": "another"}
SECONDS = 60


@dataclass(frozen=True)
class Postgres:
    """A running server."""

    port: int

    def environment(self) -> dict[str, str]:
        """The variables that deploy/dagster.yaml reads."""
        return {
            "DAGSTER_PG_HOST": "127.0.0.1",
            "DAGSTER_PG_PORT": str(self.port),
            "DAGSTER_PG_DB": "dagster",
            "DAGSTER_PG_USER": "dagster",
            "DAGSTER_PG_PASSWORD": PASSWORDS["DAGSTER_PG_PASSWORD"],
        }

    def connect(self, role: str, database: str) -> Any:
        """A connection of `dagster` or `mlflow` to a database, with the role's password."""
        password = PASSWORDS[f"{role.upper()}_PG_PASSWORD"]
        return psycopg2.connect(host="127.0.0.1", port=self.port, user=role, password=password, dbname=database)


def postgres_programs() -> Path | None:
    """The folder of initdb, pg_ctl and createdb; Debian keeps them off PATH, a folder for each version."""
    on_path = shutil.which("initdb")
    candidates = [Path(on_path).resolve().parent] if on_path else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: -float(folder.parent.name))
    return next((folder for folder in candidates if (folder / "initdb").is_file() and (folder / "pg_ctl").is_file()), None)


def unprivileged() -> list[str]:
    """A prefix that runs a command as somebody else than root, whom initdb refuses; empty when this is not root."""
    if os.geteuid() != 0:
        return []
    somebody = pwd.getpwnam("nobody")
    return ["setpriv", f"--reuid={somebody.pw_uid}", f"--regid={somebody.pw_gid}", "--clear-groups", "--"]


class NoPostgres(UserError):
    """There is none to start; the message says why."""


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Run one on a free port of loopback, in a temporary folder. Raises NoPostgres."""
    programs = postgres_programs()
    if programs is None:
        raise NoPostgres("no PostgreSQL here: apt-get install postgresql")
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        raise NoPostgres("this is root and there is no setpriv to start PostgreSQL as somebody else")
    # Not pytest's own temporary folder, which only its owner may enter.
    with tempfile.TemporaryDirectory(prefix="recsys-postgres-") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        if os.geteuid() == 0:
            for path in (Path(folder), data):
                shutil.chown(path, "nobody")
        port = free_port(0)
        environment = {
            **os.environ,
            **PASSWORDS,
            "LC_ALL": "C.UTF-8",
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PGHOST": folder,
            "PGPORT": str(port),
            "POSTGRES_USER": "postgres",
        }

        def run(*command: str) -> None:
            done = subprocess.run(
                [*unprivileged(), *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
            )
            assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"

        run("initdb", "-D", str(data), "-U", "postgres", "-E", "UTF8", "--auth=trust", "--auth-host=scram-sha-256", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-D", str(data), "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            script = Path(folder) / "databases.sh"
            script.write_bytes((DEPLOY / "compose" / "databases.sh").read_bytes())
            script.chmod(0o755)
            run(str(script))
            yield Postgres(port)
        finally:
            run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
