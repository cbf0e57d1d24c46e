"""A TCP relay in front of a hub that counts what a site sends and cuts the connection at given counts."""

import socket
import threading
from contextlib import suppress

from server.processes import free_port


class CuttingProxy:
    """Relays one site's connections to the hub, counts what the site sends, cuts at given counts."""

    def __init__(self, hub_port: int, cuts: list[int]) -> None:
        self.port = free_port()
        self.sent = 0
        self.cut = 0
        self._hub_port = hub_port
        self._cuts = cuts
        self._server = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                site, _ = self._server.accept()
            except OSError:
                return
            hub = socket.create_connection(("127.0.0.1", self._hub_port))
            threading.Thread(target=self._relay, args=(site, hub, True), daemon=True).start()
            threading.Thread(target=self._relay, args=(hub, site, False), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, from_site: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if from_site:
                    self.sent += len(data)
                    if self.cut < len(self._cuts) and self.sent >= self._cuts[self.cut]:
                        self.cut += 1
                        break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
