"""Agents of several hospitals in one process: the real link and masks, updates that cost nothing to compute."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.agent import Agent
from client.identity import SiteIdentity
from client.state import SiteHome
from common.secagg import records
from common.secagg.codec import quantise
from tests.server.hospitals import Founded, Hospital, Keys


class Quick(Hospital):
    """A hospital whose vector in grid steps is made once: link, masks and hub are what is measured."""

    _q: NDArray[np.int64] | None = None

    def _ready(self, start: records.RoundStart, state_file: bytes) -> records.Ready:
        assert self.site is not None
        assert self._params is not None
        assert records.state_digest(state_file) == start.state
        self.site.on_round_start(start)
        if self._q is None:
            codec = self._manifest.study.aggregation.codec  # type: ignore[union-attr]
            values = np.linspace(-0.001, 0.001, self._params.parameters) * self.id
            self._q = quantise(values, codec.step, codec.range)
        return self.site.ready(self._q, np.zeros(0, dtype=np.int64), start.model_digest)


def hospital(folder: Path, port: int | None) -> tuple[Quick, dict[str, Any]]:
    identity = SiteIdentity.load(SiteHome(folder))
    founded: Any = Founded.__new__(Founded)
    founded.keys = {identity.id: Keys(identity.tls_key_pem, identity.protocol_key, identity.ledger_key, None)}  # type: ignore[arg-type]
    founded.admissions = {identity.id: identity}
    made = Quick(founded, identity.id)
    return made, {
        "address": f"127.0.0.1:{port}" if port else identity.address,
        "site_id": identity.id,
        "key_pem": identity.tls_key_pem,
        "certificate_pem": identity.certificate_pem,
        "authority_pem": identity.authority_pem,
        "answer": made.answer_message,
    }


async def serve(folders: list[str]) -> None:
    agents = []
    for text in folders:
        folder, _, port = text.partition("@")
        made, settings = hospital(Path(folder), int(port) if port else None)
        address = settings.pop("address")
        del made
        agents.append(Agent(address, **settings))
    await asyncio.gather(*(agent.run() for agent in agents))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1:]))
