"""A run of a mixture of experts: its router's auxiliary loss is trained and logged if its config switches it on."""

import io
import math

import pytest
import torch
import transformers as tf
from rich.console import Console
from safetensors.torch import load_file

from sdpo_kernels.stepwise.check import check_run
from sdpo_kernels.stepwise.common.progress import Reporter
from tests.stepwise import runs

KINDS = {
    "mixtral": (tf.MixtralConfig, {"num_local_experts": 4, "intermediate_size": 24}),
    "qwen3_moe": (tf.Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}),
}


def make_mixture(folder, kind, **options):
    config, shape = KINDS[kind]
    settings = {"vocab_size": len(runs.VOCABULARY), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 1, "num_experts_per_tok": 2, "pad_token_id": 0} | shape
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config(**settings | options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    runs.make_tokenizer().save_pretrained(folder)
    return folder


def trained(folder, kind, batching, **options):
    """The trained weights, the logged lines and what check says of a run of one stage."""
    folder.mkdir()
    settings = {"batching": batching, "trainer": {"per_device_train_batch_size": 4}}
    config = runs.configured(folder, make_mixture(folder / "model", kind, **options), sizes=(8,), **settings)
    stream = io.StringIO()
    check_run(config, Reporter(console=Console(file=stream, width=1000, highlight=False)))
    runs.train(config)
    weights = load_file(folder / "run" / "stage-1-s1" / "model.safetensors")
    return weights, runs.metrics(folder / "run"), stream.getvalue()


def same(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(("kind", "batching"), [("mixtral", "packed"), ("mixtral", "padded"), ("qwen3_moe", "packed")])
def test_the_coefficient_changes_the_weights_and_aux_loss_is_logged(tmp_path, kind, batching):
    on = {"output_router_logits": True}
    zero, zero_lines, said = trained(tmp_path / "0", kind, batching, **on, router_aux_loss_coef=0.0)
    ten, ten_lines, _ = trained(tmp_path / "10", kind, batching, **on, router_aux_loss_coef=10.0)
    assert "router_aux_loss_coef" not in said
    assert not same(zero, ten)
    gates = [name for name in zero if "gate.weight" in name]
    assert gates
    assert all(not torch.equal(zero[name], ten[name]) for name in gates)

    # the policy starts as its reference: the pairs' loss is ln 2, and the logged loss contains the auxiliary one
    assert zero_lines[0]["aux_loss"] == pytest.approx(ten_lines[0]["aux_loss"], rel=1e-6)
    assert zero_lines[0]["aux_loss"] > 1
    assert zero_lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert ten_lines[0]["loss"] == pytest.approx(math.log(2) + 10 * ten_lines[0]["aux_loss"], rel=1e-6)


def test_without_the_switch_the_coefficient_changes_nothing_and_a_warning_says_so(tmp_path):
    zero, _, silent = trained(tmp_path / "0", "mixtral", "packed", router_aux_loss_coef=0.0)
    ten, lines, said = trained(tmp_path / "10", "mixtral", "packed", router_aux_loss_coef=10.0)
    assert same(zero, ten)
    assert "aux_loss" not in lines[0]
    assert "router_aux_loss_coef" not in silent
    assert said.count("model: router_aux_loss_coef is 10 but output_router_logits is false") == 1


def test_evaluation_logs_it_too(tmp_path):
    model = make_mixture(tmp_path / "model", "mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    evaluation = runs.write_rows(tmp_path / "e.jsonl", runs.make_rows(5, seed=9))
    trainer = {"eval_strategy": "epoch"}
    runs.train(runs.configured(tmp_path, model, sizes=(8,), eval_data=str(evaluation), trainer=trainer))
    (line,) = [line for line in runs.metrics(tmp_path / "run") if "eval_loss" in line]
    assert line["eval_aux_loss"] > 1
    assert line["eval_loss"] > 0.5 * line["eval_aux_loss"]
