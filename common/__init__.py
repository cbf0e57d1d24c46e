"""What every party computes or checks for itself.

Rules: Flower reads these two settings when it is imported, and its telemetry is on unless told otherwise;
``client`` and ``server`` import this package before any module of theirs can import flwr.
"""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
