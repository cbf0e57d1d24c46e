"""Machines in the middle of their work, fed with sequences of messages from a party that holds real keys.

Rules: an input is a labelled list of messages; the world is made once and copied for each input; a refused
message leaves the machine as it was; what is accepted is checked against rules written again here. Towards a
hospital the hub and all other hospitals collude; towards the hub hospital 1 is hostile.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from common import messages
from common.encoding import labelled, split_labelled, u16
from common.errors import WardroundError
from common.ledger.tree import consistency_proof, leaf_hash, root
from common.messages import Kind, Reply, Request
from common.secagg import records
from common.secagg.hub import HubRound, HubSetup
from common.secagg.keys import self_seed
from common.secagg.records import Cohort, Open, PairSeed, Record, Upload
from common.secagg.site import Site
from common.secagg.state import RunState
from common.secagg.sums import Accumulator
from common.secagg.transcript import Transcript
from common.witness import Offer, Witness, read_state
from tests.common.secagg.federation import MODEL, Federation, public, signing_key
from tests.fuzz.mutation import split
from tests.fuzz.oracles import require

ME = 1
LABEL = "fuzz"
MAX_MESSAGES = 8
ACT = b"ready"
CHUNK = b"chunk"


def sequence(*parts: bytes) -> bytes:
    """An input: messages in their order."""
    return labelled(LABEL, *parts)


def read_sequence(data: bytes) -> list[bytes]:
    """The messages of an input; none for other bytes."""
    try:
        return split_labelled(LABEL, data, "input")[:MAX_MESSAGES]
    except WardroundError:
        return []


def kind_in(data: bytes, word: str) -> Kind | None:
    """The kind of a request or a reply by its own label."""
    parts = split(data)
    name = parts[0].decode("ascii", errors="replace").removeprefix(f"wardround/v1/{word}/") if parts else ""
    return messages.KINDS.get(name)


def repaired(signers: Callable[[Record], str], man: bytes) -> Callable[[bytes], bytes]:
    """What signs each record of each message of an input anew, as a hostile party can."""

    def one(data: bytes) -> bytes:
        for word, columns in (("request", 3), ("reply", 3)):
            kind, parts = kind_in(data, word), split(data) or []
            if kind is None or len(parts) < columns:
                continue
            record_type = kind.request if word == "request" else kind.reply
            if record_type is None:
                continue
            found = []
            for part in parts[columns:]:
                try:
                    record = records.decode(record_type, part)
                except WardroundError:
                    found.append(part)
                    continue
                found.append(records.encode(_signed(record, signers, man)))
            # The manifest's digest is where all mutations of it would end.
            fixed = [parts[0], man, *parts[2:3]] if word == "request" else parts[:3]
            return b"".join(len(p).to_bytes(8, "little") + p for p in (*fixed, *found))
        return data

    return lambda data: sequence(*map(one, read_sequence(data))) or data


def _signed(record: Record, signers: Callable[[Record], str], man: bytes) -> Record:
    if isinstance(record, records.Directory):
        return records.Directory(tuple(_signed(e, signers, man) for e in record.entries))  # type: ignore[misc]
    who = signers(record)
    return records.signed(record, man, signing_key(who).sign) if who and hasattr(record, "sig") else record


@dataclass(frozen=True)
class _World:
    """A federation after the uploads of round 1, the messages that were exchanged until then, and its round."""

    federation: Federation
    directory: records.Directory
    round: HubRound
    cohort: Cohort
    uploads: dict[int, Upload]
    payloads: dict[int, bytes]
    requests: tuple[bytes, ...]
    replies: tuple[bytes, ...]

    @property
    def man(self) -> bytes:
        return self.federation.params.man


def _request(man: bytes, kind: Kind, *parts: Record) -> bytes:
    return messages.encode_request(Request(kind, man, parts))


def _reply(kind: Kind, *parts: Record) -> bytes:
    return messages.encode_reply(Reply(kind, True, parts))


@cache
def world() -> _World:
    """Four hospitals, so that a cohort may lose one."""
    federation = Federation(4)
    man, hub = federation.params.man, federation.hub
    announced = {i: site.announce() for i, site in federation.sites.items()}
    for i, record in announced.items():
        hub.on_announce(i, record)
    directory = hub.directory()
    for i, site in federation.sites.items():
        hub.on_pair_seeds(i, site.on_directory(directory))
    joining = federation.disks[ME].state
    for i, site in federation.sites.items():
        hub.on_confirm(i, site.on_pair_seeds(hub.seeds_for(i)))
    for i, site in federation.sites.items():
        site.on_confirms(hub.confirms_for(i))
    federation.setup = hub.outcome()
    own_seeds = federation.sites[ME].on_directory(directory)
    round_ = federation.round(1)
    ready = federation.ready(round_)
    cohort = round_.cohort()
    uploads = {i: federation.sites[i].on_cohort(cohort) for i in cohort.ids}
    payloads = {i: federation.sites[i].payload() for i in cohort.ids}
    please = records.OpenPlease(uploads[ME].ctx)
    sign = signing_key("hub").sign
    result = records.signed(records.Result(please.ctx, bytes(32), MODEL), man, sign)
    second = records.signed(dataclasses.replace(round_.start, round=2), man, sign)
    three = Cohort(1, 2, cohort.members[:3])
    ask = partial(_request, man)
    requests = (
        ask(messages.DIRECTORY, directory),
        ask(messages.SEEDS, *hub.seeds_for(ME)),
        ask(messages.CONFIRMS, *hub.confirms_for(ME)),
        ask(messages.READY, round_.start),
        ask(messages.READY, second),
        ask(messages.UPLOAD, cohort),
        ask(messages.UPLOAD, three),
        ask(messages.OPEN, records.OpenPlease(records.context(man, second.dirh, MODEL, three))),
        ask(messages.OPEN, please),
        ask(messages.RESULT, result),
    )
    opening = Open(ME, please.ctx, self_seed(federation.disks[ME].state.s, please.ctx))
    replies = (
        _reply(messages.KEYS, announced[ME]),
        _reply(messages.DIRECTORY, *own_seeds),
        _reply(messages.SEEDS, federation.disks[ME].state.confirm or announced[ME]),
        _reply(messages.READY, ready[ME]),
        _reply(messages.UPLOAD, uploads[ME]),
        _reply(messages.OPEN, records.signed(opening, man, signing_key("site 1").sign)),
        *(_chunk(index, part) for index, part in enumerate(_cut(federation, payloads[ME]))),
    )
    made = _World(federation, directory, round_, cohort, uploads, payloads, requests, replies)
    _JOINING.append(joining)
    return made


_JOINING: list[RunState] = []


def _cut(federation: Federation, payload: bytes) -> list[bytes]:
    return [payload[span.start : span.stop] for span in federation.params.layout.spans]


def _chunk(index: int, data: bytes) -> bytes:
    return labelled(LABEL, CHUNK, u16(index), data)


@cache
def transcript() -> Transcript:
    """What the hub keeps of round 1, opened by all."""
    made, states = world(), world().federation.disks
    ctx, result = (
        made.uploads[ME].ctx,
        messages.decode_request(messages.RESULT.message_type, made.requests[-1]),
    )
    openings = (
        records.signed(
            Open(i, ctx, self_seed(states[i].state.s, ctx)), made.man, signing_key(f"site {i}").sign
        )
        for i in made.cohort.ids
    )
    uploads = tuple(made.uploads[i] for i in made.cohort.ids)
    return Transcript(made.round.start, made.cohort, uploads, tuple(openings), result.records[0])  # type: ignore[arg-type]


# -- a hospital --------------------------------------------------------------------------------------------------


class _Record:
    """What a machine has made durable; the states must be readable again."""

    def __init__(self) -> None:
        self.states: list[RunState] = []

    def __call__(self, state: RunState) -> None:
        require(RunState.from_bytes(state.to_bytes()) == state, "a stored state is not read back")
        self.states.append(state)


def _site(state: RunState) -> tuple[Site, _Record]:
    federation, disk = world().federation, _Record()
    site = Site(
        federation.site_params(ME),
        persist=disk,
        entropy=lambda size: hashlib.shake_256(len(disk.states).to_bytes(2, "little")).digest(size),
        sign=signing_key("site 1").sign,
        state=state,
    )
    return site, disk


def _feed(site: Site, request: Request) -> Any:
    first = request.records[0] if request.records else None
    machine: dict[str, Callable[[], Any]] = {
        messages.DIRECTORY.message_type: lambda: site.on_directory(first),  # type: ignore[arg-type]
        messages.SEEDS.message_type: lambda: site.on_pair_seeds(request.records),  # type: ignore[arg-type]
        messages.CONFIRMS.message_type: lambda: site.on_confirms(request.records),  # type: ignore[arg-type]
        messages.READY.message_type: lambda: site.on_round_start(first),  # type: ignore[arg-type]
        messages.UPLOAD.message_type: lambda: site.on_cohort(first),  # type: ignore[arg-type]
        messages.OPEN.message_type: lambda: site.on_open_please(first),  # type: ignore[arg-type]
        messages.RESULT.message_type: lambda: site.on_result(first),  # type: ignore[arg-type]
        messages.KEYS.message_type: site.announce,
    }
    return machine[request.kind.message_type]() if request.kind.message_type in machine else None


class _Watched:
    """A hospital under the rules of PROTOCOL, written again: what it may upload and open."""

    def __init__(self, state: RunState) -> None:
        self.site, self.disk = _site(state)
        self.payloads: dict[bytes, Upload] = {}
        self.opened: dict[int, bytes] = {}
        if state.header is not None:
            self.payloads[state.header.ctx] = state.header

    def handle(self, data: bytes) -> bool:
        site, before = self.site, self.site._state
        written, vectors = len(self.disk.states), site._vectors
        try:
            if data == ACT:
                site.ready(*world().federation.vectors(ME, before.round), before.model_digest)
                return True
            kind = kind_in(data, "request")
            if kind is None:
                return False
            request = messages.decode_request(kind.message_type, data)
            answer = _feed(site, request)
        except WardroundError:
            require(site._state is before, "a refused message changed the state")
            require(len(self.disk.states) == written, "a refused message was made durable")
            require(site._vectors is vectors, "a refused message changed the vectors")
            return False
        self.check(before, request, answer)
        return True

    def check(self, before: RunState, request: Request, answer: Any) -> None:
        after = self.site._state
        require(after.round >= before.round, "a round number went back")
        require(not before.dirh or after.closed or after.dirh == before.dirh, "a second directory")
        require(self.disk.states[-1:] in ([], [after]), "the state in memory is not the durable one")
        if after.round != before.round:
            start = request.records[0]
            require(
                isinstance(start, records.RoundStart) and start.round == after.round,
                "a round began by itself",
            )
            records.check_signature(start, before.man, public("hub"), "the hub")
            require(not (after.s or after.payload or after.opened), "an earlier round was kept")
        if isinstance(answer, Upload):
            self.uploaded(before, request.records[0], answer)  # type: ignore[arg-type]
        if isinstance(answer, Open):
            require(answer.ctx == request.records[0].ctx, "another context was opened")  # type: ignore[attr-defined]
            require(before.header is not None and answer.ctx == before.header.ctx, "not the latest upload")
            require(
                self.opened.setdefault(after.round, answer.ctx) == answer.ctx, "two contexts of one round"
            )

    def uploaded(self, before: RunState, cohort: Cohort, header: Upload) -> None:
        ctx = records.context(before.man, before.dirh, before.model_digest, cohort)
        require(header.ctx == ctx, "an upload for another context")
        require(self.payloads.setdefault(ctx, header) == header, "two payloads for one context")
        if header == before.header:
            require(self.site._state is before, "a resent upload changed the state")
            return
        ids, params = list(cohort.ids), world().federation.params
        require(before.opened is None and cohort.round == before.round, "an upload after the opening")
        require(before.attempt < cohort.attempt <= params.attempts, "an attempt that is not the next")
        require(ids == sorted(set(ids)) and len(ids) >= params.m and ME in ids, "a bad cohort")
        require(set(ids) <= {ME, *before.accepted}, "a cohort with a stranger")


def in_a_round(data: bytes) -> bool:
    """A hospital after its upload in round 1: what the hub and all others may make it do."""
    watched = _Watched(world().federation.disks[ME].state)
    fixture = world().federation.sites[ME]
    watched.site._accepted_here, watched.site._seed = True, fixture._seed
    if fixture._vectors is not None:
        watched.site._vectors = tuple(words.copy() for words in fixture._vectors)  # type: ignore[assignment]
    accepted = [watched.handle(part) for part in read_sequence(data)]
    return all(accepted)


def while_joining(data: bytes) -> bool:
    """A hospital that has sealed its seeds: a directory, seeds and confirmations of any content."""
    world()
    announced = dataclasses.replace(_JOINING[0], dirh=b"", listed=(), sent=(), keys=())
    found = []
    for state in (announced, _JOINING[0]):
        watched = _Watched(state)
        accepted = [watched.handle(part) for part in read_sequence(data)]
        found.append(all(accepted))
    return any(found)


def _other_hospital(record: Record) -> str:
    if isinstance(record, records.RoundStart | records.Result):
        return "hub"
    if isinstance(record, records.PairSeed):
        i, j = record.i, record.j
        return f"site {j if i == ME else i}"
    who = getattr(record, "id", 0)
    return f"site {who}" if who in (2, 3, 4) else ""


def repair_request(data: bytes) -> bytes:
    """Signed by the hub, or by one of the other hospitals."""
    return repaired(_other_hospital, world().man)(data)


def site_seeds() -> Iterator[bytes]:
    requests = world().requests
    for request in requests:
        yield sequence(request)
    directory, seeds, confirms, first, second, whole, three, open_three, open_whole, result = requests
    yield sequence(whole, open_whole, result)
    yield sequence(three, open_three)
    yield sequence(three, open_whole)
    yield sequence(second, ACT, whole, open_whole)
    yield sequence(open_whole, three, open_three, result, second, ACT)
    yield sequence(directory, seeds, confirms, first, ACT, whole, open_whole)


def joining_seeds() -> Iterator[bytes]:
    directory, seeds, confirms, first, *_ = world().requests
    yield sequence(directory)
    yield sequence(seeds)
    yield sequence(directory, seeds)
    yield sequence(seeds, confirms)
    yield sequence(seeds, confirms, first, ACT)
    entries = list(world().directory.entries)
    for keys in (bytes(1184), b"\xff" * 1184):
        worse = dataclasses.replace(entries[1], mlkem=keys, x25519=bytes(32))
        yield repair_request(
            sequence(
                _request(
                    world().man, messages.DIRECTORY, records.Directory((entries[0], worse, *entries[2:]))
                )
            )
        )


# -- the hub -------------------------------------------------------------------------------------------------------


def _unchanged(before: object, after: object) -> None:
    require(before == after, "a refused message changed the hub")


def _replies(data: bytes) -> Iterator[tuple[str, Reply | tuple[int, bytes]]]:
    """(message type, reply) or ("chunk", (index, data)); what cannot be decoded is left out."""
    for part in read_sequence(data):
        fields = split(part) or []
        if len(fields) == 4 and fields[1] == CHUNK:
            yield "chunk", (int.from_bytes(fields[2], "little"), fields[3])
        elif (kind := kind_in(part, "reply")) is not None:
            try:
                yield kind.message_type, messages.decode_reply(kind.message_type, part)
            except WardroundError:
                continue


def _others(table: dict[Any, Any]) -> dict[Any, Any]:
    return {
        key: value
        for key, value in table.items()
        if key not in (ME,) and not (isinstance(key, tuple) and ME in key)
    }


def hub_setup(data: bytes) -> bool:
    """The hub's setup, complete but for hospital 1, which sends what it likes."""
    made, hub = world(), HubSetup(world().federation.params)
    genuine = made.federation.hub
    hub._announced, hub._seeds, hub._confirms = (
        dict(genuine._announced), dict(genuine._seeds), _others(genuine._confirms),
    )  # fmt: skip
    hub._seeds = {pair: seed for pair, seed in hub._seeds.items() if ME not in pair}
    hub._directory, hub._dirh = genuine._directory, genuine._dirh
    accepted = []
    for message_type, reply in _replies(data):
        before = (dict(hub._announced), hub._directory, hub._dirh, dict(hub._seeds), dict(hub._confirms))
        try:
            done = isinstance(reply, Reply) and reply.available and _to_setup(hub, message_type, reply)
        except WardroundError:
            done = False
        after = (dict(hub._announced), hub._directory, hub._dirh, dict(hub._seeds), dict(hub._confirms))
        if not done:
            _unchanged(before, after)
        require(
            after[0] == before[0] and after[1:3] == before[1:3], "an announcement or a directory was changed"
        )
        require(_others(after[4]) == _others(before[4]), "another's confirmation was changed")
        changed = {pair for pair in after[3] if after[3][pair] != before[3].get(pair)}
        require(
            all(ME in pair and pair not in before[3] for pair in changed), "a seed that was final was changed"
        )
        hub.outcome()
        accepted.append(bool(done))
    return bool(accepted) and all(accepted)


def _to_setup(hub: HubSetup, message_type: str, reply: Reply) -> bool:
    match message_type:
        case messages.KEYS.message_type:
            hub.on_announce(ME, reply.records[0])  # type: ignore[arg-type]
        case messages.DIRECTORY.message_type:
            hub.on_pair_seeds(ME, reply.records)  # type: ignore[arg-type]
        case messages.SEEDS.message_type:
            hub.on_confirm(ME, reply.records[0])  # type: ignore[arg-type]
        case _:
            return False
    return True


def hub_round(data: bytes) -> bool:
    """A round in which all but hospital 1 have uploaded; its accumulator too."""
    made = world()
    hub = object.__new__(HubRound)
    hub.__dict__.update(made.round.__dict__)
    hub._ready = dict(made.round._ready)
    hub._accumulator = accumulator = Accumulator(
        made.federation.params, made.cohort, made.round.accumulator.ctx
    )
    for i in made.cohort.ids[1:]:
        accumulator._headers[i] = made.uploads[i]
        accumulator._missing[i] = set()
    accepted = []
    for message_type, reply in _replies(data):
        # The hub asks to open as soon as it can.
        hub._asked_to_open = hub._asked_to_open or not hub.missing_uploads()
        before = _round_state(hub)
        try:
            done = _to_round(hub, message_type, reply)
        except WardroundError:
            done = False
        after = _round_state(hub)
        if not done:
            _unchanged(before, after)
        require(
            all(_others(a) == _others(b) for a, b in zip(before[:4], after[:4], strict=True)),
            "another's was changed",
        )
        header = after[1].get(ME)
        if header is not None:
            records.check_signature(header, made.man, public("site 1"), "hospital 1")
        if before[4] != after[4]:
            require(
                message_type in ("chunk", messages.OPEN.message_type), "a sum was changed by another message"
            )
            gone = before[2].get(ME, set()) - after[2].get(ME, set())
            require(
                len(gone) == 1 or ME in after[3].keys() - before[3].keys(),
                "a chunk or an opening counted twice",
            )
        accepted.append(done)
    return bool(accepted) and all(accepted)


def _round_state(hub: HubRound) -> tuple[dict[int, Any], ...]:
    total = hub.accumulator
    sums = {0: (total._params_sum.tobytes(), total._scalars_sum.tobytes(), hub._cohort, hub._asked_to_open)}
    missing = {i: set(left) for i, left in total._missing.items()}
    return dict(hub._ready), dict(total._headers), missing, dict(total._openings), sums


def _to_round(hub: HubRound, message_type: str, reply: Reply | tuple[int, bytes]) -> bool:
    if isinstance(reply, tuple):
        hub.on_chunk(ME, *reply)
        return True
    if not reply.available:
        return False
    match message_type:
        case messages.READY.message_type:
            hub.on_ready(ME, reply.records[0])  # type: ignore[arg-type]
        case messages.UPLOAD.message_type:
            hub.on_upload(ME, reply.records[0])  # type: ignore[arg-type]
        case messages.OPEN.message_type:
            hub.on_open(ME, reply.records[0])  # type: ignore[arg-type]
        case _:
            return False
    return True


def repair_reply(data: bytes) -> bytes:
    """Signed by hospital 1."""
    return repaired(lambda record: "site 1", world().man)(data)


def setup_seeds() -> Iterator[bytes]:
    keys, seeds, confirm, *_ = world().replies
    yield from (sequence(keys), sequence(seeds), sequence(confirm), sequence(keys, seeds, confirm))
    sealed = records.decode(PairSeed, (split(seeds) or [])[3])
    other = records.signed(
        dataclasses.replace(sealed, ct=bytes(len(sealed.ct))), world().man, signing_key("site 1").sign
    )
    yield sequence(seeds, _reply(messages.DIRECTORY, other))


def round_seeds() -> Iterator[bytes]:
    _, _, _, ready, upload, opening, *chunks = world().replies
    yield from (sequence(ready), sequence(upload), sequence(upload, *chunks), sequence(upload, *chunks[::-1]))
    yield sequence(ready, upload, *chunks, opening)


# -- a witness -------------------------------------------------------------------------------------------------

LEAVES = tuple(leaf_hash(bytes([number])) for number in range(12))
KEYS = {0: public("hub"), **{i: public(f"site {i}") for i in (1, 2, 3, 4)}}


def _head(party: int, size: int, since: Iterable[int] = (), leaves: Sequence[bytes] = LEAVES) -> records.Head:
    proofs = tuple(records.Extension(old, consistency_proof(leaves[:size], old)) for old in since)
    head = records.Head(party, world().man, 1, bytes(32), size, root(leaves[:size]), proofs)
    return records.signed(head, world().man, signing_key(_owner(head)).sign)


def _owner(record: Record) -> str:
    who = getattr(record, "id", -1)
    return "hub" if who == 0 else f"site {who}" if who in KEYS else ""


@cache
def _remembered() -> tuple[bytes, Offer]:
    witness = Witness(ME, lambda data: None)
    witness.see(world().man, [_head(0, 3), _head(2, 5), _head(3, 8)], KEYS)
    head = witness.offer(
        world().man, records.HeadPlease(1, (2,)), bytes(32), LEAVES[:6], signing_key("site 1").sign
    )
    witness.take(world().man, [_cosign(2, head)], KEYS)
    return witness.to_bytes(), witness._offers[world().man]


def _cosign(party: int, head: records.Head) -> records.Cosign:
    cosign = records.Cosign(party, records.head_digest(head))
    return records.signed(cosign, world().man, signing_key(f"site {party}").sign)


def witness(data: bytes) -> bool:
    """The memory of hospital 1 among parties that sign any heads and cosignatures."""
    man, stored = world().man, list[bytes]()
    state, offer = _remembered()
    party = Witness(ME, stored.append, state)
    party._offers[man] = offer
    accepted = []
    for part in read_sequence(data):
        kind = kind_in(part, "request")
        before = (dict(party.seen), dict(party._offers), party.cosigned, len(stored))
        try:
            done = kind is not None and _to_witness(party, messages.decode_request(kind.message_type, part))
        except WardroundError:
            done = False
        if not done:
            require(
                before == (party.seen, party._offers, party.cosigned, len(stored)),
                "a refusal changed the memory",
            )
        accepted.append(done)
        for number, head in party.seen.items():
            known = before[0].get(number)
            if head is known:
                continue
            require(number in KEYS and number != ME, "a stranger's head was remembered")
            records.check_signature(head, man, KEYS[number], "its owner")
            if known is not None:
                require(head.size >= known.size, "a shorter ledger was believed")
                require(
                    head.size > known.size or head.root == known.root, "two roots of one size were believed"
                )
        if len(stored) > before[3]:
            require(read_state(stored[-1])[0] == party.seen, "what is remembered is not what is stored")
            require(Witness(ME, stored.append, stored[-1]).to_bytes() == party.to_bytes(), "not read back")
    return bool(accepted) and all(accepted)


def _to_witness(party: Witness, request: Request) -> bool:
    man, parts, sign = world().man, request.records, signing_key("site 1").sign
    match request.kind.message_type:
        case messages.HEAD.message_type:
            head = party.offer(man, parts[0], bytes(32), LEAVES[:6], sign)  # type: ignore[arg-type]
            require(head.size == 6, "a head of another ledger")
        case messages.COSIGN.message_type:
            answer = party.cosign(man, parts, KEYS, sign)  # type: ignore[arg-type]
            heads = {records.head_digest(head) for head in party.seen.values()}
            require(
                all(cosign.head in heads for cosign in answer.cosigns),
                "a head was cosigned and not remembered",
            )
        case messages.COSIGNED.message_type:
            count = party.take(man, parts, KEYS)  # type: ignore[arg-type]
            require(count <= len(KEYS) - 2, "more cosignatures than there are others")
        case _:
            return False
    return True


def repair_heads(data: bytes) -> bytes:
    """Signed by whoever the record names, hospital 1 apart."""
    return repaired(lambda record: "" if getattr(record, "id", ME) == ME else _owner(record), world().man)(
        data
    )


def witness_seeds() -> Iterator[bytes]:
    ask = partial(_request, world().man)
    yield sequence(ask(messages.HEAD, records.HeadPlease(1, (0, 1, 4, 6))))
    longer = (_head(0, 4, (3,)), _head(2, 9, (5,)), _head(3, 8), _head(4, 2))
    yield sequence(ask(messages.COSIGN, *longer))
    yield sequence(*(ask(messages.COSIGN, head) for head in longer))
    yield sequence(ask(messages.COSIGN, _head(2, 4), _head(3, 9), _head(2, 6, (5,), LEAVES[::-1])))
    offered = _remembered()[1].head
    cosigns = [_cosign(i, offered) for i in (2, 3, 4)]
    yield sequence(ask(messages.COSIGNED, *cosigns))
    yield sequence(ask(messages.HEAD, records.HeadPlease(2, ())), ask(messages.COSIGNED, *cosigns))
