"""The committed stubs are what ``make stubs`` makes of common/link.proto."""

from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
protoc = pytest.importorskip("grpc_tools.protoc")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stubs")
    included = str(resources.files("grpc_tools").joinpath("_proto"))
    arguments = ["", f"-I{ROOT}", f"-I{included}"]
    arguments += [f"--{plugin}_out={out}" for plugin in ("python", "grpc_python", "pyi")]
    assert protoc.main([*arguments, "common/link.proto"]) == 0
    return Path(out) / "common"


@pytest.mark.parametrize("name", ["link_pb2.py", "link_pb2.pyi", "link_pb2_grpc.py"])
def test_stubs_are_current(generated: Path, name: str) -> None:
    assert (generated / name).read_text(encoding="utf-8") == (ROOT / "common" / name).read_text(
        encoding="utf-8"
    )


def test_nothing_else_is_generated(generated: Path) -> None:
    assert {path.name for path in generated.iterdir()} == {"link_pb2.py", "link_pb2.pyi", "link_pb2_grpc.py"}
