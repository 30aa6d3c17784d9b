"""A model's answers, greedy or sampled, many prompts at a time.

write_answers(model, tokenizer, ["sort kdab:"])                              # ["abdk"]
write_answers(model, tokenizer, ["sort kdab:"], temperature=1.0, seed=7)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MAX_NEW_TOKENS = 12  # the longest right answer has eight letters and an end token
BATCH = 512


@torch.no_grad()
def write_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str | None]:
    """One answer per prompt, without its end token; None if the model did not end within MAX_NEW_TOKENS.

    temperature: 0 is greedy decoding, 1 samples from the unmodified distribution. The same arguments (and number of
    threads) give the same answers; the global random state does not change.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    answers: list[str | None] = []

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), BATCH):
            # padding on the left, so that all answers start in the same column
            batch = tokenizer(
                list(prompts[start : start + BATCH]), padding=True, padding_side="left", return_tensors="pt"
            )
            tokens = model.generate(
                **{key: batch[key] for key in ("input_ids", "attention_mask")},
                **(sampling if temperature else {"do_sample": False}),
                max_new_tokens=MAX_NEW_TOKENS,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )

            answers += [answer_text(tokenizer, row) for row in tokens[:, batch["input_ids"].shape[1] :].tolist()]

    return answers


def answer_text(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str | None:
    """The text before the end token; None without one."""
    if tokenizer.eos_token_id not in tokens:
        return None
    return tokenizer.decode(tokens[: tokens.index(tokenizer.eos_token_id)])
