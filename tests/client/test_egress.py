"""What ``site show --egress`` lists, against every reply of a real study."""

from collections import Counter
from collections.abc import Iterator

import pytest

from client.egress import leaving, text
from client.participation import Participation
from common import messages
from common.run import run_params
from tests.client.federation import ComputedHere, Federation, Hub

EXACT = {
    *("query.keys", "query.seeds", "query.confirms", "query.cosigned"),
    *("train.ready", "train.upload", "train.open", "query.result", "query.close"),
}


@pytest.fixture
def hub(federation: Federation) -> Iterator[Hub]:
    sites = {n: Participation(federation.sites[n], computation=ComputedHere) for n in (1, 2, 3)}
    made = Hub(federation, federation.manifest(training__rounds=3), sites).joined()
    yield made
    for site in made.sites.values():
        site.close()


def test_every_message_is_listed(hub: Hub) -> None:
    for _ in range(3):
        hub.whole_round()
    hub.end()
    hub.ask(1, messages.CONSENT)
    params = run_params(hub.manifest, hub.admitted, hub.federation.verified_roster, 1)
    found = {one.message: one for one in leaving(params)}
    assert found.keys() == messages.KINDS.keys()
    seen: Counter[tuple[int, str]] = Counter()
    for number, kind, reply, payload in hub.frames:
        one = found[kind]
        seen[number, kind] += 1
        assert messages.decode_reply(kind, reply).available or kind == "query.consent"
        assert len(reply) <= one.size_bytes
        assert sum(map(len, payload)) == one.payload_bytes
        if kind in EXACT:
            assert len(reply) == one.size_bytes, kind
        assert one.times is None or seen[number, kind] <= one.times
    assert {kind for _, kind in seen} == found.keys()


def test_fields_are_the_records_own_columns(hub: Hub) -> None:
    found = {one.message: one for one in leaving(hub.params)}
    for kind in messages.KINDS.values():
        listed = [line.strip().partition(":")[0] for line in found[kind.message_type].fields[1:]]
        columns = [] if kind.reply is None else [name for name, _ in kind.reply.COLUMNS]
        assert listed == [*columns, *(["and the payload"] if kind is messages.UPLOAD else [])]


def test_the_list_for_people_names_every_message_and_says_what_is_not_masked(hub: Hub) -> None:
    shown = text(leaving(hub.params))
    assert all(kind in shown for kind in messages.KINDS)
    assert "NOT MASKED" not in shown
    payload = hub.params.layout.payload_bytes
    upload = next(one for one in leaving(hub.params) if one.message == "train.upload")
    assert f"{upload.size_bytes + payload:,}" in shown
