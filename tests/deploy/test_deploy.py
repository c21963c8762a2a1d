"""Scripts and manifests for several machines: their linters pass, and every command in them is one that `serve` takes.

The shell scripts are run as they are, with stand-ins for `ssh`, `srun` and `dsengine` that write down their arguments.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsengine.cli import build_parser
from dsengine.cli_flags import build_config, resolve_model
from dsengine.config import EngineConfig, ServerConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = [DEPLOY / "two_nodes.sh", DEPLOY / "two_nodes.sbatch"]
STAND_IN = {
    "LWS_GROUP_SIZE": "2",
    "LWS_WORKER_INDEX": "1",
    "LWS_LEADER_ADDRESS": "dsengine-0.dsengine",
    "NODE_RANK": "1",
    "ADDRESS": "10.0.0.1",
    "MODEL": "deepseek-ai/DeepSeek-R1",
}

# The first machine's command waits for the other's, whose end it would be.
NOTE = """
import json, pathlib, sys, time
log, words = pathlib.Path(sys.argv[1]), ["dsengine", *sys.argv[2:]]
with log.open("a") as file:
    file.write(json.dumps(words) + chr(10))
rank = words[words.index("--node-rank") + 1]
while rank == "0" and len(log.read_text().splitlines()) < 2:
    time.sleep(0.02)
"""


def parsed(words: list[str]) -> EngineConfig:
    """What `dsengine serve` makes of a command, all of whose flags it must know."""
    assert words[:2] == ["dsengine", "serve"], words
    parser, commands = build_parser()
    args, unknown = parser.parse_known_args(words[1:])
    commands["serve"].reject_unknown(unknown)
    resolve_model(args)
    build_config(args, ServerConfig)
    return build_config(args, EngineConfig)


def check_two_nodes(configs: list[EngineConfig]) -> None:
    assert [config.node_rank for config in configs] == [0, 1]
    for config in configs:
        assert (config.nnodes, config.tp_size, config.local_size) == (2, 16, 8)
        assert config.dist_init_addr == configs[0].dist_init_addr


def tool(name: str) -> str:
    """A program of this environment or of the machine; the test is skipped where there is none."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"there is no {name} here")
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_their_linter(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    result = subprocess.run([tool("shellcheck"), str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """(file of commands that were run, environment) with a `dsengine` that only notes how it was called."""
    log = tmp_path / "commands"
    log.touch()
    (tmp_path / "note.py").write_text(NOTE)
    words = (sys.executable, str(tmp_path / "note.py"), str(log))
    stand_in(tmp_path, "dsengine", f'exec {shlex.join(words)} "$@"')
    return log, os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def commands(log: Path) -> list[EngineConfig]:
    return sorted((parsed(json.loads(line)) for line in log.read_text().splitlines()), key=lambda each: each.node_rank)


def test_the_ssh_script_starts_both_machines(tmp_path: Path, machine: tuple[Path, dict[str, str]]) -> None:
    log, env = machine
    # As sshd does: the words after the host's name are joined and given to a shell.
    stand_in(tmp_path, "ssh", 'while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done; shift; exec sh -c "$*"')
    script = DEPLOY / "two_nodes.sh"
    command = ["bash", str(script), "10.0.0.1", "other", "--served-model-name", "a name"]
    subprocess.run(command, env=env | {"MODEL": "some/model"}, check=True, timeout=60)
    configs = commands(log)
    check_two_nodes(configs)
    assert {config.model for config in configs} == {"some/model"} and configs[0].dist_init_addr == "10.0.0.1:20000"
    refused = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True)
    assert refused.returncode == 2 and "usage:" in refused.stderr


def test_the_slurm_script_starts_both_machines(tmp_path: Path, machine: tuple[Path, dict[str, str]]) -> None:
    log, env = machine
    stand_in(tmp_path, "scontrol", 'printf "first\\nsecond\\n"')
    stand_in(tmp_path, "getent", 'echo "10.0.0.7 STREAM $2"')
    stand_in(tmp_path, "srun", 'shift; SLURM_PROCID=0 "$@" & SLURM_PROCID=1 "$@"; wait')
    command = ["bash", str(DEPLOY / "two_nodes.sbatch"), "--served-model-name", "a name"]
    subprocess.run(command, env=env | {"SLURM_JOB_NODELIST": "x[1-2]"}, check=True, timeout=60)
    configs = commands(log)
    check_two_nodes(configs)
    assert configs[0].dist_init_addr == "10.0.0.7:20000" and configs[0].model == "deepseek-ai/DeepSeek-R1"


def test_the_compose_file_is_valid_and_starts_both_machines() -> None:
    yaml = pytest.importorskip("yaml")
    text = (DEPLOY / "compose.yaml").read_text()
    service = yaml.safe_load(text)["services"]["dsengine"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    words = [filled(word, STAND_IN) for word in service["command"]]
    check_two_nodes(
        [parsed(["dsengine", "serve", *(w.replace("rank=1", f"rank={rank}") for w in words)]) for rank in (0, 1)]
    )
    docker = tool("docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("this docker has no compose")
    command = [docker, "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    subprocess.run(command, env=os.environ | STAND_IN, check=True)


def filled(word: str, values: dict[str, str]) -> str:
    """`${NAME:-x}`, `${NAME:?x}` and `$(NAME)` by their values."""
    return re.sub(r"\$\{(\w+)[^}]*\}|\$\((\w+)\)", lambda found: values[found[1] or found[2]], word)


def test_the_kubernetes_manifests_are_valid_and_start_both_machines() -> None:
    yaml = pytest.importorskip("yaml")
    validator = pytest.importorskip("kubernetes_validate")
    workers, service = yaml.safe_load_all((DEPLOY / "leaderworkerset.yaml").read_text())
    validator.validate(service, "1.33", strict=True)
    assert (workers["apiVersion"], workers["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    template = workers["spec"]["leaderWorkerTemplate"]
    configs = []
    for index, name in enumerate(("leaderTemplate", "workerTemplate")):
        pod: dict[str, Any] = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **template[name]}
        pod["metadata"] = {"name": name.lower()}
        validator.validate(pod, "1.33", strict=True)
        [container] = pod["spec"]["containers"]
        values = STAND_IN | {"LWS_WORKER_INDEX": str(index), "LWS_GROUP_SIZE": str(template["size"])}
        configs.append(parsed([filled(word, values) for word in container["command"]]))
    check_two_nodes(configs)
    labels = template["leaderTemplate"]["metadata"]["labels"]
    selector = service["spec"]["selector"]
    assert selector.pop("leaderworkerset.sigs.k8s.io/name") == workers["metadata"]["name"] and selector == labels


def test_every_command_of_the_readme_is_one_that_serve_takes() -> None:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("dsengine serve")]
    assert len(lines) >= 4
    for line in lines:
        parsed(shlex.split(line, comments=True))
