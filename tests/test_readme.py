"""The README is executed: every command in it, in the order a newcomer needs, and its Python block."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from client.settings import Policy, new_files
from common import errors
from common.contract import Contract
from common.synthetic import write
from server.processes import Processes, free_port
from tests.federation import extract_rows, small_study, source_of

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OTHERS = ("Northgate", "Riverside")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def commands() -> list[str]:
    """Each wardround command of the README, without its comment."""
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("wardround ")]


class Newcomer:
    """Types the README's commands in a folder; each is crossed off once."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder = folder
        self.processes = processes
        self.left = commands()
        self.address = f"127.0.0.1:{free_port()}"
        self.digest = "DIGEST"

    def typed(self, start: str) -> list[str]:
        """The one README command that starts so, crossed off, as arguments."""
        found = [line for line in self.left if line.startswith("wardround " + start)]
        assert len(found) == 1, (start, found)
        self.left.remove(found[0])
        line = found[0].replace("127.0.0.1:8443", self.address).replace("DIGEST", self.digest)
        return shlex.split(line)[1:]

    def run(self, start: str, *more: str) -> str:
        return self.wardround(*self.typed(start), *more)

    def wardround(self, *arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-P", "-m", "wardround", *arguments],
            cwd=self.folder, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert result.returncode == 0, (arguments, result.stderr)
        return result.stdout


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Newcomer]:
    monkeypatch.chdir(tmp_path)
    with Processes(tmp_path / "logs") as processes:
        yield Newcomer(tmp_path, processes)


def allow(folder: Path, number: int, coordinator: str) -> None:
    """What a person writes into policy.toml, and the extract it names."""
    rows = ["patient,age,bmi,readmitted", *(",".join(map(str, row)) for row in extract_rows(number))]
    (folder / "extract.csv").write_text("\n".join(rows) + "\n")
    policy = tomllib.loads((folder / "policy.toml").read_text())
    policy["rules"]["coordinators"] = [coordinator]
    policy["data"] = {"extract": source_of(folder / "extract.csv")}
    (folder / "policy.toml").write_text(tomli_w.dumps(policy))


def test_every_command_of_the_readme_runs(newcomer: Newcomer) -> None:
    folder = newcomer.folder
    made = newcomer.run("hub init")
    key = re.search(r"ed25519:[A-Za-z0-9_-]+", made)
    assert key is not None
    newcomer.run("site init")
    newcomer.run("hub admit")
    for number, name in enumerate(OTHERS, start=2):
        home = name.lower()
        newcomer.wardround("site", "init", "--home", home, "--name", name, "--hub", newcomer.address)
        newcomer.wardround(
            "hub", "admit", f"{home}/request.json", "--home", "hub", "--out", f"{home}/admission.json"
        )
        allow(folder / home, number, key[0])
    allow(folder / "st-mary", 1, key[0])

    newcomer.processes.start("hub", *newcomer.typed("hub run")).wait_for_line("listening", 30)
    newcomer.processes.start("st-mary", *newcomer.typed("site run"))
    for name in OTHERS:
        newcomer.processes.start(name, "site", "run", "--home", name.lower())
    (folder / "study.toml").write_text(tomli_w.dumps(small_study(["St. Mary", *OTHERS])))
    assert "from template diagnosis" in newcomer.run("study new")
    assert "500 synthetic rows" in newcomer.run("study synth")
    found = re.search(r"digest\s+([0-9a-f]{64})", newcomer.run("study submit"))
    assert found is not None
    newcomer.digest = found[1]

    for home in ("st-mary", *(name.lower() for name in OTHERS)):
        for _ in range(200):
            if (folder / home / "studies" / f"{newcomer.digest}.study").exists():
                break
            subprocess.run(["sleep", "0.1"], check=True)
    listing = newcomer.run("site requests")
    assert newcomer.digest[:12] in listing
    assert "train.upload" in newcomer.run("site show DIGEST --home st-mary --egress")
    assert "decision     received" in newcomer.run("site show")
    assert "the contract holds" in newcomer.run("site data check")
    assert "</html>" in (folder / "st-mary.html").read_text()
    assert "as the model sees the first 3 rows" in newcomer.run("site data preview")
    text = newcomer.run("site approve DIGEST", "--yes", "--fingerprints-compared")
    for shown in ("purpose", "n = 3, t = 1", "m = 3", "compare      Northgate", "approved"):
        assert shown in text
    for name in OTHERS:
        newcomer.wardround(
            "site",
            "approve",
            newcomer.digest,
            "--home",
            name.lower(),
            "--yes",
            "--fingerprints-compared",
            "--by",
            "x",
        )
    assert "done" in newcomer.run("study watch")
    assert "round 3 of 3" in newcomer.run("study show")
    assert "no evaluation" in newcomer.run("study results")
    newcomer.run("study export")
    assert "said.csv: 20 rows" in newcomer.run("site predict")
    assert (folder / "model.safetensors").stat().st_size > 0
    newcomer.run("site consent")
    assert "3 charges" in newcomer.run("site budget")
    newcomer.run("site pause")
    newcomer.run("site resume")
    newcomer.run("site evidence")
    newcomer.run("site backup")
    newcomer.run("site restore", "--yes")
    newcomer.run("hub roster")
    newcomer.run("hub evidence")
    assert "checks hold" in newcomer.run("audit verify")
    newcomer.run("audit report")
    assert "</html>" in (folder / "report.html").read_text()
    assert "St. Mary" in newcomer.run("audit budgets")
    assert "charge" in newcomer.run("audit log")
    newcomer.run("audit prove")
    assert "nothing that was there has changed" in newcomer.run("audit diff")
    assert "code check on public data" in newcomer.run("audit canaries")
    assert newcomer.left == []

    for block, printed in zip(blocks("python"), ("tensor(", "charge"), strict=True):
        result = subprocess.run(
            [sys.executable, "-P", "-c", block],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=folder,
        )
        assert result.returncode == 0, result.stderr
        assert printed in result.stdout


def test_the_policy_of_the_readme_is_one_in_each_of_its_forms() -> None:
    block, _ = blocks("toml")
    lines = block.splitlines()
    forms = [line for line in lines if line.lstrip("# ").startswith("source = ")]
    assert len(forms) == 5
    for form in forms:
        # A commented form has further settings beside it.
        chosen = re.sub(r'(?<=")  +(?=[a-z_]+ = )', "\n", form.lstrip("# ").split("   #")[0])
        chosen = re.sub(r",? (?=password_file)", "\n", re.split(r";|\(", chosen)[0])
        text = "\n".join(chosen if line == form else "" if line in forms else line for line in lines)
        policy = Policy.model_validate(
            tomllib.loads(new_files("St. Mary", "h:1", "0" * 32)["policy.toml"] + text)
        )
        source = policy.data["readmissions"]
        assert source.source in form
        assert source.mapped("crp").unit == "mg/L"


def test_the_contract_of_the_readme_is_one(tmp_path: Path) -> None:
    contract = Contract.from_toml(blocks("toml")[1])
    assert contract.columns == ("age", "glucose", "diagnoses", "readmitted")
    assert set(contract.derived) == set(contract.columns)
    write(contract, 20, 0, tmp_path / "a.csv")


def test_the_two_make_commands_exist() -> None:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    targets = [line.removeprefix("make ") for line in lines if line.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_the_file_tree_names_every_module() -> None:
    (tree,) = blocks("")
    words = set(re.findall(r"[a-z_]+", tree))
    for package in ("common", "client", "server"):
        for path in (ROOT / package).iterdir():
            if path.suffix == ".py" and "_pb2" not in path.stem and path.stem != "__init__":
                assert path.stem in words, f"{package}/{path.name} is not in the README's file tree"
            if path.is_dir() and path.name not in ("__pycache__", "adr"):
                assert path.name in words, f"{package}/{path.name}/ is not in the README's file tree"


def test_exit_codes_are_those_of_the_errors() -> None:
    words = "ok|failure|usage|refused|budget|verification|unreachable|data"
    documented = {int(code) for code, _ in re.findall(rf"\b([0-7]) ({words})", README)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert {kind.exit_code for kind in kinds if issubclass(kind, errors.WardroundError)} | {0} == documented
