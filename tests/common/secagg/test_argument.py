"""PROTOCOL.md, "Why it holds", steps 3 to 5, by exhaustion for few hospitals: what a hub can compute, by rank.

Every keystream is a variable of its own, as keys are pseudo-random; the uploads are linear forms in them and in
the vectors, with the signs that the code gives them. A hub and its colluders know some of the variables. What
they can compute of the honest vectors is what is left of the forms when all unknown keystreams cancel.
"""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pytest

from common.secagg.keys import mask_key
from common.secagg.masks import cohort_mask_keys
from common.secagg.params import smallest_cohort

Variable: TypeAlias = tuple[str, object]
Form: TypeAlias = dict[Variable, int]


def upload(me: int, cohort: Collection[int], context: int) -> Form:
    """What hospital ``me`` uploads: its vector, its self-mask, and the pair masks that the code adds and subtracts."""
    ctx = bytes([context]) * 32
    pair_keys = {peer: bytes([min(me, peer), max(me, peer)]) * 16 for peer in cohort if peer != me}
    names: dict[bytes, Variable] = {
        mask_key(key, "params", ctx): ("pair", (min(me, peer), max(me, peer), context))
        for peer, key in pair_keys.items()
    }
    added, subtracted = cohort_mask_keys(pair_keys, sorted(cohort), me, "params", ctx)
    form: Form = {("vector", me): 1, ("self", (me, context)): 1}
    for sign, found in ((1, added), (-1, subtracted)):
        form |= {names[key]: sign for key in found}
    assert len(form) == len(cohort) + 1
    return form


def rank(rows: list[Form], columns: list[Variable]) -> int:
    if not rows or not columns:
        return 0
    matrix = [[row.get(column, 0) for column in columns] for row in rows]
    return int(np.linalg.matrix_rank(np.array(matrix, dtype=np.float64)))


@dataclass(frozen=True)
class View:
    """Cohorts of one round, one a context; who colludes; who has opened which contexts."""

    cohorts: tuple[frozenset[int], ...]
    colluders: frozenset[int]
    opened: dict[int, frozenset[int]]

    def unknown(self, variable: Variable) -> bool:
        kind, where = variable
        if kind == "vector":
            return where not in self.colluders
        if kind == "pair":
            i, j, _ = where  # type: ignore[misc]
            return not {i, j} & self.colluders
        member, context = where  # type: ignore[misc]
        return member not in self.colluders and context not in self.opened[member]

    @property
    def forms(self) -> list[Form]:
        """The uploads without what is known anyway."""
        whole = [upload(me, cohort, at) for at, cohort in enumerate(self.cohorts) for me in sorted(cohort)]
        return [{v: c for v, c in form.items() if self.unknown(v)} for form in whole]

    @property
    def recoverable(self) -> list[Form]:
        """The sum of each context that all of its honest members have opened."""
        return [
            {("vector", i): 1 for i in cohort - self.colluders}
            for at, cohort in enumerate(self.cohorts)
            if all(at in self.opened[i] for i in cohort - self.colluders)
        ]

    def revealed(self) -> int:
        """How many independent combinations of honest vectors can be computed.

        Fails unless these are the sums of the contexts that are recoverable, and their combinations.
        """
        forms, sums = self.forms, self.recoverable
        columns = sorted({v for form in forms for v in form}, key=str)
        masks = [v for v in columns if v[0] != "vector"]
        dimensions = rank(forms, columns) - rank(forms, masks)
        assert rank(forms + sums, columns) == rank(forms, columns)
        assert dimensions == rank(sums, columns)
        return dimensions


def cohorts_of(n: int, m: int) -> list[frozenset[int]]:
    return [frozenset(c) for size in range(m, n + 1) for c in itertools.combinations(range(1, n + 1), size)]


def opened_by(n: int, t: int, rho: int, contexts: int) -> Iterator[dict[int, frozenset[int]]]:
    """All ways in which 1 to n can open: of a round the honest one context, the ``rho`` before the last t any."""
    one = [frozenset[int](), *(frozenset([at]) for at in range(contexts))]
    many = [frozenset(c) for k in range(contexts + 1) for c in itertools.combinations(range(contexts), k)]
    rolled = range(n - t - rho + 1, n - t + 1)
    choices = [many if i in rolled else one for i in range(1, n - t + 1)]
    for chosen in itertools.product(*choices):
        yield dict(zip(range(1, n + 1), (*chosen, *[frozenset[int]()] * t), strict=True))


@pytest.mark.parametrize(("n", "t"), [(3, 1), (4, 1), (4, 2), (5, 1), (5, 2), (5, 3)])
def test_a_context_reveals_its_sum_when_all_have_opened_and_nothing_before(n: int, t: int) -> None:
    """Also with all but two colluding: then the sum of the two."""
    colluders, everybody = frozenset(range(n - t + 1, n + 1)), frozenset(range(1, n + 1))
    found = []
    for opened in opened_by(n, t, 0, 1):
        view = View((everybody,), colluders, opened)
        found.append(view.revealed())
        assert found[-1] == (all(opened[i] for i in everybody - colluders))
    assert sum(found) == 1
    assert len(found) == 2 ** (n - t)


@pytest.mark.parametrize(("n", "t", "rho"), [(3, 1, 0), (4, 1, 0), (4, 1, 1), (5, 1, 1), (5, 2, 0)])
def test_two_contexts_of_a_round_reveal_one_sum_at_the_most(n: int, t: int, rho: int) -> None:
    m = smallest_cohort(n, t, rho)
    cohorts = cohorts_of(n, m)
    assert cohorts
    colluders = frozenset(range(n - t + 1, n + 1))
    most = 0
    for first, second in itertools.combinations_with_replacement(cohorts, 2):
        for opened in opened_by(n, t, rho, 2):
            most = max(most, View((first, second), colluders, opened).revealed())
    assert most == 1


@pytest.mark.parametrize(("n", "t", "rho", "m"), [(6, 2, 0, 4), (4, 1, 1, 3), (5, 2, 0, 3)])
def test_one_below_the_bound_two_sums_are_revealed(n: int, t: int, rho: int, m: int) -> None:
    """The split attack: colluders sit in both cohorts, and no honest hospital that was not rolled back does."""
    assert m < smallest_cohort(n, t, rho)
    colluders = frozenset(range(n - t + 1, n + 1))
    rolled = frozenset(range(n - t - rho + 1, n - t + 1))
    honest = sorted(frozenset(range(1, n + 1)) - colluders - rolled)
    half = len(honest) // 2
    cohorts = tuple(frozenset(part) | colluders | rolled for part in (honest[:half], honest[half:]))
    assert min(map(len, cohorts)) == m
    opened = {i: frozenset(at for at, cohort in enumerate(cohorts) if i in cohort) for i in range(1, n + 1)}
    assert all(len(opened[i]) == 1 for i in honest)
    assert View(cohorts, colluders, opened).revealed() == 2
