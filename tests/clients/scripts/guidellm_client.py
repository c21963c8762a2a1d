# /// script
# dependencies = ["torch==2.13.0", "guidellm==0.8.1"]
# ///
"""guidellm: four streams of synthetic text over /v1/chat/completions, every one of exactly the length asked for."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from flows import model, run, url

CHECKPOINT = Path(__file__).parents[3] / "dsengine" / "demo" / "checkpoint"
NUM_REQUESTS, OUTPUT_TOKENS = 20, 16


def concurrent_load() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        options = {
            "--backend": f"kind=openai_http,target={url.removesuffix('/v1')},model={model}",
            "--profile": "kind=concurrent,streams=4",
            "--constraint": f"kind=max_requests,count={NUM_REQUESTS}",
            "--tokenizer": f"kind=hf_auto,model={CHECKPOINT}",
            "--data": f"kind=synthetic_text,prompt_tokens=32,output_tokens={OUTPUT_TOKENS}",
            "--output": f"kind=json,path={report}",
        }
        arguments = [text for option in options.items() for text in option]
        command = [str(Path(sys.executable).parent / "guidellm"), "run", *arguments, "--disable-console-interactive"]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        [benchmark] = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), len(requests["errored"])) == (NUM_REQUESTS, 0), requests["errored"][:1]
    lengths = {request["output_metrics"]["text_tokens"] for request in requests["successful"]}
    assert lengths == {OUTPUT_TOKENS}, lengths


if __name__ == "__main__":
    run("guidellm", concurrent_load)
