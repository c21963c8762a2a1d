"""Other people's clients against a server on the demo checkpoint: `python -m tests.clients [NAME …]`.

Prints one line per client, and exits with 1 if one of them failed. The clients are installed into the user's cache
folder, from PyPI and npm.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from server_process import DEMO_MODEL, running_server

from tests.clients.client_runs import all_clients


def main() -> int:
    clients = all_clients()
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(clients)}; default: all")
    names = parser.parse_args().names or list(clients)
    if unknown := sorted(set(names) - set(clients)):
        parser.error(f"there is no client {', '.join(unknown)}; there are {', '.join(clients)}")
    failed = 0
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), "--max-total-tokens", "32768") as server:
        for name in names:
            try:
                report = clients[name].run(server.url + "/v1", DEMO_MODEL)
            except subprocess.CalledProcessError as error:
                failed += 1
                print(f"FAILED  {name}\n{error.output or error}")
            else:
                print(f"ok      {report['client']} {report['version']}: {', '.join(report['flows'])}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
