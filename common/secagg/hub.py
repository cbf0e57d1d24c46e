"""The hub's side of the secure sum, as machines without I/O: one for the setup, one for each round.

Source: PROTOCOL.md S1-S4, R0-R6 and the hub invariants C1-C7. Rules: ``sender`` is the identity of the
mutual TLS connection and must be the id in the message; every signature is verified before a message is
used or passed on; nothing that the hub does here is needed for the hospitals' secrecy.
"""

import itertools
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from common.errors import RefusedError
from common.secagg import records
from common.secagg.pairing import sender_of
from common.secagg.params import RunParams, check_params
from common.secagg.records import (
    Cohort,
    Confirm,
    Directory,
    KeyAnnounce,
    Open,
    OpenPlease,
    PairSeed,
    Ready,
    Record,
    Result,
    RoundStart,
    Tag,
    Upload,
)
from common.secagg.sums import Accumulator, Sums
from common.secagg.transcript import Transcript

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Setup:
    """What the setup of a run came to: its Directory and the pairs (i < j) that both sides confirmed."""

    directory: Directory = field(repr=False)
    dirh: bytes
    pairs: frozenset[tuple[int, int]]

    def cohort_among(self, ids: Collection[int]) -> tuple[int, ...]:
        """A set of ``ids``, ascending, in which every two have confirmed their pair.

        The one with the fewest pairs leaves first, of equals the highest id, until all are paired; who then
        fits comes back. Near the largest, not always it.

        Guarantee: cohorts_are_fully_paired - every two of the result are in ``pairs``, and none of ``ids``
        that is paired with all of them is left out.
        """
        known = sorted(set(ids) & {entry.id for entry in self.directory.entries})
        apart: dict[int, set[int]] = {i: set() for i in known}
        for i, j in itertools.combinations(known, 2):
            if (i, j) not in self.pairs:
                apart[i].add(j)
                apart[j].add(i)
        left = set(known)
        while left:
            worst = max(left, key=lambda i: (len(apart[i] & left), i))
            if not apart[worst] & left:
                break
            left.remove(worst)
        for i in known:
            if i not in left and not apart[i] & left:
                left.add(i)
        return tuple(sorted(left))


class HubSetup:
    """Collect S1, publish S2, pass on S3 and S4. May be driven again from the start: sites answer the same.

    ``directory`` is one that was published before: a run has one only, also after a restart of the hub.

    Raises: VerificationError, RefusedError; after either the machine is as it was.
    """

    def __init__(self, params: RunParams, directory: Directory | None = None) -> None:
        check_params(params, outsiders_only=True)
        self._params = params
        self._announced: dict[int, KeyAnnounce] = {}
        self._directory: Directory | None = None
        self._dirh = b""
        self._seeds: dict[tuple[int, int], PairSeed] = {}
        self._confirms: dict[int, Confirm] = {}
        if directory is not None:
            for entry in directory.entries:
                self.on_announce(entry.id, entry)
            self.directory()

    @property
    def listed(self) -> tuple[int, ...]:
        """Ids in the Directory, ascending; empty before it."""
        return tuple(entry.id for entry in self._directory.entries) if self._directory else ()

    def on_announce(self, sender: int, record: KeyAnnounce) -> None:
        """S1: keep the announcement of a member; the same again changes nothing, another is refused."""
        _from_sender(record, record.id, sender, self._params)
        _require(
            record.man == self._params.man, "announce.run", f"hospital {sender} announces for another run"
        )
        known = self._announced.get(sender)
        _require(known in (None, record), "announce.second", f"hospital {sender} announced other keys before")
        for other in self._announced.values():
            same = other.id != sender and (other.mlkem == record.mlkem or other.x25519 == record.x25519)
            _require(not same, "announce.duplicate", f"hospitals {sender} and {other.id} announce one key")
        _require(
            self._directory is None or known is not None,
            "announce.late",
            "the directory of this run is final",
        )
        self._announced[sender] = record

    def missing_announces(self) -> tuple[int, ...]:
        """Members that have not announced, ascending."""
        return tuple(i for i in self._params.members if i not in self._announced)

    def directory(self) -> Directory:
        """S2: the Directory of all that have announced; final from the first call on.

        Raises: RefusedError when fewer than m have announced.
        """
        if self._directory is None:
            entries = tuple(self._announced[i] for i in sorted(self._announced))
            _require(
                len(entries) >= self._params.m,
                "directory.small",
                f"{len(entries)} hospitals announced keys, and the run needs {self._params.m}",
            )
            self._dirh = records.directory_digest(self._params.man, entries)
            self._directory = Directory(entries)
        return self._directory

    def on_pair_seeds(self, sender: int, seeds: Iterable[PairSeed]) -> None:
        """S3: keep the sealed seeds of one hospital; the first of a pair is final."""
        checked = []
        for seed in seeds:
            right = (
                bool(self._dirh)
                and seed.man == self._params.man
                and seed.dirh == self._dirh
                and seed.i < seed.j
                and {seed.i, seed.j} <= set(self.listed)
            )
            _require(right, "seed.pair", f"hospital {sender} sent a seed for another pair, run or directory")
            _from_sender(seed, sender_of(seed.i, seed.j), sender, self._params)
            known = self._seeds.get((seed.i, seed.j), seed)
            _require(known == seed, "seed.second", f"hospital {sender} sent two seeds for one pair")
            checked.append(seed)
        self._seeds |= {(seed.i, seed.j): seed for seed in checked}

    def missing_seeds(self) -> tuple[tuple[int, int], ...]:
        """Pairs (i < j) of the Directory without a seed, ascending."""
        ids = self.listed
        return tuple((i, j) for i in ids for j in ids if i < j and (i, j) not in self._seeds)

    def seeds_for(self, member: int) -> tuple[PairSeed, ...]:
        """The sealed seeds that ``member`` has to be sent, ascending by pair."""
        found = (seed for pair, seed in sorted(self._seeds.items()) if member in pair)
        return tuple(seed for seed in found if sender_of(seed.i, seed.j) != member)

    def on_confirm(self, sender: int, record: Confirm) -> None:
        """S4: keep the latest confirmation of a hospital."""
        _from_sender(record, record.id, sender, self._params)
        _require(
            bool(self._dirh) and record.dirh == self._dirh,
            "confirm.run",
            "a confirmation of another directory",
        )
        _require(sender in self.listed, "confirm.stranger", f"hospital {sender} is not in the directory")
        # One tag for each peer: each is passed on by itself, and too many would cost others their pairs.
        peers = [peer for peer, _ in record.tags]
        sound = peers == sorted(set(peers)) and set(peers) <= set(self.listed) - {sender}
        _require(sound, "confirm.tags", f"hospital {sender} confirms others than its peers, or one twice")
        self._confirms[sender] = record

    def missing_confirms(self) -> tuple[int, ...]:
        """Ids of the Directory that have not confirmed, ascending."""
        return tuple(i for i in self.listed if i not in self._confirms)

    def confirms_for(self, member: int) -> tuple[Tag, ...]:
        """The tags that ``member`` has to be sent, ascending: each hospital's one for it, and no other."""
        return tuple(
            Tag(i, tag)
            for i, confirm in sorted(self._confirms.items())
            for peer, tag in confirm.tags
            if peer == member
        )

    def outcome(self) -> Setup:
        """What the setup has come to so far: a pair counts when each has confirmed the other."""
        directory = self.directory()
        tagged = {i: {peer for peer, _ in confirm.tags} for i, confirm in self._confirms.items()}
        pairs = frozenset((i, j) for i in tagged for j in tagged[i] if i < j and i in tagged.get(j, set()))
        return Setup(directory, self._dirh, pairs)


class HubRound:
    """One round: start, cohort, uploads, openings, sum.

    ``state`` is state_digest of the bytes sent beside the start; ``deadline`` in seconds since 1970 UTC;
    ``sign`` signs with the hub key. Chunks may come from several threads.

    Raises: VerificationError, RefusedError; after either the machine is as it was.
    """

    def __init__(
        self,
        params: RunParams,
        setup: Setup,
        *,
        round: int,
        state: bytes,
        model_digest: bytes,
        deadline: int,
        sign: Callable[[bytes], bytes],
    ) -> None:
        check_params(params, outsiders_only=True)
        _require(
            1 <= round <= params.rounds_max, "round.number", f"a run has rounds 1 to {params.rounds_max}"
        )
        self._params = params
        self._setup = setup
        self._sign = sign
        self._lock = threading.RLock()
        self._ready: dict[int, Ready] = {}
        self._cohort: Cohort | None = None
        self._accumulator: Accumulator | None = None
        self._asked_to_open = False
        self._sums: Sums | None = None
        start = RoundStart(params.man, setup.dirh, round, state, model_digest, deadline)
        self.start = self._signed(start)

    def on_ready(self, sender: int, record: Ready) -> None:
        """R1: keep the first Ready of a hospital for this round."""
        _from_sender(record, record.id, sender, self._params)
        start = self.start
        same = (record.man, record.round, record.model_digest) == (start.man, start.round, start.model_digest)
        _require(same, "ready.round", f"hospital {sender} is ready for another round or model")
        with self._lock:
            known = self._ready.setdefault(sender, record)
        _require(known == record, "ready.second", f"hospital {sender} was ready with another vector before")

    def ready_ids(self) -> tuple[int, ...]:
        """Hospitals that are ready, ascending."""
        with self._lock:
            return tuple(sorted(self._ready))

    def possible(self) -> tuple[int, ...]:
        """The cohort there would be if no other hospital became ready, ascending."""
        return self._setup.cohort_among(self.ready_ids())

    def missing_ready(self) -> tuple[int, ...]:
        """Hospitals of the Directory that are not ready, ascending."""
        return tuple(e.id for e in self._setup.directory.entries if e.id not in self.ready_ids())

    def cohort(self, without: Collection[int] = ()) -> Cohort:
        """R2: begin the next attempt over all that are ready but ``without``; the last sum is dropped.

        Raises: RefusedError when attempts are used up, an opening was asked for, or fewer than m are left.
        """
        with self._lock:
            attempt = self._cohort.attempt + 1 if self._cohort else 1
            _require(
                not self._asked_to_open, "cohort.opened", "this round has been opened, and has one cohort"
            )
            _require(
                attempt <= self._params.attempts, "cohort.attempts", "all attempts of this round are used up"
            )
            ids = self._setup.cohort_among(set(self._ready) - set(without))
            _require(
                len(ids) >= self._params.m,
                "cohort.small",
                f"{len(ids)} hospitals can be summed together, and the study needs {self._params.m}",
            )
            cohort = Cohort(self.start.round, attempt, tuple((i, self._ready[i].nu) for i in ids))
            start = self.start
            ctx = records.context(start.man, start.dirh, start.model_digest, cohort)
            self._cohort, self._accumulator = cohort, Accumulator(self._params, cohort, ctx)
            return cohort

    @property
    def accumulator(self) -> Accumulator:
        """The sum of the present attempt, with its headers and openings. Raises RefusedError before R2."""
        with self._lock:
            if self._accumulator is None:
                raise RefusedError("secagg.cohort.none", "this round has no cohort yet")
            return self._accumulator

    def on_upload(self, sender: int, header: Upload) -> None:
        """R3: keep a header of the present attempt."""
        self.accumulator.add_header(sender, header)

    def on_chunk(self, sender: int, index: int, chunk: bytes) -> None:
        """R3: verify one chunk of a payload and add it, once."""
        self.accumulator.add_chunk(sender, index, chunk)

    def missing_chunks(self, member: int) -> tuple[int, ...]:
        """Indices of the chunks of ``member`` that are still to come, ascending."""
        return self.accumulator.missing_chunks(member)

    def missing_uploads(self) -> tuple[int, ...]:
        """Ids of the cohort whose payload is not complete, ascending."""
        return self.accumulator.missing_uploads()

    def open_please(self) -> OpenPlease:
        """R4: ask to open, when all of the cohort have uploaded; from then on the cohort is final."""
        with self._lock:
            missing = self.accumulator.missing_uploads()
            _require(not missing, "open.early", f"hospitals {list(missing)} have not uploaded")
            self._asked_to_open = True
            return OpenPlease(self.accumulator.ctx)

    def on_open(self, sender: int, record: Open) -> None:
        """R5: check an opening against its commitment and take the self-mask off, once."""
        _require(self._asked_to_open, "open.early", "no opening has been asked for")
        self.accumulator.open(sender, record)

    def missing_openings(self) -> tuple[int, ...]:
        """Ids of the cohort that have not opened, ascending."""
        return self.accumulator.missing_openings()

    def finish(self) -> Sums:
        """The sums over the cohort. Raises FailureError when the result is void."""
        with self._lock:
            if self._sums is None:
                self._sums = self.accumulator.finish()
            return self._sums

    def result(self, model_digest: bytes) -> Result:
        """R6: the signed result, with the digest of the model that ``advance`` made of the sums."""
        return self._signed(Result(self.accumulator.ctx, self.finish().digest, model_digest))

    def transcript(self, result: Result) -> Transcript:
        """What is kept of the opened round. Raises RefusedError before R2."""
        cohort, headers, openings = self._cohort, self.accumulator.headers, self.accumulator.openings
        if cohort is None:
            raise RefusedError("secagg.cohort.none", "this round has no cohort yet")
        return Transcript(
            self.start,
            cohort,
            tuple(headers[i] for i in cohort.ids),
            tuple(openings[i] for i in cohort.ids),
            result,
        )

    def _signed(self, record: R) -> R:
        signed = records.signed(record, self._params.man, self._sign)
        records.check_signature(signed, self._params.man, self._params.hub_key, "the hub")
        return signed


def _require(holds: bool, code: str, problem: str) -> None:
    if not holds:
        raise RefusedError("secagg." + code, problem)


def _from_sender(record: Record, claimed: int, sender: int, params: RunParams) -> None:
    _require(claimed == sender, "sender", f"hospital {sender} sent a message in the name of {claimed}")
    _require(sender in params.members, "sender", f"hospital {sender} is not a member of the run")
    records.check_signature(record, params.man, params.keys[sender], f"hospital {sender}")
