"""The front door: one table of groups, nothing imported that was not asked for, nothing shadowed."""

import importlib.machinery
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

import wardround
from common.study import Manifest, Study

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "opacus", "flwr", "grpc", "sklearn", "dp_accounting", "duckdb", "sqlalchemy", "numpy")


def loaded_by(*arguments: str) -> tuple[str, set[str]]:
    """Run the command line in a process of its own; its output, and the top-level modules it imported."""
    program = (
        "import sys, json, wardround\n"
        f"sys.argv = ['wardround', *{list(arguments)!r}]\n"
        "try:\n    wardround.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    text, _, modules = result.stdout.rstrip("\n").rpartition("\n")
    return text, set(json.loads(modules))


def test_help_imports_none_of_the_heavy_libraries() -> None:
    text, modules = loaded_by("--help")
    for name, (_, line) in wardround.GROUPS.items():
        assert name in text
        assert line.split()[0] in text
    assert modules.isdisjoint(HEAVY)
    assert modules.isdisjoint({"server", "client", "common"})


@pytest.mark.parametrize("group", ["hub", "study"])
def test_help_of_a_group_imports_no_torch_and_no_flower(group: str) -> None:
    text, modules = loaded_by(group, "--help")
    assert "Usage" in text
    assert modules.isdisjoint({"torch", "opacus", "flwr", "grpc", "sqlalchemy", "dp_accounting"})


def test_help_of_a_hospital_imports_no_torch_and_no_flower() -> None:
    _, modules = loaded_by("site", "--help")
    assert modules.isdisjoint({"torch", "opacus", "flwr"})


def test_the_version_is_the_packages() -> None:
    result = CliRunner().invoke(wardround.cli, ["--version"])
    assert result.exit_code == 0
    assert version("wardround") in result.output


def test_an_unknown_group_is_a_usage_error() -> None:
    result = CliRunner().invoke(wardround.cli, ["nothing"])
    assert result.exit_code == 2
    assert "nothing" in result.output


@pytest.mark.parametrize("group", wardround.GROUPS)
def test_every_group_is_there(group: str) -> None:
    result = CliRunner().invoke(wardround.cli, [group, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


def test_notebook_names_are_lazy_and_right() -> None:
    assert wardround.Study is Study
    assert wardround.Manifest is Manifest
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = wardround.Nothing
    program = (
        "import wardround, sys; assert 'common' not in sys.modules; "
        "wardround.Study; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_packages_beside_the_front_door_are_accepted() -> None:
    assert wardround.shadowed(ROOT) == []


@pytest.mark.parametrize("case", ["elsewhere", "missing", "namespace"])
def test_shadowed_packages_are_named(case: str, tmp_path: Path) -> None:
    def search(name: str) -> importlib.machinery.ModuleSpec | None:
        if name != "client":
            return importlib.machinery.PathFinder.find_spec(name, [str(ROOT)])
        if case == "missing":
            return None
        origin = None if case == "namespace" else str(tmp_path / "client" / "__init__.py")
        return importlib.machinery.ModuleSpec(name, None, origin=origin)

    assert wardround.shadowed(ROOT, search) == ["client"]


@pytest.mark.parametrize("package", wardround.PACKAGES)
@pytest.mark.parametrize("entry", ["command", "notebook"])
def test_a_folder_of_the_same_name_never_stands_in(tmp_path: Path, package: str, entry: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong one was imported')\n")
    code = "import wardround; wardround.main()" if entry == "command" else "import wardround; wardround.Study"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run(
        [sys.executable, "-c", code, "hub", "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert f"the packages {package} would be loaded from another place" in result.stderr
    assert "PYTHONPATH" in result.stderr
    assert "the wrong one" not in result.stderr + result.stdout
