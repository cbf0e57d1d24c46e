"""A DuckDB that reaches the files of one source and nothing else."""

from pathlib import Path

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.sources.engine import connect, execute, identifier, lock, quoted, regular_file
from common.errors import ContractError

SECRET = "Zq7secret"


def test_a_folder_is_reached_and_its_neighbours_are_not(tmp_path: Path) -> None:
    inside, beside = tmp_path / "in", tmp_path / "inside-not"
    for folder in (inside, beside):
        folder.mkdir()
        (folder / "a.csv").write_text("a\n1\n")
    (inside / "link.csv").symlink_to(beside / "a.csv")
    with connect(folders=[inside]) as connection:
        assert connection.execute(f"SELECT count(*) FROM '{inside}/a.csv'").fetchone() == (1,)
        for path in (beside / "a.csv", inside / ".." / "inside-not" / "a.csv"):
            with pytest.raises(duckdb.Error):
                connection.execute(f"FROM '{path}'")
        lock(connection, copied=True)
        with pytest.raises(duckdb.Error):
            connection.execute(f"FROM '{inside}/a.csv'")
        with pytest.raises(duckdb.Error):
            connection.execute("RESET disabled_filesystems")


def test_source_errors_hold_no_value() -> None:
    with connect() as connection, pytest.raises(ContractError) as caught:
        execute(connection, f"SELECT CAST('{SECRET}' AS INTEGER)", what="a.csv", remedy="Mend it.")
    error = caught.value
    assert (error.code, error.remedy) == ("source.malformed", "Mend it.")
    assert "a.csv" in error.problem
    assert error.__cause__ is None
    assert error.__context__ is None
    assert SECRET not in repr(vars(error)) + str(error)


@given(st.text(max_size=20).filter(lambda text: "\0" not in text))
def test_texts_and_names_are_only_that(text: str) -> None:
    with duckdb.connect(":memory:") as connection:
        found = connection.execute(f"SELECT {quoted(text)} AS {identifier(text or 'a')}")
        assert (found.description or [])[0][0] == (text or "a")
        assert found.fetchone() == (text,)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("a\n")
    link = tmp_path / "b.csv"
    link.symlink_to(file)
    assert regular_file(link) == file.resolve()
    for path in (tmp_path, tmp_path / "absent", Path("/dev/null"), tmp_path / "*.csv"):
        with pytest.raises(ContractError) as caught:
            regular_file(path)
        assert str(path) in caught.value.problem
