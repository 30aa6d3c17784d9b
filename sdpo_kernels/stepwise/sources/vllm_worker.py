"""Answers by vLLM: a program of its own, which needs nothing of this package and ends when its answers are written.

    PYTHON vllm_worker.py FOLDER

FOLDER has job.json: {"llm": arguments of vllm.LLM, "sampling": those of SamplingParams, "adapter": a folder or null,
"batches": [{"number", "prompts": [token ids], "seeds"}]}. For each batch, in order, it writes FOLDER/NUMBER.json:
{"by": "vLLM 0.33.0", "answers": [[[token ids, finish reason], …] of each prompt]}. A file is there only once it is
complete. The program's standard input is a pipe that nothing is written to; it ends when that is closed, as it is when
the training process dies.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
from pathlib import Path


def main(folder: Path) -> None:
    """Answer the job in `folder`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()

    # this file's folder has modules of other names than its neighbours mean
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    import vllm

    job = json.loads((folder / "job.json").read_text("utf-8"))
    more, request = {}, None
    if job["adapter"] is not None:
        from vllm.lora.request import LoRARequest

        _require_patterns(Path(job["adapter"]), vllm.__version__)
        request = LoRARequest("policy", 1, job["adapter"])
        more = {"enable_lora": True}
    model = vllm.LLM(**more | job["llm"])

    for batch in job["batches"]:
        outputs = model.generate(
            [{"prompt_token_ids": ids} for ids in batch["prompts"]],
            [vllm.SamplingParams(seed=seed, **job["sampling"]) for seed in batch["seeds"]],
            use_tqdm=False,
            lora_request=request,
        )
        answers = [[[list(one.token_ids), one.finish_reason] for one in output.outputs] for output in outputs]
        _write(folder / f"{batch['number']}.json", {"by": f"vLLM {vllm.__version__}", "answers": answers})


def _require_patterns(adapter: Path, version: str) -> None:
    """End if this vLLM would scale all modules of the adapter alike, whatever its patterns say, as 0.10 does."""
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    if not (config.get("rank_pattern") or config.get("alpha_pattern")):
        return
    from vllm.lora.peft_helper import PEFTHelper

    if "alpha_pattern" not in {field.name for field in dataclasses.fields(PEFTHelper)}:
        sys.exit(f"vLLM {version} ignores rank_pattern and alpha_pattern of an adapter: install a newer one, as 0.33")


def _write(path: Path, value: object) -> None:
    """Write JSON in one step: the other process reads the file as soon as it is there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), "utf-8")
    os.replace(temporary, path)


def _end_with_parent() -> None:
    """Wait for the end of standard input, then kill this process and those it has started: they hold GPU memory."""
    os.read(0, 1)  # not sys.stdin, whose lock would be held when Python ends
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(Path(sys.argv[1]))
