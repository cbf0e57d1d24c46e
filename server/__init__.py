"""The coordinator's hub."""

import common  # noqa: F401 - before flwr: it switches Flower's telemetry off
