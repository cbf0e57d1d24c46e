"""The setup against a hub that substitutes, withholds, relays, splits and repeats."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import pytest

from common.errors import RefusedError, VerificationError, WardroundError
from common.secagg import records
from common.secagg.hub import HubSetup
from common.secagg.pairing import SetupKeys, pair_info, seal_seed
from common.secagg.records import Confirm, Directory, KeyAnnounce, PairSeed, Tag
from tests.common.secagg.federation import Counter, Federation, signing_key

R = TypeVar("R", bound=records.Record)

HIGHEST = b"\xff" * 32


def announced(n: int = 4, name: str = "test") -> tuple[Federation, Directory]:
    federation = Federation(n, name)
    for i, site in federation.sites.items():
        federation.hub.on_announce(i, site.announce())
    return federation, federation.hub.directory()


def seeded(n: int = 4, name: str = "test") -> Federation:
    federation, directory = announced(n, name)
    for i, site in federation.sites.items():
        federation.hub.on_pair_seeds(i, site.on_directory(directory))
    return federation


def signed(record: R, i: int, man: bytes) -> R:
    return records.signed(record, man, signing_key(f"site {i}").sign)


def refuses(federation: Federation, i: int, call: Callable[[], object], match: str) -> None:
    """The call raises, and neither the disk nor the answer to a good message changes."""
    before = list(federation.disks[i].versions)
    with pytest.raises(WardroundError, match=match):
        call()
    assert federation.disks[i].versions == before


def test_all_pairs_are_accepted_and_the_setup_keys_erased() -> None:
    federation = Federation(5)
    setup = federation.pair()
    for i, site in federation.sites.items():
        assert site.accepted == set(federation.ids) - {i}
        assert site.disputed == frozenset()
        state = federation.disks[i].state
        assert state.setup is None
        first = federation.disks[i].versions[0]
        secret = SetupKeys.new(Counter(f"test/{i}"))
        assert secret.x25519_key in first
        assert secret.x25519_key not in federation.disks[i].versions[-1]
        assert secret.mlkem_seed not in federation.disks[i].versions[-1]
    assert setup.pairs == {(i, j) for i in federation.ids for j in federation.ids if i < j}


def test_both_of_a_pair_hold_one_key_and_no_two_pairs_share_one() -> None:
    federation = Federation(6)
    federation.pair()
    held = {i: dict(federation.disks[i].state.keys) for i in federation.ids}
    pairs = {(i, j): held[i][j] for i in held for j in held[i] if i < j}
    assert all(held[j][i] == key for (i, j), key in pairs.items())
    assert len(set(pairs.values())) == len(pairs) == 15


def test_the_announcement_is_made_once() -> None:
    federation = Federation(3)
    first = federation.sites[1].announce()
    assert federation.sites[1].announce() == first
    assert federation.restart(1).announce() == first
    assert len(federation.disks[1].versions) == 1


def test_one_directory_per_run() -> None:
    federation, directory = announced(4)
    site = federation.sites[1]
    site.on_directory(directory)
    others = [Directory(tuple(e for e in directory.entries if e.id != left)) for left in (2, 3, 4)]
    for again, other in itertools.product((site, federation.restart(1)), others):
        refuses(federation, 1, partial(again.on_directory, other), "one directory")


def test_resent_seeds_are_identical() -> None:
    federation, directory = announced(4)
    seeds = {i: site.on_directory(directory) for i, site in federation.sites.items()}
    for i in federation.ids:
        assert federation.sites[i].on_directory(directory) == seeds[i]
        assert federation.restart(i).on_directory(directory) == seeds[i]
    assert sum(len(s) for s in seeds.values()) == 6


def directories(federation: Federation, good: Directory) -> list[tuple[Directory, str]]:
    entries, man = good.entries, federation.params.man
    other = SetupKeys.new(Counter("other")).public()

    def at(i: int, entry: KeyAnnounce) -> Directory:
        return Directory(tuple(entry if e.id == i else e for e in entries))

    stranger = signed(KeyAnnounce(9, man, *other), 9, man)
    twin = signed(KeyAnnounce(3, man, entries[1].mlkem, other[1]), 3, man)
    half = signed(KeyAnnounce(3, man, other[0], entries[1].x25519), 3, man)
    return [
        (at(3, signed(KeyAnnounce(3, man, *other), 4, man)), "not signed by hospital 3"),
        (at(3, dataclasses.replace(entries[2], x25519=other[1])), "not signed by hospital 3"),
        (at(3, dataclasses.replace(entries[2], sig=bytes(64))), "not signed by hospital 3"),
        (at(1, signed(KeyAnnounce(1, man, *other), 1, man)), "that this hospital announced"),
        (at(3, signed(KeyAnnounce(3, bytes(32), *other), 3, bytes(32))), "another run"),
        (at(3, signed(KeyAnnounce(3, HIGHEST, *other), 3, HIGHEST)), "another run"),
        (at(3, twin), "one key"),
        (at(3, half), "one key"),
        (Directory(entries[1:]), "this hospital announced"),
        (Directory(entries[:2]), "at least 3"),
        (Directory(()), "at least 3"),
        (Directory((*entries, stranger)), "members only"),
        (Directory((entries[1], entries[0], *entries[2:])), "ascending"),
        (Directory((entries[0], *entries)), "ascending"),
    ]


def test_a_false_directory_is_refused() -> None:
    federation, good = announced(4)
    for false, match in directories(federation, good):
        refuses(federation, 1, partial(federation.sites[1].on_directory, false), match)
    assert federation.sites[1].on_directory(good)


def test_a_directory_before_the_announcement_is_refused() -> None:
    federation, good = announced(4)
    fresh = Federation(4, "late")
    refuses(fresh, 1, lambda: fresh.sites[1].on_directory(good), "announced")
    refuses(fresh, 1, lambda: fresh.sites[1].on_pair_seeds(()), "no directory")
    refuses(fresh, 1, lambda: fresh.sites[1].on_confirms(()), "no directory")
    assert federation.sites[1].accepted == frozenset()


def test_a_member_whose_key_is_no_key_costs_its_own_pairs_only() -> None:
    federation, good = announced(4)
    man = federation.params.man
    bad = signed(KeyAnnounce(2, man, b"\xff" * 1184, good.entries[1].x25519), 2, man)
    directory = Directory((good.entries[0], bad, *good.entries[2:]))
    # 1 sends to 2 and 4, as the differences are odd.
    seeds = federation.sites[1].on_directory(directory)
    assert [(seed.i, seed.j) for seed in seeds] == [(1, 4)]
    assert federation.sites[1].disputed == {2}


def test_false_seeds_are_refused() -> None:
    federation = seeded(4)
    man = federation.params.man
    # 3 seals for 1 (difference 2, the higher), 1 seals for 2 and 4.
    good = federation.hub.seeds_for(1)
    assert [(seed.i, seed.j) for seed in good] == [(1, 3)]
    seed = good[0]
    between_others = federation.hub.seeds_for(3)[0]
    assert 1 not in (between_others.i, between_others.j)
    own = federation.sites[1].on_directory(federation.hub.directory())[0]
    cases = [
        (dataclasses.replace(seed, sig=bytes(64)), "not signed by hospital 3"),
        (dataclasses.replace(seed, ct=bytes(1168)), "not signed by hospital 3"),
        (signed(dataclasses.replace(seed), 2, man), "not signed by hospital 3"),
        (signed(dataclasses.replace(seed, man=bytes(32)), 3, man), "another run"),
        (signed(dataclasses.replace(seed, man=HIGHEST), 3, man), "another run"),
        (signed(dataclasses.replace(seed, dirh=bytes(32)), 3, man), "another run"),
        (signed(dataclasses.replace(seed, dirh=HIGHEST), 3, man), "another run"),
        (between_others, "not for here"),
        (own, "wrong one of the pair"),
        (signed(PairSeed(man, seed.dirh, 3, 1, seed.ct), 3, man), "not for here"),
        (signed(PairSeed(man, seed.dirh, 1, 1, seed.ct), 3, man), "not for here"),
        (signed(PairSeed(man, seed.dirh, 1, 9, seed.ct), 9, man), "outside the directory|wrong one"),
        (signed(PairSeed(man, seed.dirh, 1, 7, seed.ct), 7, man), "outside the directory"),
    ]
    for false, match in cases:
        refuses(federation, 1, partial(federation.sites[1].on_pair_seeds, [false]), match)
        refuses(federation, 1, partial(federation.sites[1].on_pair_seeds, [seed, false]), match)
    assert [peer for peer, _ in federation.sites[1].on_pair_seeds(good).tags] == [2, 3, 4]


def test_a_seed_relayed_from_another_pair_gives_no_key() -> None:
    federation = seeded(4)
    man, seed = federation.params.man, federation.hub.seeds_for(1)[0]
    foreign = next(s for s in federation.hub.seeds_for(2) if (s.i, s.j) == (1, 2))
    # Hospital 3 signs, as its own, a sealed seed that it did not make.
    relayed = signed(PairSeed(man, seed.dirh, 1, 3, foreign.ct), 3, man)
    confirm = federation.sites[1].on_pair_seeds([relayed])
    assert [peer for peer, _ in confirm.tags] == [2, 4]
    assert federation.sites[1].disputed == {3}


def test_the_first_seed_is_final() -> None:
    federation = seeded(4)
    man, seed = federation.params.man, federation.hub.seeds_for(1)[0]
    site = federation.sites[1]
    first = site.on_pair_seeds([seed])
    mine = federation.hub.directory().entries[0]
    ct = seal_seed(b"\x42" * 32, mine.mlkem, mine.x25519, pair_info(man, seed.dirh, 1, 3))
    second = signed(PairSeed(man, seed.dirh, 1, 3, ct), 3, man)
    before = list(federation.disks[1].versions)
    assert site.on_pair_seeds([second]) == first
    assert site.on_pair_seeds([second, seed]) == first
    assert federation.restart(1).on_pair_seeds([second]) == first
    assert federation.disks[1].versions == before


def test_seeds_that_arrive_later_are_confirmed_too_in_any_order() -> None:
    for order in itertools.permutations((1, 3, 6)):
        federation = seeded(6)
        found = {seed.i if seed.j == 4 else seed.j: seed for seed in federation.hub.seeds_for(4)}
        assert found.keys() == {1, 3, 6}
        site = federation.sites[4]
        for count in (1, 2, 3):
            # Those known before come first: they are passed over, and what follows them is not.
            confirm = site.on_pair_seeds([found[peer] for peer in order[:count]])
            assert [peer for peer, _ in confirm.tags] == sorted({2, 5, *order[:count]})
            assert federation.disks[4].state.confirm == confirm


def test_a_seed_that_does_not_open_costs_no_other_pair() -> None:
    federation = seeded(6)
    man, (first, second, third) = federation.params.man, federation.hub.seeds_for(4)
    wrong = signed(PairSeed(man, first.dirh, first.i, first.j, second.ct), first.i, man)
    confirm = federation.sites[4].on_pair_seeds([wrong, second, third])
    assert [peer for peer, _ in confirm.tags] == [2, 3, 5, 6]
    assert federation.sites[4].disputed == {1}


@pytest.mark.parametrize("withheld", [(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4), None])
def test_a_withheld_seed_costs_its_pair(withheld: tuple[int, int] | None) -> None:
    """Each seed withheld alone, and all (None): no pair without a seed is accepted, by either of the two."""
    federation = seeded(4)
    for i, site in federation.sites.items():
        seeds = [s for s in federation.hub.seeds_for(i) if withheld and (s.i, s.j) != withheld]
        federation.hub.on_confirm(i, site.on_pair_seeds(seeds))
    for i, site in federation.sites.items():
        site.on_confirms(federation.hub.confirms_for(i))
    lost = {withheld} if withheld else {(i, j) for i in range(1, 5) for j in range(i + 1, 5)}
    for i, site in federation.sites.items():
        assert site.accepted == {j for j in federation.ids if j != i and (min(i, j), max(i, j)) not in lost}
        assert (federation.disks[i].state.setup is None) == (len(site.accepted) == 3)
    assert not federation.hub.outcome().pairs & lost


def confirmed(n: int = 4) -> tuple[Federation, dict[int, Confirm]]:
    federation = seeded(n)
    return federation, {i: s.on_pair_seeds(federation.hub.seeds_for(i)) for i, s in federation.sites.items()}


def test_a_pair_needs_its_tag() -> None:
    federation, confirms = confirmed()
    tags, own = dict(confirms[2].tags), dict(confirms[1].tags)
    site = federation.sites[1]
    # Wrong, another peer's, reflected and missing tags: the pair is not accepted.
    for value in (bytes(32), tags[3], own[2]):
        assert site.on_confirms([Tag(2, value)]) == frozenset()
        assert site.disputed == {2}
    assert site.on_confirms([]) == frozenset()
    assert site.on_confirms([Tag(2, tags[1])]) == {2}
    assert site.disputed == frozenset()
    assert federation.restart(1).accepted == {2}


def test_the_hub_passes_on_the_one_tag_for_each_peer() -> None:
    """All tags to everybody would be 50 MB each for 1000 hospitals."""
    federation, confirms = confirmed()
    for i in federation.ids[:3]:
        federation.hub.on_confirm(i, confirms[i])
    assert federation.hub.confirms_for(2) == (
        Tag(1, dict(confirms[1].tags)[2]),
        Tag(3, dict(confirms[3].tags)[2]),
    )
    assert federation.hub.confirms_for(4) == tuple(Tag(i, dict(confirms[i].tags)[4]) for i in (1, 2, 3))


def test_false_confirmations_are_refused() -> None:
    """By the hub, which knows who sent them; and by a hospital, when they come from nobody it could pair with."""
    federation, confirms = confirmed()
    man, good = federation.params.man, confirms[2]
    cases = [
        (dataclasses.replace(good, sig=bytes(64)), "not signed"),
        (dataclasses.replace(good, tags=()), "not signed"),
        (signed(dataclasses.replace(good), 3, man), "not signed"),
        (signed(dataclasses.replace(good, dirh=bytes(32)), 2, man), "another directory"),
        (signed(dataclasses.replace(good, id=3), 3, man), "in the name of 3"),
    ]
    for false, match in cases:
        with pytest.raises(WardroundError, match=match):
            federation.hub.on_confirm(2, false)
    assert federation.hub.confirms_for(1) == ()
    for stranger in (1, 9):
        batch = [Tag(3, dict(confirms[3].tags)[1]), Tag(stranger, bytes(32))]
        refuses(federation, 1, partial(federation.sites[1].on_confirms, batch), "outside the directory")
    assert federation.sites[1].accepted == frozenset()


def test_after_round_one_the_setup_is_over_but_answers_are_repeated() -> None:
    federation = Federation(4)
    federation.pair()
    confirms = {i: site.on_pair_seeds(()) for i, site in federation.sites.items()}
    late = federation.hub.seeds_for(1)
    federation.whole_round(1)
    for i, site in federation.sites.items():
        before = list(federation.disks[i].versions)
        assert site.on_pair_seeds(late if i == 1 else ()) == confirms[i]
        assert site.on_confirms(federation.hub.confirms_for(i)) == set(federation.ids) - {i}
        assert site.disputed == frozenset()
        assert site.announce() == federation.hub.directory().entries[i - 1]
        assert federation.disks[i].versions == before
    # A hub that lost its setup gets the same one by asking again.
    hub = HubSetup(federation.params)
    for i, site in federation.sites.items():
        hub.on_announce(i, site.announce())
    for i, site in federation.sites.items():
        hub.on_pair_seeds(i, site.on_directory(hub.directory()))
    for i, site in federation.sites.items():
        hub.on_confirm(i, site.on_pair_seeds(hub.seeds_for(i)))
    assert hub.outcome() == federation.setup


def test_a_setup_that_timed_out_erases_its_keys() -> None:
    federation = seeded(4)
    site = federation.sites[1]
    assert site.setting_up is True
    site.end_setup()
    assert site.setting_up is False
    assert federation.disks[1].state.setup is None
    confirm = site.on_pair_seeds(federation.hub.seeds_for(1))
    assert [peer for peer, _ in confirm.tags] == [2, 4]
    early = Federation(4, "early")
    _, directory = announced(4, "early")
    early.sites[1].announce()
    early.sites[1].end_setup()
    refuses(early, 1, lambda: early.sites[1].on_directory(directory), "setup of this run is over")


def test_a_failing_disk_changes_nothing_and_nothing_leaves() -> None:
    federation, directory = announced(4)
    for site in federation.sites.values():
        site.on_directory(directory)
    failing, directory = announced(4, "failing")
    site, disk = failing.sites[1], failing.disks[1]
    disk.fail = 1
    with pytest.raises(OSError, match="disk full"):
        site.on_directory(directory)
    assert disk.state.dirh == b""
    first = site.on_directory(directory)
    for i in (2, 3, 4):
        failing.hub.on_pair_seeds(i, failing.sites[i].on_directory(directory))
    disk.fail = 1
    with pytest.raises(OSError, match="disk full"):
        site.on_pair_seeds(failing.hub.seeds_for(1))
    confirm = site.on_pair_seeds(failing.hub.seeds_for(1))
    assert disk.state.confirm == confirm
    assert disk.state.sent == first


def test_the_hub_verifies_before_it_passes_on() -> None:
    federation, good = announced(4)
    hub, man = HubSetup(federation.params), federation.params.man
    entries = good.entries
    with pytest.raises(RefusedError, match="in the name of 2"):
        hub.on_announce(1, entries[1])
    with pytest.raises(RefusedError, match="not a member"):
        hub.on_announce(9, signed(KeyAnnounce(9, man, entries[0].mlkem, entries[0].x25519), 9, man))
    with pytest.raises(VerificationError, match="not signed"):
        hub.on_announce(1, dataclasses.replace(entries[0], sig=bytes(64)))
    hub.on_announce(1, entries[0])
    hub.on_announce(1, entries[0])
    with pytest.raises(RefusedError, match="other keys before"):
        hub.on_announce(1, signed(dataclasses.replace(entries[0], x25519=entries[1].x25519), 1, man))
    with pytest.raises(RefusedError, match="one key"):
        hub.on_announce(2, signed(dataclasses.replace(entries[1], mlkem=entries[0].mlkem), 2, man))
    for wrong in (bytes(32), HIGHEST):
        with pytest.raises(RefusedError, match="another run"):
            hub.on_announce(2, signed(dataclasses.replace(entries[1], man=wrong), 2, man))
    assert hub.missing_announces() == (2, 3, 4)
    later = HubSetup(federation.params)
    later.on_announce(2, entries[1])
    with pytest.raises(RefusedError, match="one key"):
        later.on_announce(1, signed(dataclasses.replace(entries[0], mlkem=entries[1].mlkem), 1, man))
    with pytest.raises(RefusedError, match="1 hospitals announced"):
        hub.directory()
    for entry in entries[1:3]:
        hub.on_announce(entry.id, entry)
    assert hub.directory().entries == entries[:3]
    assert hub.missing_seeds() == ((1, 2), (1, 3), (2, 3))
    with pytest.raises(RefusedError, match="final"):
        hub.on_announce(4, entries[3])
    hub.on_announce(2, entries[1])
    seeds = federation.sites[1].on_directory(hub.directory())
    with pytest.raises(RefusedError, match="in the name"):
        hub.on_pair_seeds(2, seeds)
    with pytest.raises(VerificationError, match="not signed"):
        hub.on_pair_seeds(1, [dataclasses.replace(seeds[0], sig=bytes(64))])
    with pytest.raises(RefusedError, match="another pair"):
        hub.on_pair_seeds(1, [dataclasses.replace(seeds[0], dirh=bytes(32))])
    assert (seeds[0].i, seeds[0].j) == (1, 2)
    for changes in (
        {"man": bytes(32)},
        {"man": HIGHEST},
        {"dirh": bytes(32)},
        {"dirh": HIGHEST},
        {"j": 1},
        {"i": 2, "j": 1},
    ):
        for sender in (1, 2):
            with pytest.raises(RefusedError, match="another pair"):
                hub.on_pair_seeds(sender, [signed(dataclasses.replace(seeds[0], **changes), sender, man)])
    hub.on_pair_seeds(1, seeds)
    with pytest.raises(RefusedError, match="two seeds"):
        hub.on_pair_seeds(1, [signed(dataclasses.replace(seeds[0], ct=bytes(1168)), 1, man)])
    assert hub.missing_seeds() == ((1, 3), (2, 3))
    assert hub.missing_confirms() == (1, 2, 3)
    confirm = federation.sites[1].on_pair_seeds(())
    with pytest.raises(RefusedError, match="in the name"):
        hub.on_confirm(2, confirm)
    with pytest.raises(RefusedError, match="another directory"):
        hub.on_confirm(1, signed(dataclasses.replace(confirm, dirh=bytes(32)), 1, man))
    with pytest.raises(RefusedError, match="another directory"):
        hub.on_confirm(1, signed(dataclasses.replace(confirm, dirh=HIGHEST), 1, man))
    # A hospital is no peer of its own; repeated, a tag would fill the messages to honest hospitals.
    (peer, tag), *_ = confirm.tags
    for tags in (
        ((1, bytes(32)), *confirm.tags),
        ((peer, tag), (peer, tag)),
        ((9, tag),),
        ((3, tag), (2, tag)),
    ):
        with pytest.raises(RefusedError, match="others than its peers, or one twice"):
            hub.on_confirm(1, signed(dataclasses.replace(confirm, tags=tags), 1, man))
    assert hub.outcome().pairs == frozenset()
    hub.on_confirm(1, confirm)
    assert hub.missing_confirms() == (2, 3)
    assert hub.outcome().pairs == frozenset()


def test_a_hub_that_restarts_has_the_directory_that_it_published() -> None:
    federation = seeded(4)
    directory = federation.hub.directory()
    hub = HubSetup(federation.params, directory)
    assert (hub.listed, hub.directory(), hub.missing_announces()) == ((1, 2, 3, 4), directory, ())
    for i, site in federation.sites.items():
        hub.on_announce(i, site.announce())
        hub.on_pair_seeds(i, site.on_directory(directory))
    assert hub.missing_seeds() == ()
    # Who was not in it stays out: it is final.
    smaller = HubSetup(federation.params, Directory(directory.entries[:3]))
    with pytest.raises(RefusedError, match="final"):
        smaller.on_announce(4, directory.entries[3])
    confirm = signed(
        Confirm(4, records.directory_digest(federation.params.man, directory.entries[:3]), ()),
        4,
        federation.params.man,
    )
    with pytest.raises(RefusedError, match="not in the directory"):
        smaller.on_confirm(4, confirm)


def test_a_split_directory_pairs_nobody_across_the_split() -> None:
    federation, whole = announced(5)
    part = Directory(whole.entries[:4])
    seeds: dict[int, tuple[PairSeed, ...]] = {}
    for i in federation.ids:
        seeds[i] = federation.sites[i].on_directory(part if i in (1, 2) else whole)
    for sender, receiver in ((1, 4), (4, 2)):
        crossing = [s for s in seeds[sender] if {s.i, s.j} == {sender, receiver}]
        assert len(crossing) == 1
        call = partial(federation.sites[receiver].on_pair_seeds, crossing)
        refuses(federation, receiver, call, "another run")
