"""A real PostgreSQL for the tests, from Debian's packages: its own cluster, on loopback, for one module."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from server.processes import free_port

PASSWORD = "owner-s3cret"
READER_PASSWORD = "reader-s3cret"
TIMEOUT_S = 60


@dataclass(frozen=True)
class Postgres:
    """A cluster with the superuser ``owner`` and the account ``reader``, which may only connect."""

    port: int
    folder: Path

    @property
    def owner(self) -> sa.Engine:
        address = f"postgresql+psycopg://owner:{PASSWORD}@127.0.0.1:{self.port}/postgres"
        return sa.create_engine(address, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    @property
    def address(self) -> str:
        """As a hospital writes it: no password."""
        return f"postgresql://reader@127.0.0.1:{self.port}/postgres"

    def run(self, *statements: str) -> None:
        with self.owner.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def copy(self, table: str, lines: Sequence[str]) -> None:
        """Load rows, tab between cells, \\N for NULL."""
        with self.owner.connect() as connection:
            cursor = connection.connection.cursor()
            with cursor.copy(f"COPY {table} FROM STDIN") as into:  # type: ignore[attr-defined]
                into.write("\n".join(lines) + "\n")

    def password_file(self, folder: Path) -> str:
        file = folder / "db.password"
        file.write_text(READER_PASSWORD + "\n")
        file.chmod(0o600)
        return str(file)


def installed() -> Path | None:
    """The newest PostgreSQL's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@contextmanager
def cluster() -> Iterator[Postgres]:
    """A running cluster; skips where PostgreSQL is not installed."""
    programs = installed()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    user = None if os.geteuid() else "nobody"
    folder = Path(tempfile.mkdtemp(prefix="wardround-pg-"))
    (folder / "password").write_text(PASSWORD)
    if user:
        account = pwd.getpwnam(user)
        for path in (folder, folder / "password"):
            os.chown(path, account.pw_uid, account.pw_gid)

    def run(*command: str) -> None:
        subprocess.run(
            [str(programs / command[0]), *command[1:]],
            user=user, cwd="/", check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    data, port = str(folder / "data"), free_port()
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
    try:
        run(
            "initdb",
            "-D",
            data,
            "-U",
            "owner",
            "-A",
            "scram-sha-256",
            f"--pwfile={folder}/password",
            "--no-sync",
            "-E",
            "UTF8",
        )
        run("pg_ctl", "-D", data, "-l", str(folder / "log"), "-w", "-o", options, "start")
        made = Postgres(port, folder)
        made.run(f"CREATE ROLE reader LOGIN PASSWORD '{READER_PASSWORD}'")
        try:
            yield made
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
