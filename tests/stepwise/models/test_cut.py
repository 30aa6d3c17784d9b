"""Models that two ranks load cut: the weights, scores and hash of the whole one, which neither rank ever holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, MixtralConfig, TrainingArguments

from sdpo_kernels.integrations.causal_lm import check_head
from sdpo_kernels.integrations.cut_weights import is_cut, own, reshard
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.progress import Mute
from sdpo_kernels.stepwise.data.batches import Batch, PairDataset
from sdpo_kernels.stepwise.models.cut import Cut, load_for
from sdpo_kernels.stepwise.models.cut_saving import save_pieces, weights_of, whole_trained
from sdpo_kernels.stepwise.models.load import Loaded, add_adapter, load_model
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.models.stored import Stored
from sdpo_kernels.stepwise.prepare import prepare
from sdpo_kernels.stepwise.record.template_time import template_time
from sdpo_kernels.stepwise.references.scorer import Scorer
from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from tests.stepwise import runs
from tests.stepwise.ranks_of_a_run import _free_port

pytestmark = pytest.mark.xdist_group("distributed")

SMALL: dict[str, Any] = {"vocab_size": 44, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES: dict[str, Any] = {
    "llama": None,
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SMALL),  # tied; positions in no group
    "gemma3": Gemma3TextConfig(num_key_value_heads=1, head_dim=8, **SHAPE, **SMALL),  # a scaled embedding, windows
    "mixtral": MixtralConfig(num_key_value_heads=1, num_local_experts=4, **SHAPE, **SMALL),  # experts are converted
}


def model_of(family: str, folder: Path) -> Path:
    if FAMILIES[family] is None:
        return runs.make_model(folder, num_hidden_layers=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(folder)
    runs.make_tokenizer().save_pretrained(folder)
    return folder


class LargestLive(TorchDispatchMode):
    """The most bytes of floating-point tensors that were alive at once, of those that any operation has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [getattr(leaf, "_local_tensor", leaf) for leaf in tree_leaves((args, kwargs, out))]
        storages = [
            tensor.untyped_storage()
            for tensor in tensors
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.is_floating_point()
        ]
        if any(storage._cdata not in self.seen for storage in storages):
            self.seen |= {storage._cdata: StorageWeakRef(storage) for storage in storages}
            self.peak = max(self.peak, self.live())
        return out

    def live(self) -> int:
        """The bytes that are alive now. FSDP2 keeps the storages of gathered weights, and empties them."""
        self.seen = {key: reference for key, reference in self.seen.items() if not reference.expired()}
        found = [torch.UntypedStorage._new_with_weak_ptr(reference.cdata) for reference in self.seen.values()]
        return sum(storage.nbytes() for storage in found if storage is not None)


def configured(folder: Path, model: Path) -> RunConfig:
    return runs.configured(folder, model, (5,), trainer={"fsdp": True})


def score(config: RunConfig, loaded: Loaded, args: TrainingArguments) -> torch.Tensor:
    tokens = prepare(config, template_time(config), Mute()).stages[0].tokens
    scorer = Scorer.of(config, args, 0, Mute())
    data = PairDataset(tokens, torch.zeros(len(tokens), 2))
    batch = Batch.of(scorer.collator(loaded)([data[i] for i in range(len(tokens))]))
    with torch.no_grad():
        return batch.logps(loaded.model)


def as_rank(rank: int, port: int, work: Any, *arguments: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    with ranks.joined(lambda: dist.init_process_group("gloo")):
        work(rank, *arguments)
    os._exit(0)


def on_two_ranks(work: Any, *arguments: Any) -> None:
    """`work(rank, *arguments)` in two processes; both must end well."""
    port = _free_port()
    started = [runs._server().Process(target=as_rank, args=(rank, port, work, *arguments)) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        if process.exitcode != 0:
            for other in started:
                other.kill()
    assert [process.exitcode for process in started] == [0, 0]


def load_and_save(rank: int, folder: Path, models: dict[str, Path]) -> None:
    found = {}
    for family, model in models.items():
        config = load_config(folder / family / "run.yaml")
        args = TrainingArguments(output_dir=str(folder), fsdp=True, use_cpu=True)
        loaded = load_for(str(model), config, Precision.of(args), Cut.of(args))
        assert is_cut(loaded.model)
        check_head(loaded.model, torch.arange(3, 20))
        logps = score(config, loaded, args)
        reshard(loaded.model)
        found[family] = (loaded.hash(), logps, loaded.packed, loaded.shared, dict(loaded.model.named_buffers()))
        out = folder / f"{family}-saved"
        out.mkdir(exist_ok=True)
        save_pieces(weights_of(loaded.model), out, 4000)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("cut")
    models = {family: model_of(family, folder / "models" / family) for family in FAMILIES}
    for family, model in models.items():
        (folder / family).mkdir()
        configured(folder / family, model)
    on_two_ranks(load_and_save, folder, models)
    return folder, models


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_is_the_whole_one(loaded, family, monkeypatch):
    """Both ranks: its hash to the bit, its scores, its buffers, its kind of batches, its head."""
    folder, models = loaded
    config = configured(folder / family, models[family])
    args = TrainingArguments(output_dir=str(folder), use_cpu=True)
    whole = load_model(str(models[family]), config, Precision(torch.device("cpu")))
    expected = score(config, whole, args)
    for rank in (0, 1):
        digest, logps, packed, shared, buffers = torch.load(folder / f"{rank}.pt", weights_only=False)[family]
        assert digest == whole.hash()
        assert torch.allclose(logps, expected, rtol=1e-6, atol=1e-5)
        assert (packed, shared) == (whole.packed, whole.shared)
        assert buffers.keys() == dict(whole.model.named_buffers()).keys()
        assert all(buffers[name].equal(value) for name, value in whole.model.named_buffers())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_pieces_are_saved_as_files_that_transformers_loads(loaded, family):
    """In several files with an index; the values are those of the model, to the bit."""
    folder, models = loaded
    saved = folder / f"{family}-saved"
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    (saved / "config.json").write_bytes((models[family] / "config.json").read_bytes())
    whole, again = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (models[family], saved))
    assert whole.keys() == again.keys()
    assert all(whole[name].equal(again[name]) for name in whole)
    on_disk = [name for path in saved.glob("*.safetensors") for name in load_file(path)]
    assert len(on_disk) == len(set(on_disk)) == len({w.data_ptr() for w in whole.values()})


LORA = {"lora": {"r": 2, "modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]}}


def load_with_adapter(rank: int, folder: Path) -> None:
    config = load_config(folder / "run.yaml")
    args = TrainingArguments(output_dir=str(folder), fsdp=True, use_cpu=True)
    torch.manual_seed(3)
    loaded = load_for(config.model, config, Precision.of(args), Cut.of(args), trains=True)
    torch.save((loaded.hash(), whole_trained(loaded.model)), folder / f"{rank}.pt")


def test_a_new_adapter_on_a_cut_model_is_that_of_a_whole_one(tmp_path, model):
    """The same random start, copies of whole modules with the base's weights, and the base's hash."""
    config = runs.configured(tmp_path, model, (5,), trainer={"fsdp": True}, **LORA)
    torch.manual_seed(3)
    whole = load_model(str(model), config, Precision(torch.device("cpu")))
    digest = whole.hash()
    add_adapter(whole, config.lora)
    expected = {name: weight for name, weight in whole.model.named_parameters() if weight.requires_grad}
    on_two_ranks(load_with_adapter, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first[0] == second[0] == digest
    assert first[1].keys() == expected.keys()
    assert all(first[1][name].equal(weight) for name, weight in expected.items())
    assert not second[1]  # only rank 0 has them whole


def measure(rank: int, folder: Path, model: Path) -> None:
    config = load_config(folder / "run.yaml")
    args = TrainingArguments(output_dir=str(folder), fsdp=True, use_cpu=True)
    with LargestLive() as live:
        loaded = load_for(str(model), config, Precision.of(args), Cut.of(args))
        loaded.hash()
        out = folder / "saved"
        out.mkdir(exist_ok=True)
        save_pieces(weights_of(loaded.model), out)
    (folder / f"{rank}.txt").write_text(f"{live.peak} {sum(own(w).nbytes for w in loaded.model.parameters())}")


def test_no_rank_ever_holds_the_whole_model(tmp_path):
    """Loading, probing, hashing and saving a model of a million weights, against loading it whole."""
    model = runs.make_model(tmp_path / "m", num_hidden_layers=24, hidden_size=64, intermediate_size=128)
    (tmp_path / "run").mkdir()
    config = configured(tmp_path / "run", model)
    size = sum(weight.nbytes for weight in load_file(model / "model.safetensors").values())
    with LargestLive() as live:
        load_model(str(model), config, Precision(torch.device("cpu"))).hash()
    assert live.peak > size
    on_two_ranks(measure, tmp_path / "run", model)
    for rank in (0, 1):
        peak, shards = map(int, (tmp_path / "run" / f"{rank}.txt").read_text().split())
        assert size / 2 <= shards < 0.51 * size
        assert peak < 0.65 * size


def test_tied_weights_that_the_files_have_twice(tmp_path):
    """They are tied if they are equal, as transformers does it, and not if they differ."""
    from safetensors.torch import save_file

    folder = runs.make_model(tmp_path / "m", tie_word_embeddings=True)
    config = runs.configured(tmp_path, folder)
    weights = load_file(folder / "model.safetensors")
    for extra, tied in ((0.0, True), (1.0, False)):
        both = weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + extra}
        save_file(both, folder / "model.safetensors", {"format": "pt"})
        model = Stored.of(str(folder), config, str(folder)).model
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
