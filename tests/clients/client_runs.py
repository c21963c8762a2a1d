"""Runs other people's clients against a server: each script of `scripts/` in an environment of its own.

Python scripts name what they need in their head (PEP 723, as `uv run` reads it); node scripts have theirs here.
Environments are kept in the user's cache folder, one per client and list of requirements, so that only the first run
installs anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dsengine-clients"
NPM_REQUIREMENTS = {"openai_node": ["openai@6.49.0"]}
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Client:
    """One script, and what it needs."""

    script: Path

    @property
    def name(self) -> str:
        return self.script.stem.removesuffix("_client")

    @property
    def requirements(self) -> list[str]:
        if self.script.suffix == ".mjs":
            return NPM_REQUIREMENTS[self.script.stem]
        lines = self.script.read_text().partition("# /// script\n")[2].partition("# ///\n")[0].splitlines()
        required: list[str] = tomllib.loads("\n".join(line.removeprefix("# ") for line in lines))["dependencies"]
        return required

    def install(self) -> Path:
        """The folder of its environment, made if there is none."""
        key = hashlib.sha256(json.dumps([sys.version_info[:2], self.requirements]).encode()).hexdigest()[:12]
        folder = CACHE / f"{self.name}-{key}"
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._install_npm(folder) if self.script.suffix == ".mjs" else self._install_pip(folder)
            (folder / "complete").touch()
        return folder

    def run(self, url: str, model: str, *, python: Path | None = None) -> dict[str, Any]:
        """What the script reports: the client's name, version and the flows that worked.

        Args:
            python: an interpreter that has the client already.

        Raises:
            subprocess.CalledProcessError: a flow failed; `output` holds what the script printed.
        """
        if self.script.suffix == ".mjs":
            folder = self.install()
            shutil.copy(self.script, folder)
            command = ["node", str(folder / self.script.name)]
        else:
            folder = self.script.parent
            command = [str(python or self.install() / "bin" / "python"), str(self.script)]
        done = subprocess.run(
            [*command, url, model],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        if done.returncode != 0:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return report

    def _install_pip(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        # One after the other: torch, where it is needed, is pinned before something else asks for its newest build.
        for requirement in self.requirements:
            command = [str(folder / "bin" / "pip"), "install", "--quiet", requirement]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)

    def _install_npm(self, folder: Path) -> None:
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", *self.requirements]
        subprocess.run(command, cwd=folder, check=True)


def all_clients() -> dict[str, Client]:
    """The clients by name."""
    scripts = sorted([*SCRIPTS.glob("*_client.py"), *SCRIPTS.glob("*.mjs")])
    return {client.name: client for client in map(Client, scripts)}
