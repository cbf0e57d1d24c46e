"""Statistics of a cohort from one sum of counts on public grids: a "table one" and its plots.

Source: Hay et al., VLDB 2010 (consistency of a dyadic tree); Kaplan and Meier 1958; Mantel 1966 (log-rank);
PRIVACY.md "The release gate" (norms of blocks). Rules: a cell is a public function of one row; a row is in
one group, so that splitting by groups costs nothing; numpy only; what is read out is post-processing, with
the interval that the noise leaves.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.contract import Category, Contract, Number
from common.methods import Statistics
from common.tasks.estimates import Counts, Estimate, estimates
from common.tasks.fit import places

QUANTILES = (0.25, 0.5, 0.75)
_NONE = "none"


@dataclass(frozen=True, slots=True)
class Block:
    """Cells of the sum, for each group: ``kind``, the ``names`` it is about, size and squared norm."""

    kind: str
    names: tuple[str, ...]
    size: int
    squared_norm: float


def blocks(model: Statistics, contract: Contract) -> tuple[Block, ...]:
    """The blocks of one group, in order."""
    return tuple(_blocks(model, contract))


def groups(model: Statistics, contract: Contract) -> tuple[str, ...]:
    """The groups by which everything is split, one of all without ``by``."""
    if not model.by:
        return ("all",)
    label = contract.label
    if label.kind == "classes" and label.name == model.by:
        return label.classes
    return (*_codes(contract, model.by), _NONE)


def length(model: Statistics, contract: Contract) -> int:
    """Cells of the sum."""
    return len(groups(model, contract)) * sum(block.size for block in _blocks(model, contract))


def bound(model: Statistics, contract: Contract) -> float:
    """The largest norm of one patient's vector: all of its rows in the same cells.

    Guarantee: no_patient_exceeds_the_bound - whatever its rows hold.
    """
    squared = sum(block.squared_norm for block in _blocks(model, contract))
    return contract.rows_per_patient * math.sqrt(squared)


def phi(model: Statistics, contract: Contract, x: NDArray[np.float64], y: NDArray[np.int64]) -> Counts:
    """The vectors of rows x [n, width] and labels y [n]: float64 [n, d]."""
    where, n = places(contract), len(x)
    parts = [_cells(block, contract, x, y, where) for block in _blocks(model, contract)]
    one = np.concatenate(parts, axis=1) if parts else np.zeros((n, 0))
    group = _group(model, contract, x, y, where)
    whole = np.zeros((n, len(groups(model, contract)), one.shape[1]))
    whole[np.arange(n), group] = one
    return whole.reshape(n, -1)


def read_out(model: Statistics, contract: Contract, counts: Counts, noise_sd: float) -> dict[str, Any]:
    """All that the sum says, by group: nested mappings whose leaves are ``Estimate``.

    ``counts`` [d] the sum; ``noise_sd`` the noise's standard deviation in each cell.
    """
    names = groups(model, contract)
    split = counts.reshape(len(names), -1)
    found: dict[str, Any] = {"groups": {}}
    for name, row in zip(names, split, strict=True):
        start, here = 0, {}
        for block in _blocks(model, contract):
            cells = row[start : start + block.size]
            here[f"{block.kind} {' and '.join(block.names)}".strip()] = _read(
                block, contract, cells, noise_sd
            )
            start += block.size
        found["groups"][name] = here
    if contract.label.kind == "time_to_event" and len(names) > 1:
        exits = split[:, -2 * contract.label.outputs :]
        found["log-rank"] = estimates(_log_rank, exits, noise_sd, (0.0, np.inf))
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What was read out as text, one line a block and group."""
    for group, blocks_found in found["groups"].items():
        for block, values in blocks_found.items():
            if block.startswith(("histogram", "survival")):
                continue
            text = ", ".join(f"{name} {value}" for name, value in values.items())
            yield f"{group}: {block}: {text}"
    if "log-rank" in found:
        yield "log-rank: " + ", ".join(f"{name} {value}" for name, value in found["log-rank"].items())


def _blocks(model: Statistics, contract: Contract) -> Iterator[Block]:
    yield Block("rows", (), 1, 1.0)
    for name in model.numbers:
        yield Block("moments", (name,), 3, 3.0)
        if model.bins:
            # Levels 2, 4, ... bins: a value is in one cell of each.
            yield Block("histogram", (name,), 2 * model.bins - 2, math.log2(model.bins))
    if model.correlations and len(model.numbers) > 1:
        f = len(model.numbers)
        products = f * (f + 1) // 2
        yield Block("correlation", model.numbers, 1 + f + products, 1 + f + products)
    for name in model.categories:
        yield Block("codes", (name,), len(_codes(contract, name)) + 1, 1.0)
    for pair in model.crossed:
        first, second = (len(_codes(contract, name)) + 1 for name in pair)
        yield Block("crossed", pair, first * second, 1.0)
    if contract.label.kind == "time_to_event":
        yield Block("survival", (), contract.label.limit, 1.0)


def _cells(
    block: Block,
    contract: Contract,
    x: NDArray[np.float64],
    y: NDArray[np.int64],
    where: dict[str, tuple[int, int]],
) -> Counts:
    n = len(x)
    found = np.zeros((n, block.size))
    if block.kind == "rows":
        found[:] = 1.0
    elif block.kind == "moments":
        value, present = _values(x, block.names[0], where)
        found[:] = np.stack([present, present * value, present * value**2], axis=1)
    elif block.kind == "histogram":
        value, present = _values(x, block.names[0], where)
        start, bins = 0, 2
        while start < block.size:
            at = np.clip(np.floor((value + 1.0) / 2.0 * bins), 0, bins - 1).astype(np.int64)
            found[np.arange(n), start + at] = present
            start, bins = start + bins, 2 * bins
    elif block.kind == "correlation":
        pairs = [_values(x, name, where) for name in block.names]
        complete = np.prod([present for _, present in pairs], axis=0)
        values = np.stack([value for value, _ in pairs], axis=1) * complete[:, None]
        rows, columns = np.triu_indices(len(block.names))
        products = values[:, rows] * values[:, columns]
        found[:] = np.concatenate([complete[:, None], values, products], axis=1)
    elif block.kind == "survival":
        found[np.arange(n), y] = 1.0
    else:
        at = np.zeros(n, dtype=np.int64)
        for name in block.names:
            at = at * (len(_codes(contract, name)) + 1) + _position(x, where[name])
        found[np.arange(n), at] = 1.0
    return found


def _values(
    x: NDArray[np.float64], name: str, where: dict[str, tuple[int, int]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    start, _ = where[name]
    return x[:, start], x[:, start + 1]


def _position(x: NDArray[np.float64], place: tuple[int, int]) -> NDArray[np.int64]:
    """Which code each row has; the number of codes for none."""
    codes = x[:, place[0] : place[1]]
    found: NDArray[np.int64] = np.where(codes.any(axis=1), codes.argmax(axis=1), codes.shape[1])
    return found


def _group(
    model: Statistics,
    contract: Contract,
    x: NDArray[np.float64],
    y: NDArray[np.int64],
    where: dict[str, tuple[int, int]],
) -> NDArray[np.int64]:
    if not model.by:
        return np.zeros(len(x), dtype=np.int64)
    return _position(x, where[model.by]) if model.by in where else y


def _codes(contract: Contract, name: str) -> tuple[str, ...]:
    feature = next(feature for feature in contract.features if feature.name == name)
    return feature.codes if isinstance(feature, Category) else ()


def _read(block: Block, contract: Contract, cells: Counts, noise_sd: float) -> dict[str, Estimate]:
    if block.kind == "rows":
        return estimates(lambda c: {"count": float(c[0])}, cells, noise_sd, (0.0, np.inf))
    if block.kind == "correlation":
        return estimates(lambda c: _correlations(block.names, c), cells, noise_sd, (-1.0, 1.0))
    if block.kind == "survival":
        return estimates(kaplan_meier, cells, noise_sd, (0.0, 1.0))
    if block.kind in ("moments", "histogram"):
        number = next(f for f in contract.features if f.name == block.names[0])
        if not isinstance(number, Number):
            return {}
        if block.kind == "moments":
            return estimates(lambda c: _moments(number, c), cells, noise_sd)
        found = estimates(lambda c: _quantiles(number, c), cells, noise_sd, (number.minimum, number.maximum))
        each = estimates(lambda c: _leaves(c), cells, noise_sd, (0.0, np.inf))
        return found | each
    names = [(*_codes(contract, name), _NONE) for name in block.names]
    labels = names[0] if len(names) == 1 else [f"{a} / {b}" for a in names[0] for b in names[1]]
    return estimates(lambda c: dict(zip(labels, map(float, c), strict=True)), cells, noise_sd, (0.0, np.inf))


def _moments(number: Number, cells: Counts) -> dict[str, float]:
    count, total, squares = map(float, cells)
    if count < 1.0:
        return {"count": count, "mean": math.nan, "sd": math.nan}
    half = (number.maximum - number.minimum) / 2
    mean = min(1.0, max(-1.0, total / count))
    variance = max(0.0, squares / count - mean**2)
    return {
        "count": count, "mean": number.minimum + (mean + 1.0) * half, "sd": half * math.sqrt(variance)
    }  # fmt: skip


def consistent(cells: Counts) -> Counts:
    """Counts of a dyadic tree's levels 2, 4, ... bins made to add up: the leaves, float64 [bins].

    Guarantee: the_tree_adds_up - least squares over all levels, each count as sure as any other.
    """
    levels: list[Counts] = []
    start, bins = 0, 2
    while start < len(cells):
        levels.append(cells[start : start + bins])
        start, bins = start + bins, 2 * bins
    # Bottom up, of each node the best of its own count and its children's sum (Hay et al., section 4.1).
    best = [levels[-1]]
    for height, level in enumerate(reversed(levels[:-1]), start=2):
        share = (2**height - 2 ** (height - 1)) / (2**height - 1)
        children = best[0].reshape(-1, 2).sum(axis=1)
        best.insert(0, share * level + (1 - share) * children)
    # Top down, what is missing is shared by the two children.
    final = best[0]
    for level in best[1:]:
        pairs = level.reshape(-1, 2)
        missing = final - pairs.sum(axis=1)
        final = (pairs + missing[:, None] / 2).reshape(-1)
    return final


def _leaves(cells: Counts) -> dict[str, float]:
    return {f"bin {at}": float(count) for at, count in enumerate(consistent(cells))}


def _quantiles(number: Number, cells: Counts) -> dict[str, float]:
    leaves = np.maximum(consistent(cells), 0.0)
    total = np.cumsum(leaves)
    if total[-1] < 1.0:
        return {f"quantile {q:g}": math.nan for q in QUANTILES}
    edges = np.linspace(number.minimum, number.maximum, len(leaves) + 1)
    shares = np.concatenate([[0.0], total / total[-1]])
    return {f"quantile {q:g}": float(np.interp(q, shares, edges)) for q in QUANTILES}


def _correlations(names: tuple[str, ...], cells: Counts) -> dict[str, float]:
    f, count = len(names), float(cells[0])
    rows, columns = np.triu_indices(f)
    products = np.zeros((f, f))
    products[rows, columns] = products[columns, rows] = cells[1 + f :]
    means = cells[1 : 1 + f] / count if count >= 1 else np.full(f, np.nan)
    covariance = products / max(count, 1.0) - np.outer(means, means)
    found = {}
    for i, j in zip(*np.triu_indices(f, 1), strict=True):
        spread = covariance[i, i] * covariance[j, j]
        value = covariance[i, j] / math.sqrt(spread) if spread > 0 else math.nan
        found[f"{names[i]} with {names[j]}"] = float(np.clip(value, -1.0, 1.0))
    return found


def kaplan_meier(exits: Counts) -> dict[str, float]:
    """The survival function at the end of each interval; ``exits`` [2 intervals], censored and events."""
    pairs = np.maximum(exits, 0.0).reshape(-1, 2)
    at_risk = np.cumsum(pairs.sum(axis=1)[::-1])[::-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        hazards = np.where(at_risk > 0, pairs[:, 1] / at_risk, 0.0)
    survival = np.cumprod(1.0 - np.clip(hazards, 0.0, 1.0))
    return {f"interval {at}": float(value) for at, value in enumerate(survival)}


def _log_rank(exits: Counts) -> dict[str, float]:
    """Mantel's statistic, its degrees of freedom and p-value over groups; ``exits`` [groups, 2 intervals]."""
    # Imported here: whoever only sizes a study need not wait for it.
    from scipy.special import chdtrc

    pairs = np.maximum(exits, 0.0).reshape(len(exits), -1, 2)
    at_risk = np.cumsum(pairs.sum(axis=2)[:, ::-1], axis=1)[:, ::-1]
    events = pairs[:, :, 1]
    n, d = at_risk.sum(axis=0), events.sum(axis=0)
    there = n > 1
    n, d, at_risk, events = n[there], d[there], at_risk[:, there], events[:, there]
    shares = at_risk / n
    difference = (events - shares * d).sum(axis=1)[:-1]
    scale = d * (n - d) / (n - 1)
    k = len(exits)
    same = np.eye(k - 1)
    variance = np.einsum("t,it,ijt->ij", scale, shares[:-1], same[:, :, None] - shares[None, :-1])
    try:
        statistic = float(difference @ np.linalg.solve(variance, difference))
    except np.linalg.LinAlgError:
        statistic = math.nan
    return {"statistic": statistic, "p": float(chdtrc(k - 1, statistic))}
