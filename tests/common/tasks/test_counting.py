"""Counts of patients: a naive loop, whatever the pieces."""

import numpy as np
import pytest

from common.tasks import counting
from common.tasks.counting import counted, vectors
from common.tasks.models.layout import layout, size
from tests.common.tasks.kinds import COUNTING, encoded, study_of


@pytest.mark.parametrize("piece", [1, 40, 1 << 22])
@pytest.mark.parametrize("name", COUNTING)
def test_counts_are_those_of_a_naive_loop(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "PIECE_CELLS", piece)
    study = study_of(name)
    patients = np.repeat(np.arange(9) * 2, [1, 3, 2, 1, 1, 3, 3, 1, 2])
    x, y = encoded(study.contract, len(patients))
    dim = size(layout(study.model, study.contract))
    expected = vectors(study, x, y).sum(axis=0)
    assert counted(study, x, y, patients, dim, 50.0) == pytest.approx(expected)
    assert counted(study, x, y, patients, dim, None) == pytest.approx(expected)
    assert not counted(study, x[:0], y[:0], patients[:0], dim, 50.0).any()


def test_a_patient_past_the_clip_norm_is_scaled() -> None:
    study = study_of("forest")
    x, y = encoded(study.contract, 3)
    found = counted(study, x, y, np.zeros(3, dtype=np.int64), size(layout(study.model, study.contract)), 1.0)
    assert np.linalg.norm(found) == pytest.approx(1.0, rel=1e-6)


def test_only_counts_are_counted() -> None:
    study = study_of("mlp")
    with pytest.raises(TypeError, match="does not count"):
        vectors(study, *encoded(study.contract, 2))
