"""Every module of ``common`` can be the first that is imported: no circle shows in some orders only."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [m for m in sys.modules if m.split(".")[0] == "common" and "link_pb2" not in m]:
        del sys.modules[loaded]
    importlib.import_module(name)
"""


def test_every_module_can_come_first() -> None:
    paths = sorted((ROOT / "common").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    chosen = [name.removesuffix(".__init__") for name in names if "link_pb2" not in name]
    assert len(chosen) > 80
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *chosen],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
