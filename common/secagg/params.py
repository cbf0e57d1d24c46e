"""What one run is, as both sides of the protocol see it, and what a hospital refuses by itself.

Source: PROTOCOL.md "Bytes" (widths) and "A hospital itself refuses". Rules: plain values taken from the
manifest and the roster; nothing here trusts that somebody else checked them.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from common.errors import RefusedError
from common.secagg.codec import Layout, fits

HUB: Final = 0
MAX_MEMBERS: Final = 1000
MAX_ATTEMPTS: Final = 3
MAX_ROUNDS: Final = 10_000
MAX_WORDS: Final = 1 << 28
_MINUTE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}Z")


@dataclass(frozen=True, slots=True)
class RunParams:
    """One run of one manifest.

    ``man`` manifest digest (32 bytes); ``parameters`` >= 1 and ``scalars`` >= 0 are lengths of the two
    vectors; ``bits`` 16 or 32; ``step``, ``range`` > 0 in units of a parameter; ``masked`` False only where
    the hub is to see every update; ``me`` own id, or HUB at the hub; ``members`` ascending ids 1..65535;
    ``keys`` raw Ed25519 protocol keys of at least all members; ``t`` colluders, ``m`` smallest cohort,
    ``rho`` rollbacks; ``expiry`` "YYYY-MM-DDTHH:MMZ"; ``noise`` the variance of one hospital's share for each
    size of a cohort from m to n, in squared grid units, or nothing where none is shared.
    """

    man: bytes
    parameters: int
    scalars: int
    bits: int
    step: float
    range: float
    rounding: Literal["nearest", "dither"]
    masked: bool
    me: int
    members: tuple[int, ...]
    keys: Mapping[int, bytes] = field(repr=False)
    hub_key: bytes = field(repr=False)
    t: int
    m: int
    rho: int
    attempts: int
    rounds_max: int
    state_norm_bound: float
    expiry: str
    noise: tuple[int, ...] = ()

    def noise_of(self, cohort: int) -> int:
        """The variance of one share in a cohort of that size, 0 where no noise is shared."""
        return self.noise[cohort - self.m] if self.noise else 0

    @property
    def layout(self) -> Layout:
        """How a payload of this run is laid out."""
        return Layout(self.parameters, self.scalars, self.bits)


def smallest_cohort(n: int, t: int, rho: int) -> int:
    """The lower bound of m: two cohorts then share an honest member that was not rolled back.

    Guarantee: cohorts_share_an_honest_member - checked over all small n, t, rho by counting.
    """
    return max(3, t + 2, -(-2 * n // 3), -(-(n + t + rho + 1) // 2))


def _whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _positive(value: object) -> bool:
    return _whole(value, 1, 1 << 53) or (type(value) is float and math.isfinite(value) and value > 0)


def valid_minute(text: str) -> bool:
    """Whether ``text`` has the shape "YYYY-MM-DDTHH:MMZ", so that texts compare as times."""
    return _MINUTE.fullmatch(text) is not None


def check_params(params: RunParams, *, outsiders_only: bool = False) -> None:
    """Refuse every run that a hospital must not join, whoever approved it. Raises RefusedError with the rule.

    ``outsiders_only`` is the hospital's own policy: it alone admits t = 0.

    Guarantee: bounds_are_refused - each bound of PROTOCOL.md, one past it.
    """
    remedy = "Ask the coordinator for a manifest that keeps this rule."
    for holds, code, problem in _rules(params, lowest_t=0 if outsiders_only else 1):
        if not holds:
            raise RefusedError("secagg.params." + code, problem, remedy=remedy)


def _rules(p: RunParams, lowest_t: int) -> Iterator[tuple[bool, str, str]]:
    """Whether each rule holds, its code and its text; a rule is asked only when those before it hold."""
    n = len(p.members)
    yield type(p.man) is bytes and len(p.man) == 32, "man", "the manifest digest must have 32 bytes"
    yield 3 <= n <= MAX_MEMBERS, "members", f"a run has 3 to {MAX_MEMBERS} members"
    yield all(_whole(i, 1, 65535) for i in p.members), "members", "member ids must be 1 to 65535"
    ascending = all(a < b for a, b in itertools.pairwise(p.members))
    yield ascending, "members", "member ids must ascend without repetition"
    yield set(p.members) <= set(p.keys), "keys", "every member must be in the roster"
    keys = [p.keys[i] for i in p.members] + [p.hub_key]
    yield all(type(k) is bytes and len(k) == 32 for k in keys), "keys", "a protocol key must have 32 bytes"
    yield len(set(keys)) == n + 1, "keys", "the keys of the members and of the hub must all differ"
    yield p.me == HUB or p.me in p.members, "me", "this hospital is not a member of the run"
    yield _whole(p.rho, 0, n), "rho", "rho must be a whole number from 0 to n"
    problem = "t must be at least 1: with t = 0 one curious hospital sees through a sum"
    yield _whole(p.t, lowest_t, n), "t", problem
    bound = smallest_cohort(n, p.t, p.rho)
    yield _whole(p.m, bound, n), "m", f"m must be from {bound} to {n} for these n, t and rho"
    yield _whole(p.attempts, 1, MAX_ATTEMPTS), "attempts", f"attempts must be 1 to {MAX_ATTEMPTS}"
    yield _whole(p.rounds_max, 1, MAX_ROUNDS), "rounds", f"rounds_max must be 1 to {MAX_ROUNDS}"
    yield p.bits in (16, 32), "bits", "the codec has 16 or 32 bits"
    yield p.rounding in ("nearest", "dither"), "rounding", "rounding is nearest or dither"
    yield type(p.masked) is bool, "masked", "masked is true or false"
    yield _whole(p.parameters, 1, MAX_WORDS), "dims", f"parameters must be 1 to {MAX_WORDS}"
    yield _whole(p.scalars, 0, MAX_WORDS), "dims", f"scalars must be 0 to {MAX_WORDS}"
    yield _positive(p.step), "step", "step must be a finite number above 0"
    yield _positive(p.range), "range", "range must be a finite number above 0"
    yield _positive(p.state_norm_bound), "norm", "the state norm bound must be finite and above 0"
    whole = type(p.noise) is tuple and all(_whole(v, 1, 1 << 52) for v in p.noise)
    problem = "shared noise has a variance for each cohort, under masks, and no scalars"
    told = not p.noise or (len(p.noise) == n - p.m + 1 and p.masked and not p.scalars)
    yield whole and told, "noise", problem
    problem = f"{n} hospitals can overflow {p.bits} bits: range / step is too large"
    cohorts = range(p.m, n + 1) if p.noise else (p.m, n)
    yield all(fits(u, p.bits, p.step, p.range, p.noise_of(u)) for u in cohorts), "overflow", problem
    minute = type(p.expiry) is str and valid_minute(p.expiry)
    yield minute, "expiry", "expiry must be YYYY-MM-DDTHH:MMZ"
