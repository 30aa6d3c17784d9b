"""Model cards: front matter that the Hub can read, and the numbers of the record."""

from pathlib import Path

import yaml  # what the hub itself reads a card with; huggingface_hub requires it

from sdpo_kernels.stepwise.record.model_cards import expo_card, model_card
from sdpo_kernels.stepwise.settings.run_settings import RunConfig

STAGE = {
    "index": 2, "name": "hard", "loss": "sigmoid", "beta": 0.05, "reference": "previous", "pairs": 1200, "steps": 300,
    "first_loss": 0.69314, "last_loss": 0.51239, "eval": None,
}  # fmt: skip
SCORES = {"pairs": 77, "pair_accuracy": 0.625, "reward_accuracy": 0.75, "reward_margin": 0.125}


def config(**settings):
    stages = [{"name": "hard", "data": "d.jsonl"}]
    return RunConfig.model_validate({"model": "org/base-7b", "output_dir": "r", "stages": stages, **settings})


def front_matter(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_stages_card_has_its_settings_and_results():
    head, body = front_matter(model_card(config(), STAGE))
    assert head == {
        "library_name": "transformers",
        "base_model": "org/base-7b",
        "tags": ["dpo", "stepwise-dpo", "preference"],
    }
    assert body.startswith("# base-7b, stage 2 (hard) of a stepwise DPO run\n")
    for text in ("arXiv 2403.19270", "sigmoid, beta 0.05", "| previous |", "| 1200 |", "| 300 |", "0.6931, 0.5124"):
        assert text in body
    assert "evaluation" not in body
    assert "adapter" not in body


def test_a_stages_card_says_what_was_cut():
    cut = STAGE | {"cut_pairs": 1347, "lost_tokens": 113482}
    _, body = front_matter(model_card(config(max_length=256), cut))
    assert "| pairs cut at 256 tokens | 1347, losing 113482 scored tokens |" in body
    for whole in (STAGE, STAGE | {"cut_pairs": 0, "lost_tokens": 0}):
        assert "cut at" not in model_card(config(), whole)


def test_a_stages_card_has_what_it_was_trained_with():
    data = ["/home/me/a.jsonl", {"path": "org/pairs:train", "columns": {"prompt": "q"}}]
    stages = [{"name": "easy", "data": "e.jsonl"}, {"name": "hard", "data": data, "epochs": 2}]
    stages[1]["trainer"] = {"learning_rate": 3e-6}
    left_out = STAGE | {"skipped": 3, "dropped": 2}
    card = model_card(config(stages=stages, max_length=512, lora={"r": 8, "alpha": 16}), left_out)
    for line in (
        "| learning rate | 3e-06, linear |",
        "| epochs | 2 |",
        "| max_length | 512 |",
        "| data | a.jsonl, org/pairs:train |",
        "| LoRA | r 8, alpha 16 |",
        "| bad rows skipped | 3 |",
        "| pairs dropped | 2 |",
    ):
        assert f"\n{line}\n" in card
    assert "/home/me" not in card

    whole = model_card(config(), STAGE | {"skipped": 0, "dropped": 0})
    assert "LoRA" not in whole
    assert "skipped" not in whole
    assert "dropped" not in whole
    limited = model_card(config(trainer={"max_steps": 7}), STAGE)
    assert "| max_steps | 7 |" in limited
    assert "epochs" not in limited


def test_a_card_names_the_data_of_tiers_of_shuffled_stages_and_of_sources():
    tiers = config(order="margin", tiers=2)
    assert "| data | d.jsonl |" in model_card(tiers, STAGE | {"name": "hard-2"})
    both = [{"name": "easy", "data": "e.jsonl"}, {"name": "hard", "data": "d.jsonl"}]
    assert "| data | e.jsonl, d.jsonl |" in model_card(config(order="random", stages=both), STAGE)
    source = {"kind": "ranked", "judge": "m:f"}
    made = [{"name": "hard", "prompts": "p.jsonl", "source": source}]
    assert "| data | p.jsonl (prompts; pairs by ranked) |" in model_card(config(stages=made), STAGE)


def test_a_stages_card_says_how_many_of_its_pairs_were_used():
    assert "| pairs | 320 of 1200 |" in model_card(config(), STAGE | {"pairs_used": 320})
    assert "| pairs | 1200 |" in model_card(config(), STAGE | {"pairs_used": 1200})


def test_a_stages_card_has_its_scores_and_adapter():
    _, body = front_matter(model_card(config(lora={}), STAGE | {"eval": SCORES}))
    assert "| pair accuracy on 77 evaluation pairs | 0.625 |" in body
    assert "| reward accuracy, margin | 0.750, 0.125 |" in body
    assert "`adapter/`" in body


def test_a_path_with_yaml_syntax_in_it_is_quoted():
    path = "/models/a: b #1"
    head, _ = front_matter(model_card(config(model=path), STAGE))
    assert head["base_model"] == path
    for is_adapter, library in ((False, "transformers"), (True, "peft")):
        head, body = front_matter(expo_card(Path(path), Path(path), 0.0, ["a note"], is_adapter))
        assert head["base_model"] == path
        assert head["library_name"] == library
        assert body.endswith("With α = 0 the weights are those of θ1, unchanged.\n\na note\n")
