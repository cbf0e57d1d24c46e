"""The worker: what it answers, what its errors say, and what its process may not do."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.frames import read_frame, write_frame
from client.isolation import FORBIDDEN_EVENTS
from client.worker import Worker, serve
from common.admissible import check
from common.errors import FailureError
from common.study import Manifest
from common.tasks.models import initial_state
from common.tasks.state import state_bytes
from tests.client.federation import ALLOW_WITHOUT_DP, WITHOUT_DP, Federation
from tests.federation import extract_rows

CANARY = "Zq7canary"

torch.set_num_threads(1)


def header(federation: Federation, number: int = 1, **changes: str) -> dict[str, Any]:
    where = f"csv:{federation.sites[number].folder / 'extract.csv'}"
    source = {"source": changes.pop("source", where), "patient": "patient"}
    return {"op": "prepare", "source": source, "split_key": bytes(32).hex()} | changes


def answers(*requests: tuple[dict[str, Any], bytes]) -> list[tuple[dict[str, Any], bytes]]:
    """What serve writes for these requests."""
    asked, told = io.BytesIO(), io.BytesIO()
    for head, blob in requests:
        write_frame(asked, head, blob)
    asked.seek(0)
    serve(asked, told)
    told.seek(0)
    found = []
    while (frame := read_frame(told)) is not None:
        found.append(frame)
    return found


def start_of(manifest: Manifest) -> bytes:
    return state_bytes(initial_state(manifest), check(manifest, None).layout)


def test_a_study_is_prepared_once_and_computed_often(federation: Federation) -> None:
    manifest = federation.manifest()
    start = start_of(manifest)
    replies = answers(
        (header(federation), manifest.to_bytes()), ({"op": "compute"}, start), ({"op": "compute"}, start)
    )
    assert [head for head, _ in replies] == [{"status": "ok"}] * 3
    first, second = (np.frombuffer(blob, "<i8") for _, blob in replies[1:])
    assert len(first) == len(second) == check(manifest, None).dim
    # Noise is fresh in each round.
    assert (first != second).any()


@pytest.mark.parametrize(
    ("head", "code"),
    [
        ({"op": "compute"}, "worker.order"),
        ({"op": "read"}, "worker.op"),
        ({}, "worker.op"),
        ({"op": "prepare"}, "worker.KeyError"),
    ],
)
def test_other_requests_fail_by_code_and_the_worker_goes_on(
    federation: Federation, head: dict[str, Any], code: str
) -> None:
    manifest = federation.manifest()
    replies = answers((head, manifest.to_bytes()), (header(federation), manifest.to_bytes()))
    assert replies[0][0]["status"] == "failed"
    assert replies[0][0]["code"] == code
    assert replies[1] == ({"status": "ok"}, b"")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"source": f"csv:/nowhere/{CANARY}.csv"}, "source.unreadable"),
        ({"source": CANARY}, "worker.ValidationError"),
        ({"split_key": CANARY}, "worker.ValueError"),
    ],
)
def test_errors_leave_as_codes_without_text(
    federation: Federation, changes: dict[str, str], code: str
) -> None:
    ((reply, blob),) = answers((header(federation, **changes), federation.manifest().to_bytes()))
    assert (reply["status"], reply["code"], blob) == ("failed", code, b"")
    assert set(reply) <= {"status", "code", "at"}
    assert CANARY not in repr(reply)
    assert all(
        place.startswith("/") and place.rpartition(":")[2].isdecimal() for place in reply.get("at", [])
    )


def test_a_malformed_extract_is_not_quoted(federation: Federation) -> None:
    federation.write_extract(1, [("p1", 50, 25, "yes"), (CANARY, 50, 25, "yes", CANARY, '"')])
    ((reply, _),) = answers((header(federation), federation.manifest().to_bytes()))
    assert reply == {"status": "failed", "code": "source.malformed"}


def test_a_changed_manifest_or_a_crafted_state_is_refused(federation: Federation) -> None:
    manifest = federation.manifest()
    good, start = manifest.to_bytes(), start_of(manifest)
    replies = answers(
        (header(federation), good + b" "),
        (header(federation), good),
        ({"op": "compute"}, start[:-1]),
        ({"op": "compute"}, start[:-4] + np.float32("nan").tobytes()),
        ({"op": "compute"}, start[:-4] + np.float32(2e3).tobytes()),
        ({"op": "compute"}, start),
    )
    statuses = [reply["status"] for reply, _ in replies]
    assert statuses == ["failed", "ok", "failed", "failed", "failed", "ok"]
    assert all(reply["code"].startswith("state.") for reply, _ in replies[2:5])


def test_a_garbage_row_changes_nothing_but_its_patient(template: Path, tmp_path: Path) -> None:
    federation = Federation(template, tmp_path / "f", **ALLOW_WITHOUT_DP)
    manifest = federation.manifest(privacy=WITHOUT_DP)
    results = []
    # Without a usable label a row is left out; everything else about it may be anything.
    for garbage in ([], [(CANARY, "NaN", "-inf", CANARY), ("", 50, 25, "yes"), ("?", CANARY, "", "no")]):
        federation.write_extract(1, [*extract_rows(1), *garbage])
        _, (reply, blob) = answers(
            (header(federation), manifest.to_bytes()), ({"op": "compute"}, start_of(manifest))
        )
        assert reply == {"status": "ok"}
        results.append(blob)
    assert results[0] == results[1]


def test_a_worker_prints_no_rows(federation: Federation, capfd: pytest.CaptureFixture[str]) -> None:
    federation.write_extract(1, [(CANARY, 50, 25, "yes"), ("p2", CANARY, "NaN", "no")])
    manifest = federation.manifest()
    replies = answers((header(federation), manifest.to_bytes()), ({"op": "compute"}, start_of(manifest)))
    assert [reply["status"] for reply, _ in replies] == ["ok", "ok"]
    assert CANARY.encode() not in replies[1][1]
    assert CANARY not in "".join(capfd.readouterr())


def test_a_worker_takes_its_entropy_from_its_constructor(federation: Federation) -> None:
    """Tests alone give one; what the product starts has the operating system's."""
    manifest = federation.manifest()
    results, asked = [], list[int]()
    for seed in (b"one", b"one", b"two"):
        stream = np.random.Generator(np.random.PCG64(list(seed)))

        def entropy(size: int, stream: np.random.Generator = stream) -> bytes:
            asked.append(size)
            return stream.bytes(size)

        worker = Worker(entropy)
        worker.prepare(header(federation), manifest.to_bytes())
        results.append(worker.compute(start_of(manifest)))
    assert asked
    assert results[0] == results[1] != results[2]
    assert Worker()._entropy is os.urandom


def test_computing_needs_rows_first() -> None:
    with pytest.raises(FailureError) as caught:
        Worker().compute(b"")
    assert caught.value.code == "worker.order"


ATTEMPTS = {
    "socket": "import socket; socket.socket()",
    "unix socket": "import socket; socket.socketpair()",
    "name": "import socket; socket.getaddrinfo('localhost', 1)",
    "popen": "import subprocess; subprocess.run(['true'])",
    "system": "import os; os.system('true')",
    "fork": "import os; os.fork()",
    "forkpty": "import os; os.forkpty()",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "spawn": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "urllib": "import urllib.request; urllib.request.urlopen('http://localhost:1')",
}
PROBE = """
import resource, socket, subprocess, sys, urllib.request
from client.isolation import cut_off, refuse_sockets_and_processes
without_network = cut_off()
refuse_sockets_and_processes()
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
for line in sys.stdin.read().splitlines():
    try:
        exec(line)
        print("allowed")
    except BaseException as error:
        print(type(error).__name__)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
death = ctypes.c_int()
libc.prctl(2, ctypes.byref(death))
print(death.value)
if without_network:
    interfaces = [line.split(":")[0].strip() for line in open("/proc/self/net/dev").readlines()[2:]]
    print("kernel", *interfaces)
"""


def test_worker_has_no_network() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input="\n".join(ATTEMPTS.values()),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    outcomes = done.stdout.splitlines()
    assert dict(zip(ATTEMPTS, outcomes, strict=False)) == dict.fromkeys(ATTEMPTS, "FailureError"), done.stderr
    # It is killed when its supervisor ends; where the kernel allows it, there is nothing but loopback.
    assert outcomes[len(ATTEMPTS)] == "9"
    assert outcomes[len(ATTEMPTS) + 1 :] in ([], ["kernel lo"])


def test_what_starts_a_process_or_a_connection_is_on_the_list() -> None:
    events = ("socket.__new__", "socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.fork",
              "os.forkpty", "os.posix_spawn", "os.spawn", "urllib.Request", "ftplib.connect")  # fmt: skip
    assert all(event.startswith(FORBIDDEN_EVENTS) for event in events)
    assert not any(event.startswith(FORBIDDEN_EVENTS) for event in ("open", "os.listdir", "import"))
