"""DeepSpeed on two ranks."""
from __future__ import annotations
import json
from pathlib import Path
import pytest
from tests.stepwise import ranks_of_a_run as faults
from tests.stepwise import runs
from tests.stepwise.test_distributed_methods import deviation, trained, NEAR, EPSILON
from tests.stepwise.ranks_of_a_run import Ranks
import os
pytestmark = pytest.mark.xdist_group("distributed")


@pytest.mark.parametrize("stage", [2,3], ids=str)
@pytest.mark.parametrize("more", [{}, {"lora": {"r": 2}}, {"acc":1}, {"bf16": 1}, {"tied":1}], ids=str)
def test_zero(tmp_path, model, more, stage):
    t = {}
    more=dict(more)
    if more.pop("acc",0): t={"gradient_accumulation_steps": 2}
    if more.pop("bf16",0): t={"bf16": True}
    if more.pop("tied",0): model = runs.make_model(tmp_path / "tied", tie_word_embeddings=True)
    whole = trained(tmp_path, model, 1, 4, **more, trainer=t)
    run = trained(tmp_path, model, 2, 4, trainer=t|{"deepspeed": {"zero_optimization": {"stage": stage}}}, **more)
    print(deviation(whole, run))
    print(os.popen(f"grep dtype {run}/stage-1*/config.json {whole}/stage-1*/config.json; grep loss {run}/metrics.jsonl | head -1; ls -la {run}/*/model.safetensors").read())
    assert 0
