"""An agent process that answers every request with its own body: the link without a hospital behind it."""

import asyncio
import sys
from pathlib import Path

from client.agent import Agent
from common import flower


def main(folder: str, address: str, site_id: str) -> None:
    files = Path(folder)

    async def serve() -> None:
        await Agent(
            address,
            site_id=int(site_id),
            key_pem=(files / f"{site_id}.key").read_bytes(),
            certificate_pem=(files / f"{site_id}.pem").read_bytes(),
            authority_pem=(files / "authority.pem").read_bytes(),
            answer=lambda message: flower.reply(message, flower.body_of(message)),
        ).run()

    asyncio.run(serve())


if __name__ == "__main__":
    main(*sys.argv[1:])
