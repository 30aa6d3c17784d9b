"""Stands for vLLM 0.33.0 where it cannot be installed: the names, signatures and results that the worker uses.

An unknown argument is a TypeError, as in vLLM. A "sample" is three tokens made of prompt, seed and temperature, then
the end token; with an odd seed it does not end. What was called is written to $STUB_VLLM as JSON lines; $STUB_VLLM_DOES
is "fail", "die" or "hang" in the second call of `generate`, or "child": start a process that is left behind.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field

__version__ = "0.33.0"


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    detokenize: bool = True


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)


def _note(**what):
    what |= {"pid": os.getpid(), "environment": [name for name in os.environ if name in ("RANK", "MASTER_ADDR")]}
    with open(os.environ["STUB_VLLM"], "a") as stream:
        stream.write(json.dumps(what) + "\n")


def sampled(ids, seed, temperature):
    """Three token ids from 4 to 27, words of the tests' tokenizer."""
    digest = hashlib.sha256(json.dumps([ids, seed, temperature]).encode()).digest()
    return [4 + byte % 24 for byte in digest[:3]]


class LLM:
    def __init__(
        self, model, *, tokenizer=None, trust_remote_code=False, tensor_parallel_size=1, dtype="auto", seed=0,
        gpu_memory_utilization=0.92, enforce_eager=False, max_model_len=None, enable_lora=False, max_lora_rank=16,
    ):  # fmt: skip
        arguments = {name: value for name, value in locals().items() if name != "self"}
        assert os.path.exists(os.path.join(model, "model.safetensors"))
        child = None
        if os.environ.get("STUB_VLLM_DOES") == "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid
        _note(llm=arguments, child=child)
        self.longest, self.calls = max_model_len, 0

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        assert len(prompts) == len(sampling_params)
        self.calls += 1
        does = os.environ.get("STUB_VLLM_DOES") if self.calls == 2 else None
        _note(prompts=prompts, first=asdict(sampling_params[0]), lora=lora_request and asdict(lora_request))
        if does == "fail":
            raise ValueError("No available memory for the cache blocks.")
        if does == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if does == "hang":
            time.sleep(600)
        pairs = zip(prompts, sampling_params, strict=True)
        return [self._answered(prompt["prompt_token_ids"], params) for prompt, params in pairs]

    def _answered(self, ids, params):
        assert len(ids) + params.max_tokens <= self.longest
        output = RequestOutput(ids)
        for index in range(params.n):
            tokens, seed = sampled(ids, params.seed + index, params.temperature), params.seed + index
            ended = seed % 2 == 0
            tokens = [*tokens, params.stop_token_ids[0]] if ended else tokens
            output.outputs.append(CompletionOutput(index, "", tuple(tokens), "stop" if ended else "length"))
        return output
