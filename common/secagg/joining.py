"""A hospital joins a run: announce setup keys, pair with every other, confirm the keys.

Source: PROTOCOL.md S1-S4. Rules: all of a message is checked before anything changes; one announcement and
one directory a manifest; the first seed of a pair is final; a faulty peer costs its own pair and no more.
"""

import hmac
from collections.abc import Sequence
from dataclasses import replace

from common.errors import RefusedError, VerificationError
from common.secagg import keys, records
from common.secagg.machine import Machine
from common.secagg.pairing import SEED_BYTES, SetupKeys, fresh, pair_info, seal_seed, sender_of, unseal_seed
from common.secagg.records import Confirm, Directory, KeyAnnounce, PairSeed, Tag


class Joining(Machine):
    """The setup of one hospital in one run, before round 1."""

    @property
    def accepted(self) -> frozenset[int]:
        """The peers with which this hospital may be in a cohort."""
        return frozenset(self._state.accepted)

    @property
    def disputed(self) -> frozenset[int]:
        """Peers with a wrong sealed seed or tag, and no pair: one of the two, or the hub, is at fault."""
        return frozenset(self._disputed - set(self._state.accepted))

    def announce(self) -> KeyAnnounce:
        """S1: the setup keys; made and stored at the first call, the same record ever after."""
        state = self._running()
        if state.announce is not None:
            return state.announce
        setup = SetupKeys.new(self._entropy)
        mlkem, x25519 = setup.public()
        record = self._signed(KeyAnnounce(state.me, state.man, mlkem, x25519))
        self._commit(replace(state, setup=setup, announce=record))
        return record

    def on_directory(self, directory: Directory) -> tuple[PairSeed, ...]:
        """S2 to S3: check every announcement; seal a seed for each peer to which this hospital sends.

        Guarantee: one_directory_per_run - a second, different directory is refused.
        Guarantee: resent_seeds_are_identical - the same directory again gives the same bytes.
        A peer whose signed keys are no keys gets no seed, and so no pair.
        """
        state = self._running()
        dirh = records.directory_digest(state.man, directory.entries)
        if state.dirh:
            self._require(dirh == state.dirh, "directory.second", "there is one directory for a manifest")
            return state.sent
        self._check_directory(directory)
        self._require(state.setup is not None, "setup.over", "the setup of this run is over")
        sent, pair_keys = [], []
        for entry in directory.entries:
            i, j = sorted((entry.id, state.me))
            if i == j or sender_of(i, j) != state.me:
                continue
            seed = fresh(self._entropy, SEED_BYTES)
            try:
                ct = seal_seed(seed, entry.mlkem, entry.x25519, pair_info(state.man, dirh, i, j))
            except VerificationError:
                self._disputed.add(entry.id)
                continue
            sent.append(self._signed(PairSeed(state.man, dirh, i, j, ct)))
            pair_keys.append((entry.id, keys.pair_key(seed, state.man, dirh, i, j, ct)))
        listed = tuple(entry.id for entry in directory.entries)
        self._commit(replace(state, dirh=dirh, listed=listed, sent=tuple(sent), keys=tuple(pair_keys)))
        return self._state.sent

    def _check_directory(self, directory: Directory) -> None:
        state, params = self._state, self._params
        entries = directory.entries
        ids = [entry.id for entry in entries]
        self._require(ids == sorted(set(ids)), "directory.order", "a directory is in ascending order of id")
        self._require(set(ids) <= set(params.members), "directory.stranger", "a directory lists members only")
        problem = f"a directory lists at least {params.m} members"
        self._require(len(ids) >= params.m, "directory.small", problem)
        for entry in entries:
            self._require(entry.man == state.man, "directory.run", "an announcement is for another run")
            self._check_signature(entry, entry.id)
        own = [entry for entry in entries if entry.id == state.me]
        problem = "the directory does not hold the keys that this hospital announced"
        self._require(own == [state.announce] and state.announce is not None, "directory.own", problem)
        for announced in ({entry.mlkem for entry in entries}, {entry.x25519 for entry in entries}):
            self._require(
                len(announced) == len(ids), "directory.duplicate", "two hospitals announced one key"
            )

    def on_pair_seeds(self, seeds: Sequence[PairSeed]) -> Confirm:
        """S3 to S4: accept the first seed of each pair, and confirm every key that is final here.

        May be called again before round 1, with what arrived since. A signed seed that does not open
        leaves its pair without a key.

        Guarantee: the_first_seed_is_final - a later seed of the pair changes nothing.
        """
        state = self._running()
        self._require(bool(state.dirh), "setup.order", "there is no directory yet")
        for seed in seeds:
            self._check_seed(seed)
        if state.index:
            if state.confirm is None:
                raise RefusedError("secagg.setup.over", "the setup of this run is over")
            return state.confirm
        pair_keys = dict(state.keys)
        for seed in seeds:
            peer = seed.i if seed.j == state.me else seed.j
            if peer in pair_keys or state.setup is None:
                continue
            try:
                opened = unseal_seed(seed.ct, state.setup, pair_info(state.man, state.dirh, seed.i, seed.j))
            except VerificationError:
                self._disputed.add(peer)
                continue
            pair_keys[peer] = keys.pair_key(opened, state.man, state.dirh, seed.i, seed.j, seed.ct)
        entries = tuple(sorted(pair_keys.items()))
        tags = tuple((peer, keys.confirm_tag(key, state.dirh, state.me, peer)) for peer, key in entries)
        if state.confirm is not None and state.confirm.tags == tags:
            return state.confirm
        confirm = self._signed(Confirm(state.me, state.dirh, tags))
        self._commit(replace(state, keys=entries, confirm=confirm))
        return confirm

    def _check_seed(self, seed: PairSeed) -> None:
        state = self._state
        same = seed.man == state.man and seed.dirh == state.dirh
        self._require(same, "seed.run", "a sealed seed is for another run")
        own = seed.i < seed.j and state.me in (seed.i, seed.j)
        self._require(own, "seed.pair", "a sealed seed is not for here")
        sender = sender_of(seed.i, seed.j)
        self._require(sender != state.me, "seed.sender", "a sealed seed comes from the wrong one of the pair")
        listed = sender in state.listed
        self._require(listed, "seed.stranger", "a sealed seed comes from outside the directory")
        self._check_signature(seed, sender)

    def on_confirms(self, tags: Sequence[Tag]) -> frozenset[int]:
        """S4: accept the pairs whose tag verifies. Returns all accepted peers.

        With the last pair of the directory accepted, the setup keys are erased. After round 1 has begun
        nothing changes any more.

        Guarantee: a_pair_needs_its_tag - a pair is accepted only with the peer's own tag under K_0.
        """
        state = self._running()
        self._require(bool(state.dirh), "setup.order", "there is no directory yet")
        for tag in tags:
            peer = tag.id in state.listed and tag.id != state.me
            self._require(peer, "confirm.stranger", "a confirmation comes from outside the directory")
        if state.index:
            return frozenset(state.accepted)
        pair_keys, accepted = dict(state.keys), set(state.accepted)
        for tag in tags:
            key = pair_keys.get(tag.id)
            due = keys.confirm_tag(key, state.dirh, tag.id, state.me) if key else b""
            (accepted if hmac.compare_digest(tag.tag, due) else self._disputed).add(tag.id)
        if accepted != set(state.accepted):
            setup = None if accepted == set(state.listed) - {state.me} else state.setup
            self._commit(replace(state, accepted=tuple(sorted(accepted)), setup=setup))
        return frozenset(self._state.accepted)

    @property
    def setting_up(self) -> bool:
        """Whether the private setup keys are still kept."""
        return self._state.setup is not None

    def end_setup(self) -> None:
        """The time for setup is over: erase the setup keys; pairs without a key stay without."""
        state = self._running()
        if state.setup is not None:
            self._commit(replace(state, setup=None))
