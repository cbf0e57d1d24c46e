"""The Flower ServerApp: one call runs one study over whatever Grid it is given.

Source: Flower's ``ServerApp``; DESIGN "Built on Flower". Rules: which study, and in which hub folder, comes
from the run configuration (``hub-home``, ``study``); ``app`` stays a plain unannotated assignment, because
Flower's bundle builder finds no other.
"""

from contextlib import closing
from pathlib import Path

from flwr.serverapp import Grid, ServerApp

from common import flower
from common.errors import UsageError
from server.home import HubHome
from server.rounds import StudyRun
from server.store import Store

app = ServerApp()


@app.main()
def main(grid: Grid, context: flower.Context) -> None:
    """Run the study named in the run configuration to its end."""
    try:
        home, digest = str(context.run_config["hub-home"]), str(context.run_config["study"])
    except KeyError as error:
        raise UsageError("server-app.config", f"the run configuration lacks {error}") from error
    with closing(Store.open(HubHome(Path(home)).database)) as store:
        StudyRun(HubHome(Path(home)), store, grid, digest).run()
