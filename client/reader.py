"""The process that reads a hospital's database: it has the network, and no key, no ledger, no study's code.

Source: DESIGN.md "The agent is two processes". Rules: one question, one answer, then it ends; it dies with
its supervisor and leaves no core; what it says of an error holds no value of a record.
"""

import os
import sys
from pathlib import Path
from typing import Any

from client.frames import read_frame, write_frame
from client.isolation import end_with_supervisor
from client.sources import databases, omop
from client.sources.engine import connect, execute, quoted
from client.sources.source import DataSource
from common.contract import Contract
from common.encoding import parse_canonical_json
from common.errors import ContractError, FailureError, WardroundError


def copy(source: DataSource, contract: Contract, out: Path) -> None:
    """Write what ``contract`` reads of a source on a server into the Parquet file ``out``, which is empty.

    Raises: ContractError, FailureError.
    """
    with connect([out]) as connection:
        if source.kind == "omop":
            omop.fill(connection, source, contract)
        else:
            window = () if contract.window is None else (contract.window.column,)
            wanted = source.columns if contract.query else (*contract.columns, *window)
            databases.fill(connection, source, contract.patient, wanted)
        query = f"COPY extract TO {quoted(str(out))} (FORMAT parquet, USE_TMP_FILE false)"
        remedy = "Free space in the site's folder."
        execute(connection, query, what=f"the copy of {source.where}", remedy=remedy)


def answer(header: dict[str, Any], blob: bytes) -> dict[str, Any]:
    """What becomes of a question: ``source``, the file ``out``, and the contract in ``blob``."""
    try:
        contract = Contract.model_validate(parse_canonical_json(blob, "the contract"))
        copy(DataSource.model_validate(header["source"]), contract, Path(str(header["out"])))
    except WardroundError as error:
        kind = "contract" if isinstance(error, ContractError) else "failure"
        return {"status": kind, "code": error.code, "problem": error.problem, "remedy": error.remedy or ""}
    except Exception as error:
        # The text of another exception may quote a row.
        problem = f"the reader ended with {type(error).__name__}"
        return {"status": "failure", "code": "source.reader", "problem": problem, "remedy": ""}
    return {"status": "ok"}


def main() -> None:
    """Answer the one question on standard input."""
    end_with_supervisor()
    # Standard output is the pipe; a library that prints must not break the frame.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    frame = read_frame(sys.stdin.buffer)
    if frame is None:
        raise FailureError("worker.frame", "the reader was asked nothing")
    write_frame(replies, answer(*frame))


if __name__ == "__main__":
    main()
