"""The version of this software, as ledgers, greetings and reports state it."""

from importlib.metadata import version
from typing import Final

SOFTWARE_VERSION: Final = version("wardround")
