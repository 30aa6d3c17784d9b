"""The demo's warm-up: supervised training on the corpus of two authors.

losses = warm_up(model, tokenizer, warmup_corpus(64_000, seed=0), batch_size=64, learning_rate=3e-3)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NOT_SCORED = -100  # cross_entropy ignores it
RISE = 50  # warm-up steps of the learning rate
LAST_RATE = 0.1  # of the peak rate, at the last step


def warm_up(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[tuple[str, str]],
    *,
    batch_size: int,
    learning_rate: float,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train `model` in place on (prompt, answer) rows, each once and in order; returns the losses.

    The loss is on the answer and its end token. AdamW, gradients clipped at norm 1, linear warm-up and decay of the
    learning rate; an incomplete last batch is dropped. `on_step` is called with the step, from 1, and its loss.
    """
    ids, labels = answer_tensors(tokenizer, rows)
    steps = len(rows) // batch_size

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / RISE) * (1 - (1 - LAST_RATE) * step / steps)
    )

    losses = []
    model.train()
    for step in range(steps):
        batch = slice(step * batch_size, (step + 1) * batch_size)

        # padding is on the right, where a causal model's other tokens do not see it: no mask is needed
        logits = model(input_ids=ids[batch], use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[batch, 1:].flatten(), ignore_index=NOT_SCORED
        )

        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        losses.append(loss.item())
        on_step(step + 1, losses[-1])

    model.eval()
    return losses


def answer_tensors(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, T] int64 of prompt + answer + end, padded on the right, and labels for the answer only."""
    texts = [prompt + answer + tokenizer.eos_token for prompt, answer in rows]
    whole = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    prompts = tokenizer([prompt for prompt, _ in rows])["input_ids"]
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    is_answer = torch.arange(whole["input_ids"].shape[1]) >= prompt_lengths[:, None]
    scored = is_answer & whole["attention_mask"].bool()
    return whole["input_ids"], whole["input_ids"].masked_fill(~scored, NOT_SCORED)
