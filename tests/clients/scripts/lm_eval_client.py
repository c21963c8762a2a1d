# /// script
# dependencies = ["torch==2.13.0", "lm-eval[api]==0.4.13", "transformers"]
# ///
"""lm-eval over /v1/completions: a local multiple-choice task, scored by echoed log-probabilities, and generation."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from flows import model, run, url

CHECKPOINT = Path(__file__).parents[3] / "dsengine" / "demo" / "checkpoint"
CHOICES = """\
task: counting
dataset_path: json
dataset_kwargs: {data_files: {test: counting.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
GENERATED = """\
task: continuing
dataset_path: json
dataset_kwargs: {data_files: {test: counting.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{n}}"
filter_list: [{name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}]
generation_kwargs: {until: [","], max_gen_toks: 4, temperature: 0}
metric_list: [{metric: exact_match}]
"""


def _evaluate(task: str, definition: str, more: str = "") -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        counts = [{"question": f"{i}, {i + 1}, {i + 2},", "n": i + 3} for i in range(1, 9)]
        rows = [c | {"choices": [f" {c['n']}", f" {c['n'] + 4}", " seven hats"], "answer": 0} for c in counts]
        Path(folder, "counting.jsonl").write_text("\n".join(map(json.dumps, rows)))
        Path(folder, "task.yaml").write_text(definition)
        arguments = (
            f"model={model},base_url={url}/completions,tokenizer={CHECKPOINT},tokenizer_backend=huggingface{more}"
        )
        command = ["-m", "lm_eval", "--model", "local-completions", "--model_args", arguments, "--include_path", folder]
        subprocess.run(
            [sys.executable, *command, "--tasks", task, "--output_path", f"{folder}/out"],
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": folder},
            check=True,
            capture_output=True,
        )
        [report] = Path(folder, "out").rglob("results_*.json")
        results: dict[str, float] = json.loads(report.read_text())["results"][task]
        return results


def log_likelihoods() -> None:
    assert _evaluate("counting", CHOICES)["acc,none"] == 1.0


def generated() -> None:
    assert _evaluate("continuing", GENERATED, ",tokenized_requests=False")["exact_match,stripped"] >= 0.8


if __name__ == "__main__":
    run("lm_eval", log_likelihoods, generated)
