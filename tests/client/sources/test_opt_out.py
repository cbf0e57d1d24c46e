"""Patients who are left out: the list as people write it, and that leaving out is not having."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.sources.opt_out import read_opt_outs
from client.sources.table import Table, patient_id
from common.errors import RefusedError
from tests.client.sources.test_table import Row, build, contract, row_lists


def test_a_list_is_read_as_people_write_it(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_bytes("\ufeff# asked in March\r\np1\r\n\r\n  p2 \n#p3\rp1\n4711".encode())
    assert read_opt_outs(path) == {"p1", "p2", "4711"}
    path.write_bytes(b"")
    assert read_opt_outs(path) == frozenset()


@pytest.mark.parametrize("line", ["n/a", "-", "1.2e+15", "NaN"])
def test_a_line_that_names_no_patient_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "out.txt"
    path.write_text(f"p1\n# no\n{line}\n")
    with pytest.raises(RefusedError, match=r"out.txt, line 3, names no patient") as caught:
        read_opt_outs(path)
    assert caught.value.code == "policy.opt-out"
    # The file and the line's number, and nothing of what stands there.
    assert str(caught.value).startswith(f"{path}, line 3, names no patient")


def test_a_list_that_cannot_be_read_stops_everything(tmp_path: Path) -> None:
    for name, data in (("missing", None), ("latin", b"M\xfcller\n")):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(RefusedError, match="cannot be read"):
            read_opt_outs(path)


def same(a: Table, b: Table) -> bool:
    pairs = ((a.x, b.x), (a.y, b.y), (a.patient_index, b.patient_index))
    return a.ids == b.ids and all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


@settings(max_examples=150, deadline=None)
@given(
    rows=row_lists,
    cap=st.integers(1, 3),
    holdout=st.sampled_from([0.0, 0.3]),
    left=st.sets(st.sampled_from(["p1", "p2", "p3", "P3", "nobody"])),
)
def test_leaving_out_is_not_having(rows: list[Row], cap: int, holdout: float, left: set[str]) -> None:
    rules = contract(cap, holdout)
    found = build(rows, rules).without(left)
    assert same(found, build([row for row in rows if patient_id(row[0]) not in left], rules))
    assert not found.x.flags.writeable
