"""The model and the pairs that every trainer trains on, as a folder: model/ and pairs.jsonl.

python -m benchmarks.trainers.problem FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.problem import DATA

PAIRS = 128
PAIRS_A_STEP = 8
TASK = "compact/stage2_commonsense.jsonl"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_problem(folder: Path) -> Path:
    """Write the problem unless it is there; returns `folder`. Only this needs the project's own environment."""
    if (folder / "pairs.jsonl").exists():
        return folder

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers/gpt2")
    tokenizer.chat_template = CHAT_TEMPLATE
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=50257,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )

    # random weights: time does not depend on them
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "model")

    lines = (DATA / TASK).read_text(encoding="utf-8").splitlines()[:PAIRS]
    rows = [json.loads(line) for line in lines]
    kept = [{key: row[key].strip() for key in ("prompt", "chosen", "rejected")} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return folder


def read_pairs(folder: Path) -> list[dict[str, str]]:
    """Prompt, chosen and rejected answer, plain text without spaces at the ends."""
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    write_problem(Path(sys.argv[1]))
