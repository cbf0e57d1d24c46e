"""The running hub: the link, the coordinator's service, and a thread for each study that has not ended.

Source: DESIGN "Built on Flower". Rules: no study waits for another one; an end is written first and then acts
at once; a site that was away when a run ended is told so when it is back; a revoked site's stream is cut; a
stop signal ends the link, then the threads.
"""

import json
import logging
import signal
import threading

from common import flower, identity, messages
from common.certificates import Peer
from common.errors import RefusedError, UnreachableError, WardroundError
from common.identity import read_secret
from common.roster import SignedRoster
from common.study import SignedManifest
from server.app import app
from server.enrolment import admitted, sign_roster
from server.exchange import Exchange
from server.grid import GrpcGrid
from server.home import HubHome
from server.ledger import HubLedger
from server.link import Link
from server.store import ENDED, Store, StudyRow
from server.studies import Studies

log = logging.getLogger("wardround.hub")

LOOK_PERIOD_S = 0.5
STOP_TIMEOUT_S = 10.0
CONSENT_TIMEOUT_S = 5.0


class Hub:
    """One hub on one port. start(), then serve_until_signal() or stop()."""

    def __init__(self, home: HubHome) -> None:
        settings = home.load_settings()
        self.listen = settings.listen
        self.store = Store.open(home.database)
        self._ledger = HubLedger(home, self.store)
        self.hub_public_key = identity.public_key(identity.load_signing_key(home.hub_key))
        self._home = home
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self.link = Link(
            settings.listen,
            key_pem=read_secret(home.server_key),
            certificate_pem=home.server_certificate.read_bytes(),
            authority_pem=(home.authority / "authority.pem").read_bytes(),
            admit=self._admit,
            services=[Studies(self).register],
        )
        self._grid = GrpcGrid(self.link)
        self._running: dict[str, tuple[GrpcGrid, threading.Thread]] = {}
        self._members: dict[str, frozenset[int]] = {}
        self._thread = threading.Thread(target=self._look, name="studies", daemon=True)

    def start(self) -> int:
        """Listen, and go on with every study that has not ended. Returns the port."""
        port = self.link.start()
        self._thread.start()
        log.info("hub listens on %s", self.listen)
        return port

    def serve_until_signal(self) -> None:
        """Block until SIGINT or SIGTERM, then stop."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._stopping.set())
        while not self._stopping.wait(LOOK_PERIOD_S):
            pass
        self.stop()

    def stop(self) -> None:
        """End the link and the threads; studies in progress stay as they are."""
        self._stopping.set()
        self._wake.set()
        self.link.stop()
        self._thread.join(timeout=STOP_TIMEOUT_S)
        for _, thread in self._running.values():
            thread.join(timeout=STOP_TIMEOUT_S)
        self._ledger.close()
        self.store.close()
        log.info("hub stopped")

    def signed_roster(self) -> SignedRoster:
        """The current roster under the hub's signature."""
        return sign_roster(self._home, self.store.sites())

    def wake(self) -> None:
        """Look for studies to run."""
        self._wake.set()

    def missing_consents(self, digest: str) -> list[str]:
        """Ask those of a study that must consent and are here; the names of all that have not.

        Who is away is taken at its last word; who is here and does not answer has not consented.
        """
        row = self.store.study(digest)
        manifest = SignedManifest(row.manifest, row.signature).verify()
        needed = {party.id: party.name for party in manifest.members if party.name in manifest.study.consents}
        exchange = Exchange(self._grid, manifest.digest, needed, lambda: None)
        asked = dict.fromkeys(exchange.online(), exchange.request(messages.CONSENT))
        replies = exchange.ask(messages.CONSENT, asked, CONSENT_TIMEOUT_S) if asked else ()
        said = {site: reply.decision for site, reply, _ in replies if reply.available}
        before = {int(site): word for site, word in json.loads(self.store.study(digest).decisions).items()}
        if (decisions := before | said) != before:
            self.store.set_decisions(digest, decisions)
        last = dict.fromkeys(asked, "") | said
        return [name for site, name in needed.items() if last.get(site, before.get(site)) != "consented"]

    def abort(self, digest: str, reason: str) -> None:
        """Write the end of a study; its thread sees it at once."""
        self.store.set_status(digest, "aborted", reason)
        log.info("study %s: aborted: %s", digest[:12], reason)
        if digest in self._running:
            self._running[digest][0].wake()

    def _admit(self, peer: Peer) -> None:
        row = self.store.site(peer.number)
        if row is not None and row.revoked:
            remedy = "Ask the coordinator why; a new admission needs a new request."
            problem = f"the admission of {row.name!r} was revoked"
            raise RefusedError("enrolment.revoked", problem, remedy=remedy)
        admitted(self.store, peer)

    def _look(self) -> None:
        """Twice a second: begin what is queued, cut whom was revoked, tell who is back what has ended."""
        while not self._stopping.is_set():
            self._wake.wait(LOOK_PERIOD_S)
            self._wake.clear()
            try:
                self._look_once()
            except UnreachableError:
                return
            except Exception:
                # A full disk or a locked table must not end the hub's care for its studies.
                log.exception("the hub could not look after its studies")

    def _look_once(self) -> None:
        self._running = {digest: run for digest, run in self._running.items() if run[1].is_alive()}
        self._ledger.catch_up(over=lambda digest: digest not in self._running)
        online = self.link.online()
        for site in self.store.sites(revoked=True):
            if site.id in online:
                log.warning("site %d %r: cut off, its admission was revoked", site.id, site.name)
                self.link.disconnect(site.id)
        for row in self.store.studies():
            if row.digest in self._running or self._stopping.is_set():
                continue
            if row.status in ENDED and not self._untold(row) & set(online):
                continue  # nobody is here who may still hold secrets of it
            grid = GrpcGrid(self.link)
            thread = threading.Thread(None, self._run, row.digest[:12], (row.digest, grid), daemon=True)
            self._running[row.digest] = (grid, thread)
            thread.start()

    def _untold(self, row: StudyRow) -> set[int]:
        """Members of an ended study that have not been told so."""
        if row.digest not in self._members:
            whole = self.store.study(row.digest)
            manifest = SignedManifest(whole.manifest, whole.signature).verify()
            self._members[row.digest] = frozenset(party.id for party in manifest.members)
        return set(self._members[row.digest]) - set(json.loads(row.closed))

    def _run(self, digest: str, grid: GrpcGrid) -> None:
        config = {"hub-home": str(self._home.folder), "study": digest}
        try:
            app(grid, flower.context_for(flower.HUB_NODE_ID, config))
        except UnreachableError as error:
            log.info("study %s: left as it is: %s", digest[:12], error.problem)
        except WardroundError as error:
            log.error("study %s: failed: %s", digest[:12], error)
            self.store.set_status(digest, "failed", error.problem)
        except Exception:
            # A defect must end this study, not the hub; the trace holds no record, for none is here.
            log.exception("study %s: failed", digest[:12])
            self.store.set_status(digest, "failed", "internal error; see the hub's log")
