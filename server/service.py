"""The running hub: the link, the coordinator's service, and a thread that runs one study at a time.

Source: DESIGN "Built on Flower". Rules: studies run in the order of submission; an aborted study's status
is written first and the round loop sees it at its next step; a stop signal ends the link, then the thread.
"""

import logging
import signal
import threading
from datetime import UTC, datetime

from common import flower, identity
from common.certificates import Peer
from common.errors import WardroundError
from common.identity import read_secret
from common.roster import SignedRoster
from server.app import app
from server.enrolment import admitted, sign_roster
from server.home import HubHome
from server.link import GrpcGrid, Link
from server.store import ENDED, Store
from server.studies import Studies

log = logging.getLogger("wardround.hub")

IDLE_S = 1.0


class Hub:
    """One hub on one port. start(), then serve_until_signal() or stop()."""

    def __init__(self, home: HubHome) -> None:
        settings = home.load_settings()
        self.listen = settings.listen
        self.store = Store.open(home.database)
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
        self._thread = threading.Thread(target=self._run_studies, name="studies", daemon=True)

    def start(self) -> int:
        """Listen and begin with the first study that has not ended. Returns the port."""
        port = self.link.start()
        self._thread.start()
        log.info("hub listens on %s", self.listen)
        return port

    def serve_until_signal(self) -> None:
        """Block until SIGINT or SIGTERM, then stop."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._stopping.set())
        while not self._stopping.wait(IDLE_S):
            pass
        self.stop()

    def stop(self) -> None:
        """End the link and the thread; studies in progress stay as they are."""
        self._stopping.set()
        self._wake.set()
        self.link.stop()
        self._thread.join(timeout=30)
        self.store.close()
        log.info("hub stopped")

    def signed_roster(self) -> SignedRoster:
        """The current roster under the hub's signature."""
        return sign_roster(self._home, self.store.sites())

    def online(self) -> dict[int, float]:
        """Attached sites and the seconds since each was heard of."""
        return self.link.online()

    def now(self) -> datetime:
        """UTC now."""
        return datetime.now(UTC)

    def wake(self) -> None:
        """Look for studies to run."""
        self._wake.set()

    def abort(self, digest: str, reason: str) -> None:
        """Write the end of a study; its round loop stops at its next step."""
        self.store.set_status(digest, "aborted", reason)
        log.info("study %s aborted: %s", digest[:12], reason)

    def _admit(self, peer: Peer) -> None:
        admitted(self.store, peer)

    def _run_studies(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait(IDLE_S)
            self._wake.clear()
            for row in self.store.studies():
                if row.status not in ENDED and not self._stopping.is_set():
                    self._run(row.digest)

    def _run(self, digest: str) -> None:
        config = {"hub-home": str(self._home.folder), "study": digest}
        try:
            app(GrpcGrid(self.link), flower.context_for(flower.HUB_NODE_ID, config))
        except WardroundError as error:
            if not self._stopping.is_set():
                log.error("study %s failed: %s", digest[:12], error)
                self.store.set_status(digest, "failed", error.problem)
        except Exception:
            # A defect must end this study, not the hub; the trace holds no record, for none is here.
            log.exception("study %s failed", digest[:12])
            self.store.set_status(digest, "failed", "internal error; see the hub's log")
