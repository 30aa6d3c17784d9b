"""The demo's model and tokenizer: a Llama with 0.3 million parameters and a token per letter, in a Hugging Face folder.

tokenizer = build_tokenizer(); model = build_model(tokenizer, seed=0)
save(model, tokenizer, Path("runs/demo/start")); model, tokenizer = load(Path("runs/demo/start"))
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
INSTRUCTION = "sort "  # one token, like a word in a larger tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token each for a letter, the colon and "sort "; decoding restores the text without added spaces."""
    vocabulary = [PAD, EOS, UNKNOWN, INSTRUCTION, ":", *ascii_lowercase]
    words = WordLevel({token: number for number, token in enumerate(vocabulary)}, unk_token=UNKNOWN)

    # split into single characters, except for the instruction
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = Split(Regex(f"{INSTRUCTION}|."), "isolated")
    tokenizer.decoder = Fuse()

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights: three layers, width 96, tied head, float32; a seed always gives the same one."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    # the seed must not change the caller's random state
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model (evaluation mode, float32) and tokenizer in a folder from `save` or from a stage of a run."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer
