"""Clients that other people wrote, against a real server: two of them always, all of them where `slow` tests run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import DEMO_MODEL, ServerProcess, running_server

from tests.clients.client_runs import all_clients

CLIENTS = all_clients()
INSTALLED = ["anthropic", "openai"]  # with the tests


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("clients"), "--max-total-tokens", "32768") as process:
        yield process


def run(name: str, server: ServerProcess, python: Path | None = None) -> None:
    try:
        report = CLIENTS[name].run(server.url + "/v1", DEMO_MODEL, python=python)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{name}: {error.output}")
    assert report["flows"]


@pytest.mark.parametrize("name", INSTALLED)
def test_clients_that_are_installed(name: str, server: ServerProcess) -> None:
    run(name, server, Path(sys.executable))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(set(CLIENTS) - set(INSTALLED)))
def test_clients_in_environments_of_their_own(name: str, server: ServerProcess) -> None:
    run(name, server)
