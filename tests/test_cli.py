"""The command line as a user meets it: real processes, their output, their exit status, their complaints."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import dsengine
from dsengine.cli import build_parser
from dsengine.cli_flags import UsageError, build_config, flag_name, given_fields, resolve_model
from dsengine.config import EngineConfig, ServerConfig
from dsengine.model.manifest import MANIFEST_FILE

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "dsengine" / "demo" / "checkpoint"
COMMANDS = ("serve", "chat", "generate", "bench", "doctor")
QUESTION = "What is 347 + 285?"


def run(*words: str, stdin: str | None = None, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "dsengine", *words],
        input=stdin if stdin is not None else "",
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )


def assert_complains(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """A user's mistake: status 2, nothing on standard output, the words on standard error, and no traceback."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def parse(*words: str) -> argparse.Namespace:
    parser, _ = build_parser()
    args = parser.parse_args(list(words))
    resolve_model(args)
    return args


# The parser


def test_flags_reach_the_configuration_with_their_types():
    args = parse(
        "serve", "some/model", "--dtype", "float32", "--block-size", "32", "--mem-fraction-static", "0.5",
        "--disable-radix-cache", "--kernel", "mla_decode=ref", "--kernel", "sample=ref", "--no-thinking", "--port", "0",
        "--cuda-graph-bs", "1", "8", "--disable-overlap-schedule",
    )  # fmt: skip
    engine = build_config(args, EngineConfig)
    assert engine == EngineConfig(
        model="some/model",
        dtype="float32",
        block_size=32,
        mem_fraction_static=0.5,
        disable_radix_cache=True,
        kernel=("mla_decode=ref", "sample=ref"),
        cuda_graph_bs=(1, 8),
        disable_overlap_schedule=True,
    )
    assert build_config(args, ServerConfig) == ServerConfig(thinking=False, port=0)


def test_flags_not_given_leave_the_defaults():
    args = parse("serve")
    assert given_fields(args, EngineConfig) == {} and given_fields(args, ServerConfig) == {}
    assert build_config(args, EngineConfig) == EngineConfig()


@pytest.mark.parametrize(
    ("alias", "value", "field", "expected"),
    [
        ("--max-model-len", "128", "context_length", 128),
        ("--page-size", "64", "block_size", 64),
        ("--gpu-memory-utilization", "0.5", "mem_fraction_static", 0.5),
        ("--max-num-seqs", "3", "max_running_requests", 3),
        ("--max-num-batched-tokens", "99", "chunked_prefill_size", 99),
        ("--max-cudagraph-capture-size", "64", "cuda_graph_max_bs", 64),
        ("--cudagraph-capture-sizes", "3", "cuda_graph_bs", (3,)),
        ("--model-path", "/m", "model", "/m"),
        ("--model", "/m", "model", "/m"),
    ],
)
def test_spellings_of_other_engines(alias, value, field, expected):
    assert getattr(build_config(parse("serve", alias, value), EngineConfig), field) == expected


def test_two_different_models_are_refused():
    with pytest.raises(UsageError, match=r"'a'.*'b'"):
        parse("serve", "a", "--model", "b")


def test_the_readme_lists_every_flag_of_serve():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    fields = [*dataclasses.fields(EngineConfig), *dataclasses.fields(ServerConfig)]
    missing = [
        flag_name(field.name) for field in fields if field.name != "model" and flag_name(field.name) not in readme
    ]
    assert not missing


# Converting checkpoints


def test_convert_there_and_back_and_generate(tmp_path):
    there = run("convert", str(DEMO), str(tmp_path / "bf16"))
    assert there.returncode == 0, there.stderr
    assert "tensors converted to bf16, 0.014 GB read, 0.026 GB written in 1 file" in there.stdout
    back = run("convert", str(tmp_path / "bf16"), str(tmp_path / "fp8"), "--scale-fmt", "ue8m0")
    assert back.returncode == 0 and "converted to fp8" in back.stdout, back.stderr
    answer = run(
        "generate", str(tmp_path / "fp8"), "--verify-checksums", "on", "--chat", "-p", QUESTION, "--temperature", "0"
    )
    assert answer.returncode == 0 and answer.stdout.rstrip().endswith("632"), answer.stderr


def test_a_damaged_checkpoint_is_refused_by_its_manifest(tmp_path):
    shutil.copytree(DEMO, tmp_path / "demo")
    written = run("convert", str(tmp_path / "demo"), "--manifest-only")
    assert written.returncode == 0 and "SHA-256 sums of 5 files" in written.stdout
    with (tmp_path / "demo" / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    assert_complains(run("generate", str(tmp_path / "demo"), "-p", "x"), "model.safetensors: damaged, expected SHA-256")
    assert_complains(run("convert", str(DEMO)), "DST is missing")
    assert_complains(run("convert", str(DEMO), "x", "--manifest-only"), "DST and --manifest-only contradict")


# Processes that end before anything is loaded


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag(command):
    result = run(command, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert f"usage: dsengine {command}" in result.stdout
    for flag in ("--device", "--context-length", "--max-model-len", "--kernel", "--debug"):
        assert flag in result.stdout


def test_help_and_a_bare_command_list_the_commands():
    for words in (("--help",), ()):
        result = run(*words)
        assert result.returncode == 0
        assert all(f"\n    {command} " in result.stdout for command in COMMANDS)


def test_version_is_the_package_version():
    result = run("--version")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert dsengine.__version__ == declared
    assert result.returncode == 0 and result.stdout.startswith(f"dsengine {declared} ")


def test_help_imports_neither_torch_nor_the_server():
    script = (
        "import sys, dsengine.cli\n"
        "try: dsengine.cli.main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'fastapi', 'tokenizers', 'rich', 'httpx') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("serv",), ("serv", "serve")),
        (("serve", "--prot", "80"), ("--prot", "--port")),
        (("serve", "--port", "abc"), ("--port", "abc")),
        (("serve", "--port", "99999"), ("--port", "99999", "65535")),
        (("serve", "--dtype", "int3"), ("--dtype", "int3", "bfloat16")),
        (("serve", "--block-size", "0"), ("--block-size", "0", "at least 1")),
        (("serve", "--mem-fraction-static", "nan"), ("--mem-fraction-static", "nan")),
        (("serve", "--cuda-graph-bs", "4", "0"), ("--cuda-graph-bs", "0", "at least 1")),
        (("serve", "--kv-cache-dtype", "fp4"), ("--kv-cache-dtype", "fp4", "fp8_e4m3")),
        (("serve", "--kernel", "mla_decode"), ("--kernel", "mla_decode", "operation=backend")),
        (("serve", "a", "b"), ("b",)),
        (("chat", "--api-key", "k"), ("--api-key", "--url")),
        (("chat", "--url", "http://x", "--dtype", "float32"), ("--dtype", "--url")),
        (("generate",), ("--prompt", "--file")),
        (("generate", "-p", "x", "--thinking"), ("--thinking", "--chat")),
        (("generate", "-p", "x", "--temperature", "-1"), ("temperature", "-1")),
        (("generate", "-f", "/nowhere/at/all"), ("/nowhere/at/all",)),
        (("bench", "--output-len", "1"), ("--output-len", "1", "at least 2")),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_told_in_a_line_or_two(words, told):
    result = run(*words)
    assert_complains(result, *told)
    assert len(result.stderr.strip().splitlines()) <= 2


def test_unreadable_prompt_files(tmp_path):
    assert_complains(run("generate", "-f", str(tmp_path)), str(tmp_path), "directory")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("grün".encode("latin-1"))
    assert_complains(run("generate", "-f", str(latin)), str(latin), "not UTF-8", "byte 2 is 0xfc")


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_complains(run("serve", "--port", port), port, "in use")


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m dsengine serve --help | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.stdout.startswith("usage: dsengine serve") and result.stderr == ""


def test_a_url_where_nothing_listens(free_port):
    assert_complains(
        run("chat", "--url", f"localhost:{free_port}", "-q", "hi"), f"http://localhost:{free_port}", "reached"
    )


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Checkpoints that cannot be served


@pytest.mark.parametrize("command", [("serve",), ("generate", "-p", "x"), ("chat", "-q", "x")], ids=lambda c: c[0])
def test_a_missing_folder(command):
    assert_complains(run(*command, "--model", "/no/such/folder"), "/no/such/folder", "does not exist")


def test_a_hub_name_without_a_network():
    assert_complains(
        run("generate", "-p", "x", "--model", "nobody/nothing-of-this-name"), "nobody/nothing-of-this-name"
    )


@pytest.fixture(scope="module")
def truncated_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truncated") / "checkpoint"
    shutil.copytree(DEMO, folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    return folder


@pytest.mark.parametrize("command", [("serve", "--port", "0"), ("generate", "-p", "x")], ids=lambda c: c[0])
def test_a_truncated_checkpoint(command, truncated_checkpoint):
    result = run(*command, "--model", str(truncated_checkpoint))
    assert_complains(result, "truncated", ".safetensors")


def test_debug_shows_where_an_error_comes_from(truncated_checkpoint):
    result = run("generate", "-p", "x", "--debug", str(truncated_checkpoint))
    assert result.returncode == 2
    assert "Traceback" in result.stderr and "CheckpointError" in result.stderr


def test_another_architecture_is_refused_by_name(tmp_path):
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    (tmp_path / MANIFEST_FILE).unlink()  # it would not let the configuration be another
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    assert_complains(run("generate", "-p", "x", str(tmp_path)), "llama")


# doctor


def test_doctor_reports_in_json():
    result = run("doctor", "--json", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["engine"] == {"device": "cpu", "dtype": "float32"}
    assert report["versions"]["dsengine"] == dsengine.__version__ and report["versions"]["torch"]
    backends = {row["operation"]: row["backend"] for row in report["operations"]}
    assert {"mla_decode", "mla_prefill", "moe_experts", "rms_norm", "sample"} <= backends.keys()
    assert all(row["reason"] for row in report["operations"])
    assert report["checkpoint"]["layers"] >= 2 and report["checkpoint"]["nextn_layers"] == 1
    assert report["machine"]["cores"] >= 1


def test_doctor_obeys_and_shows_a_forced_backend():
    result = run("doctor", "--device", "cpu", "--kernel", "mla_decode=ref")
    assert result.returncode == 0
    rows = [line for line in result.stdout.splitlines() if "mla_decode" in line]
    assert len(rows) == 1 and "ref" in rows[0] and "forced" in rows[0]


def test_doctor_refuses_an_unknown_operation():
    assert_complains(run("doctor", "--device", "cpu", "--kernel", "nonsense=ref"), "nonsense")


def test_doctor_finds_a_broken_checkpoint_and_still_reports(truncated_checkpoint):
    result = run("doctor", "--json", "--device", "cpu", str(truncated_checkpoint))
    assert result.returncode == 2
    report = json.loads(result.stdout)
    assert "truncated" in report["checkpoint"]["error"] and report["operations"]


# Answers


def test_chat_answers_one_question():
    result = run("chat", "-q", QUESTION, "--temperature", "0", "--max-tokens", "400")
    assert result.returncode == 0, result.stderr
    assert "632" in result.stdout
    assert "<think>" not in result.stdout and "</think>" not in result.stdout


def test_chat_reads_questions_from_a_pipe_and_remembers():
    script = f"/think off\n\n{QUESTION}\n/reset\n/nonsense\nhello\n/exit\nnever asked\n"
    result = run("chat", "--temperature", "0", "--max-tokens", "100", stdin=script)
    assert result.returncode == 0, result.stderr
    assert "thinking is off" in result.stderr and "a new conversation" in result.stderr
    assert "no command '/nonsense'" in result.stderr
    assert len(result.stdout.strip().splitlines()) >= 2


def test_chat_goes_on_after_a_refused_question():
    result = run(
        "chat", "--context-length", "64", "--max-tokens", "4", "--no-thinking", stdin="word " * 200 + "\nhello\n"
    )  # fmt: skip
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and "the context holds 64" in result.stderr
    assert result.stdout.strip() and "cut off" in result.stderr


def test_chat_in_a_terminal_shows_the_reasoning_dimmed_and_stops_on_ctrl_c():
    terminal, inside = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    command = [sys.executable, "-m", "dsengine", "chat", "--max-tokens", "24", "--thinking"]
    process = subprocess.Popen(
        command,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env=environment,
        start_new_session=True,
        # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(inside)
    try:
        assert "chatting with the demo model" in read_until(terminal, "> ")
        os.write(terminal, b"What is 12 + 30?\n")
        answer = read_until(terminal, "> ")
        assert "\x1b[2m" in answer and "\x1b[0m" in answer and "Traceback" not in answer
        for _ in range(5):
            # A signal between the prompt and the wait for a key is only seen at the next key, or the next signal; one
            # that comes while the process is ending would kill it.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
                break
        assert process.poll() == 130
        assert "Traceback" not in read_until(terminal, None)
    finally:
        process.kill()
        os.close(terminal)


def read_until(terminal: int, mark: str | None, timeout: float = 200) -> str:
    """What a terminal shows until a line starts with `mark`, or (None) until the program has closed it."""
    shown = ""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # Linux reports the other side's end so
                return shown
            shown += data.decode(errors="replace")
        if mark is not None and shown.endswith(mark):
            return shown
    raise AssertionError(f"the terminal did not show {mark!r} in {timeout} s, but {shown!r}")


def test_generate_streams_the_same_text_as_it_reports():
    flags = ("--temperature", "0", "--max-tokens", "12", "--ignore-eos")
    streamed = run("generate", "-p", "1, 2, 3, 4,", *flags)
    reported = run("generate", "-p", "1, 2, 3, 4,", "--json", "-n", "2", *flags)
    assert streamed.returncode == 0 and reported.returncode == 0, streamed.stderr + reported.stderr
    record = json.loads(reported.stdout)
    texts = [output["text"] for output in record["outputs"]]
    assert texts[0] == texts[1] == streamed.stdout.removesuffix("\n")
    assert all(o["finish_reason"] == "length" and len(o["token_ids"]) == 12 for o in record["outputs"])


def test_generate_takes_one_prompt_per_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("first\n\nsecond\n")
    result = run("generate", "-f", str(file), "--json", "--max-tokens", "3")
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["first", "second"]
    piped = run("generate", "-f", "-", "--json", "--chat", "--max-tokens", "3", stdin="hello\n")
    assert "hello" in json.loads(piped.stdout)["prompt"]


def test_bench_ends_with_a_json_line():
    result = run("bench", "--batch-size", "1", "2", "--input-len", "16", "--output-len", "4", "--rounds", "1")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert [row["batch_size"] for row in summary["results"]] == [1, 2]
    assert all(row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0 for row in summary["results"])
