"""The hospital's agent, called site in the words of the product."""

import common  # noqa: F401 - before flwr: it switches Flower's telemetry off
