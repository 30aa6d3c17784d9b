"""DeepSpeed setups that are refused; no DeepSpeed is needed to refuse them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.batches import collate_packed, make_collate_padded
from sdpo_kernels.stepwise.models.zero import check_zero, require_its_checkpoint
from tests.integrations.tiny_models import tiny_model


def trainer(stage: int, model: Any, collate: Any = collate_packed) -> Any:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    return SimpleNamespace(
        is_deepspeed_enabled=True, accelerator=SimpleNamespace(state=state), model=model, data_collator=collate
    )


def test_zero3_needs_packed_batches():
    """With padded ones the ranks would run different numbers of forward passes, and wait for each other for ever."""
    with pytest.raises(ValueError, match="ZeRO-3 needs batching: packed"):
        check_zero(trainer(3, tiny_model("llama"), make_collate_padded(0)))
    check_zero(trainer(2, tiny_model("llama"), make_collate_padded(0)))
    check_zero(trainer(3, tiny_model("llama")))


def test_zero3_needs_a_head_without_a_lora_of_its_own():
    def adapted() -> Any:
        return get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))

    with pytest.raises(ValueError, match="ZeRO-3 would not gather the head's own LoRA"):
        check_zero(trainer(3, adapted()))
    check_zero(trainer(2, adapted()))
    check_zero(trainer(3, get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))))


def test_a_checkpoint_of_another_number_of_processes(tmp_path):
    folder = tmp_path / "global_step2"
    folder.mkdir()
    for rank in range(2):
        (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(UserError, match=r"was saved with 2 processes, must be resumed with as many \(now 1\)"):
        require_its_checkpoint(tmp_path)
    (folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    require_its_checkpoint(tmp_path)
