"""docs/: every block of code is valid, every command exists; those of the pages for beginners are run as they stand."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.main import get_command

import sdpo_kernels
from sdpo_kernels.cli import app
from sdpo_kernels.losses import loss_names, loss_options
from sdpo_kernels.stepwise.settings.run_settings import RunConfig, StageConfig
from sdpo_kernels.stepwise.settings.trainer import DEFAULT_TRAINER, training_fields
from tests.pages import DOCS, ROOT, blocks, commands, pages, text_of
from tests.stepwise.runs import CHAT, Child, make_rows, write_rows

NOT_EXTENDING = [page for page in pages() if page.parent.name != "extending"]  # tests/test_extending.py runs those
LEAST_RUN = {"model": "m", "output_dir": "o", "stages": [{"name": "a", "data": "a.jsonl"}]}


# ---- all pages: blocks are valid, commands exist ----


@pytest.mark.parametrize("page", NOT_EXTENDING, ids=lambda page: page.stem)
def test_blocks_are_valid(page):
    text = page.read_text(encoding="utf-8")
    for block in blocks(text, "python"):
        compile(block, page.name, "exec")
        for line in re.findall(r"^ *(from sdpo_kernels.*|import sdpo_kernels.*)$", block, re.M):
            exec(line)
    for block in blocks(text, "json"):
        json.loads(block)
    for block in blocks(text, "yaml"):
        for settings in map(YAML(typ="safe").load, ways(block)):
            if page.name == "integrations.md" and not settings.keys() <= RunConfig.model_fields.keys():
                continue  # another project's settings
            if "source" in settings:
                settings = {"stages": [{"name": "a", "prompts": "p.jsonl"} | settings]}
            RunConfig.model_validate(LEAST_RUN | settings)


def ways(block: str) -> list[str]:
    """The block, or each of its lines if all write the same key."""
    lines = block.splitlines()
    return lines if len({line.split(":")[0] for line in lines}) == 1 else [block]


@pytest.mark.parametrize("page", NOT_EXTENDING, ids=lambda page: page.stem)
def test_commands_exist(page):
    for command in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command)
        if "sdpo_kernels" in words and "-m" in words:  # torchrun, accelerate launch, python
            words = ["sdpo", *words[words.index("sdpo_kernels") + 1 :]]
        check = {"sdpo": check_sdpo, "make": check_make, "python": check_python, "pip": check_pip}
        check[words[0]](words[1:])


def check_sdpo(words: list[str]) -> None:
    """The subcommand takes these arguments."""
    subcommand = get_command(app).commands[words[0]]
    subcommand.make_context(words[0], [word.strip("[]") for word in words[1:] if word != "…"])


def check_make(words: list[str]) -> None:
    assert words[0] in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        module = words[1] if not words[1].startswith("pytest") else "pytest"
        assert importlib.util.find_spec(module) is not None, module
    else:
        assert (ROOT / words[0]).exists(), words[0]


def check_pip(words: list[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"\[([a-z,]+)\]", " ".join(words)):
        assert all(f"\n{name} = [" in text for name in extra.split(","))


# ---- the pages for beginners: run ----


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder in which the names that the pages use lead to a tiny model and tiny data."""
    monkeypatch.chdir(tmp_path)
    tokens = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = CHAT.replace("</s>", "<end>")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), eos_token_id=0, pad_token_id=0, **sizes))
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "path/to/your/sft-model"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "data").mkdir()
    for seed, name in enumerate(("easy", "hard", "data/train", "data/eval")):
        write_rows(tmp_path / f"{name}.jsonl", make_rows(6, seed))
    return tmp_path


def run_sdpo(page: str, folder: Path) -> int:
    """Run the page's `sdpo` commands, and say how many; of those that differ in numbers only, one, for fewer steps."""
    found = [line for line in commands(text_of(page)) if line.startswith("sdpo ")]
    different = {re.sub(r"=[\d.e-]+|-[\d.e-]+", "", command): command for command in found}.values()
    for command in different:
        few_steps = ["trainer.max_steps=2"] if command.startswith("sdpo train ") else []
        child = Child(folder, *shlex.split(command)[1:], *few_steps)
        assert child.wait() == 0, f"{command}: {child.text}"
    return len(different)


def test_float32_heads():
    """Ours as exact as float32 can be; bf16 logits off by thousands of times as much."""
    (block,) = blocks(text_of("float32_heads.md"), "python")
    found: dict[str, torch.Tensor] = {}
    exec(block, found)
    ours, bf16 = ((found[name] - found["truth"]).abs().max() for name in ("ours", "bf16"))
    assert ours < 1e-4 < 1e-2 < bf16


@pytest.mark.slow
def test_quickstart_and_choosing(folder):
    write, use = blocks(text_of("quickstart.md"), "python")
    exec(write, {})
    (folder / "run.yaml").write_text(blocks(text_of("quickstart.md"), "yaml")[0])
    assert run_sdpo("quickstart.md", folder) == 6
    assert (folder / "runs/first/report.html").exists()
    exec(use, {})  # the model has learned nothing, but it answers
    assert run_sdpo("report.md", folder) == 1

    # in the same folder: those of the next page
    for name in ("easy", "hard"):
        (folder / f"{name}.jsonl").write_text((folder / "train.jsonl").read_text())
    assert run_sdpo("choosing.md", folder) == 3
    manifest = json.loads((folder / "runs/one-stage/manifest.json").read_text())
    assert [(stage["name"], stage["pairs"]) for stage in manifest["stages"]] == [("all", 8)]


def test_from_trl(folder):
    (folder / "run.yaml").write_text(blocks(text_of("from_trl.md"), "yaml")[0])
    assert run_sdpo("from_trl.md", folder) == 2
    assert (folder / "runs/first/stage-1-all/adapter").exists()


# ---- what single pages say ----


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first heading is `heading`."""
    table = text_of(page).split(f"\n| {heading} |")[1].split("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


def test_the_settings_beside_trl_exist():
    table = rows("from_trl.md", "TRL's `DPOConfig`")
    theirs = {name for theirs, _, _ in table for name in names(theirs)}
    if importlib.util.find_spec("trl") is not None:
        from trl import DPOConfig

        fields = {field.name: field.default for field in dataclasses.fields(DPOConfig)}
        own = set(DPOConfig.__annotations__)
        assert theirs <= fields.keys()
        assert own <= theirs | {"loss_type"}, "a setting of DPOConfig that the page does not name"
        assert fields["learning_rate"] == 1e-6
    for cell in (ours for _, ours, _ in table):
        assert cell == "–" or all(name in RunConfig.model_fields for name in names(cell)), cell
    for name in ("per_device_eval_batch_size", "gradient_checkpointing", "bf16"):
        assert name in training_fields()
    assert DEFAULT_TRAINER["learning_rate"] == 5e-7
    defaults = {"beta": 0.1, "max_length": 1024, "truncation": "keep_start", "batching": "packed"}
    assert {name: RunConfig.model_fields[name].default for name in defaults} == defaults
    assert StageConfig.model_fields["epochs"].default == 1
    assert loss_options("exo_pair")["label_smoothing"] == 1e-3
    assert loss_options("discopop")["discopop_tau"] == 0.05
    assert loss_options("ld_dpo")["ld_alpha"] == 0.5


def test_the_messages_of_troubleshooting_are_in_the_code():
    found = [*ROOT.joinpath("sdpo_kernels").rglob("*.py"), ROOT / "setup.py"]
    said = "\n".join(string for path in found for string in strings(ast.parse(path.read_text(encoding="utf-8"))))
    messages = re.findall(r"^\| `([^`]+)` \|", text_of("troubleshooting.md"), re.M)
    assert len(messages) > 15
    for message in set(messages) - {"file:line: what is wrong"}:
        assert all(part.strip(" :,") in said for part in message.split("…")), message


def strings(tree: ast.AST) -> list[str]:
    """The texts of a file, with … for what is filled in."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_the_chooser_names_every_loss():
    chooser = {name for _, cell in rows("methods/losses.md", "what you want") for name in names(cell)}
    assert chooser == set(loss_names())


def test_the_api_page_has_every_public_name():
    shown = re.findall(r"^::: sdpo_kernels\.(\w+)$", text_of("api.md"), re.M)
    assert set(shown) == set(sdpo_kernels.__all__) - {"__version__", "losses"}


def test_the_index_leads_to_every_page():
    links = set(re.findall(r"\]\(([\w/]+\.md)\)", text_of("README.md")))
    there = {page.relative_to(DOCS).as_posix() for page in NOT_EXTENDING if DOCS in page.parents}
    assert there - links == {"README.md"}
