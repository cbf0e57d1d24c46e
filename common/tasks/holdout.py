"""The held-out patients of one hospital in a round: scored one by one, counted in the same release.

Source: PRIVACY.md "Everything upstream is separable by patient", "The release gate". Rules: who is held out
follows from the site's secret alone; scores are those of the model as it came, before any step; a patient is
scored without anybody else in the batch, because the last bits of a product depend on what shares it.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.methods import Evaluation
from common.privacy.clipping import clip
from common.study import DifferentialPrivacy, Study
from common.tasks import evaluation
from common.tasks.clipped_sum import pieces
from common.tasks.models.modules import build, load
from common.tasks.models.prediction import predict
from common.tasks.state import State

PIECE_CELLS: Final = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Rows x [n, width] and labels y [n] of held-out patients, ``patients`` [n] ascending from 0.

    ``member`` is the hospital's place among the study's members.
    """

    x: NDArray[np.float64]
    y: NDArray[np.int64]
    patients: NDArray[np.int64]
    count: int
    member: int


class Counting:
    """What one hospital's held-out patients add to each release of a round.

    Guarantee: evaluation_is_separable_by_patient - bit for bit, whoever else is held out.
    """

    def __init__(self, study: Study, rules: Evaluation, held: HeldOut, state: State) -> None:
        self._study, self._rules, self._held = study, rules, held
        model, contract = study.model, study.contract
        module = load(build(model, contract), state)
        found = [predict(model, contract, module, held.x[rows]) for rows in pieces(held.patients, 1)]
        self._predicted = np.concatenate(found) if found else predict(model, contract, module, held.x)
        self.length = evaluation.length(rules, model, contract, len(study.members))
        privacy = study.privacy
        self._clip = privacy.clip_norm if isinstance(privacy, DifferentialPrivacy) else None
        self._scale = evaluation.scale(study)

    def total(self, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The scaled and clipped counts of the patients whose coin fell, float64 [length]."""
        held, study = self._held, self._study
        total = np.zeros(self.length)
        place = held.member, len(study.members)
        for piece in pieces(held.patients, max(1, PIECE_CELLS // self.length)):
            patients = held.patients[piece]
            starts = np.flatnonzero(np.append(True, patients[1:] != patients[:-1]))
            rows = held.x[piece], held.y[piece], self._predicted[piece]
            each = evaluation.cells(self._rules, study.model, study.contract, place, *rows)
            whole = np.add.reduceat(each, starts, axis=0)[chosen[patients[starts]]] * self._scale
            total += (whole if self._clip is None else clip(whole, self._clip)).sum(axis=0)
        return total
