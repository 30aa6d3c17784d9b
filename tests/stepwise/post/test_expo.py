"""ExPO's arithmetic against float64, over dtypes, shards and tied heads; mismatches raise errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_kernels.stepwise.common import files
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models import weights
from sdpo_kernels.stepwise.post import expo
from sdpo_kernels.stepwise.post.expo import extrapolate
from tests.stepwise import runs


def save(folder: Path, tensors, shards: int = 1, **config) -> Path:
    """Tensors as a checkpoint of `shards` files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name, where in weight_map.items() if where == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load(folder: Path):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def draw(seed: int, dtype=torch.float32, scale: float = 1.0):
    """A few tensors of several shapes: empty, a scalar, one written in pieces."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (7, 5), "b.bias": (3,), "c": (), "d": (0, 4), "e": (2, 3, 4)}
    return {name: (torch.randn(shape, generator=random) * scale).to(dtype) for name, shape in shapes.items()}


def moved(tensors, seed: int, scale: float = 1e-2):
    step = draw(seed, scale=scale)
    return {name: (tensor.float() + step[name]).to(tensor.dtype) for name, tensor in tensors.items()}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Split the tensors of these tests into several pieces."""
    monkeypatch.setattr(weights, "PIECE", 8)
    monkeypatch.setattr(expo, "PIECE", 8)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_weights_are_those_of_the_formula(tmp_path, dtype, shards):
    before = draw(0, dtype)
    after = moved(before, 1)
    start, aligned = save(tmp_path / "0", before, 2), save(tmp_path / "1", after, shards)
    extrapolate(start, aligned, tmp_path / "out", 0.3)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors*")) == sorted(
        p.name for p in aligned.glob("*.safetensors*")
    )
    found = load(tmp_path / "out")
    assert found.keys() == after.keys()
    for name, got in found.items():
        old, new = before[name].double(), after[name].double()
        wanted = new + 0.3 * (new - old)
        assert (got.dtype, got.shape) == (dtype, new.shape)
        # half a unit in the last place for the final rounding, and the rounding of float32 before it
        unit = torch.finfo(dtype).eps / 2
        bound = unit * wanted.abs() + 3 * max(torch.finfo(torch.float32).eps, 0) * (new.abs() + 0.3 * (new - old).abs())
        if dtype == torch.float64:
            bound = 4 * torch.finfo(dtype).eps * (new.abs() + old.abs())
        assert bool(((got.double() - wanted).abs() <= bound).all()), name


def test_a_start_of_another_dtype_is_not_rounded(tmp_path):
    """θ0 in float32 and θ1 in bfloat16, and the other way round."""
    before, after = draw(0), moved(draw(0), 1)
    low = {name: tensor.bfloat16() for name, tensor in after.items()}
    extrapolate(save(tmp_path / "0", before), save(tmp_path / "1", low), tmp_path / "out", 0.5)
    for name, got in load(tmp_path / "out").items():
        exact = low[name].double() + 0.5 * (low[name].double() - before[name].double())
        assert torch.allclose(got.double(), exact, rtol=2**-8, atol=1e-6)
    extrapolate(save(tmp_path / "2", low), save(tmp_path / "3", before), tmp_path / "up", 0.5)
    for name, got in load(tmp_path / "up").items():
        exact = before[name].double() + 0.5 * (before[name].double() - low[name].double())
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_0_gives_the_aligned_files(tmp_path, dtype):
    after = draw(1, dtype) | {"minus zero": torch.tensor([-0.0, 1.0], dtype=dtype)}
    before = draw(0, dtype) | {"minus zero": torch.tensor([2.0, -3.0], dtype=dtype)}
    aligned = save(tmp_path / "1", after, 2)
    extrapolate(save(tmp_path / "0", before), aligned, tmp_path / "out", 0)
    for path in aligned.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_sharded_and_whole_give_the_same_and_transformers_loads_both(tmp_path, model):
    start, aligned = model, runs.make_model(tmp_path / "1", seed=1)
    loaded = AutoModelForCausalLM.from_pretrained(aligned)
    loaded.save_pretrained(tmp_path / "2", max_shard_size="4KB")
    AutoTokenizer.from_pretrained(aligned).save_pretrained(tmp_path / "2")
    for folder in (tmp_path / "1", tmp_path / "2"):
        extrapolate(start, folder, tmp_path / f"out{folder.name}", 0.4)
    assert (tmp_path / "out2" / "model.safetensors.index.json").exists()
    assert len(list((tmp_path / "out2").glob("*.safetensors"))) > 2
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / f"out{n}") for n in (1, 2)]
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name])
        old, new = AutoModelForCausalLM.from_pretrained(start).state_dict()[name], loaded.state_dict()[name]
        assert torch.allclose(tensor, new + 0.4 * (new - old), rtol=1e-5, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out2")
    assert tokenizer("good1 bad2")["input_ids"] == runs.make_tokenizer()("good1 bad2")["input_ids"]


def test_a_stages_records_are_not_copied_and_the_card_describes_the_model(tmp_path):
    aligned = save(tmp_path / "the stage", draw(1))
    for name in (
        "stage.json",
        "README.md",
        "eval_logps.safetensors",
        "trainer_state.json",
        "x.bin",
        "x.bin.index.json",
    ):
        (aligned / name).write_text("old")
    for name in ("LICENSE", "chat_template.jinja", "generation_config.json"):
        (aligned / name).write_text("kept")
    extrapolate(save(tmp_path / "0", draw(0)), aligned, tmp_path / "new" / "out", 0.25, ["a note"])
    out = tmp_path / "new" / "out"
    kept = ["LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(p.name for p in out.iterdir()) == kept
    card = (out / "README.md").read_text()
    for words in ("the stage, extrapolated with α = 0.25", "2404.16792", "Not trained", str(tmp_path / "0"), "a note"):
        assert words in card
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


# ---- tied heads ----

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_head_that_the_start_ties_is_its_embedding(tmp_path):
    old, new, head = torch.ones(3, 2), torch.full((3, 2), 2.0), torch.full((3, 2), 4.0)
    start = save(tmp_path / "0", {EMBEDDING: old}, tie_word_embeddings=True)
    aligned = save(tmp_path / "1", {EMBEDDING: new, HEAD: head}, tie_word_embeddings=False)
    extrapolate(start, aligned, tmp_path / "out", 0.5)
    found = load(tmp_path / "out")
    assert found[HEAD].unique().tolist() == [4 + 0.5 * (4 - 1)]
    assert found[EMBEDDING].unique().tolist() == [2.5]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_only_the_start_has(tmp_path, tied):
    """A tied head that other software wrote twice may go; an untied one may not."""
    start = save(tmp_path / "0", {EMBEDDING: torch.ones(3, 2), HEAD: torch.ones(3, 2)}, tie_word_embeddings=tied)
    aligned = save(tmp_path / "1", {EMBEDDING: torch.zeros(3, 2)}, tie_word_embeddings=True)
    if tied:
        extrapolate(start, aligned, tmp_path / "out", 0.5)
        assert load(tmp_path / "out").keys() == {EMBEDDING}
    else:
        with pytest.raises(UserError, match=r"^lm_head.weight \[3, 2\]: is in .*/0, not in .*/1"):
            extrapolate(start, aligned, tmp_path / "out", 0.5)


# ---- mismatches ----

CASES = {
    "missing before": (lambda b, a: b.pop("b.bias"), r"^b.bias \[3\]: is in .*/1, not in .*/0"),
    "missing after": (lambda b, a: a.pop("b.bias"), r"^b.bias \[3\]: is in .*/0, not in .*/1"),
    "shape": (
        lambda b, a: a.update(c=torch.ones(2)),
        r"^c: is \[\] in .*/0 and \[2\] in .*/1, must have the same shape",
    ),
    "integers": (
        lambda b, a: (a.update(n=torch.tensor([1])), b.update(n=torch.tensor([2]))),
        r"^n \[1\]: contains integers that differ between .*/0",
    ),
    "one integer": (lambda b, a: (a.update(n=torch.tensor([1])), b.update(n=torch.ones(1))), r"^n: is F32 and I64"),
    "float8": (
        lambda b, a: [t.update(n=torch.ones(1).to(torch.float8_e4m3fn)) for t in (a, b)],
        r"^n: is F8_E4M3 and F8_E4M3; quantised",
    ),
    "overflow": (
        lambda b, a: (a.update(n=torch.tensor([6e4]).half()), b.update(n=torch.tensor([0.0]))),
        r"^n: is not finite with alpha 0.3; .* than float16",
    ),
    "nan": (lambda b, a: [t.update(n=torch.tensor([float("nan")])) for t in (a, b)], "^n: is not finite"),
}


@pytest.mark.parametrize("case", CASES)
def test_mismatches_are_named(tmp_path, case):
    before, after = draw(0), draw(1)
    change, message = CASES[case]
    change(before, after)
    start, aligned = save(tmp_path / "0", before, 2), save(tmp_path / "1", after)
    with pytest.raises(UserError, match=message):
        extrapolate(start, aligned, tmp_path / "out", 0.3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


def test_equal_integers_are_kept(tmp_path):
    mask = {"mask": torch.tensor([[True, False]]), "ids": torch.arange(3)}
    extrapolate(save(tmp_path / "0", draw(0) | mask), save(tmp_path / "1", draw(1) | mask), tmp_path / "out", 0.3)
    found = load(tmp_path / "out")
    assert torch.equal(found["mask"], mask["mask"])
    assert torch.equal(found["ids"], mask["ids"])


def test_folders_that_are_no_checkpoints(tmp_path):
    start, aligned = save(tmp_path / "0", draw(0)), save(tmp_path / "1", draw(1))
    with pytest.raises(UserError, match=r"^org/model: is not a folder; only local folders .*hf download"):
        extrapolate(Path("org/model"), aligned, tmp_path / "out", 0.3)
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(UserError, match=r"contains neither model.safetensors nor .*pickle"):
        extrapolate(tmp_path / "pickle", aligned, tmp_path / "out", 0.3)
    for name in ("stage-1-a", "stage-2-b"):
        save(tmp_path / "run" / name, {"w": torch.ones(2)})
    with pytest.raises(UserError, match=r"run: is a run's folder; give one of the models in it: stage-1-a, stage-2-b"):
        extrapolate(tmp_path / "run", aligned, tmp_path / "out", 0.3)
    (start / "model.safetensors").write_bytes((aligned / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"0/model.safetensors: cannot be read as safetensors"):
        extrapolate(start, aligned, tmp_path / "out", 0.3)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": "gone.safetensors"}, r"gone.safetensors, which model.safetensors.index.json names, is missing"),
        ({"a": "../1/model.safetensors"}, r"must contain a weight_map"),
        ({}, r"must contain a weight_map"),
        ([], r"must contain a weight_map"),
    ],
)
def test_a_broken_index(tmp_path, index, message):
    start, aligned = save(tmp_path / "0", draw(0), 2), save(tmp_path / "1", draw(1))
    (start / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index} if index != [] else []))
    with pytest.raises(UserError, match=message):
        extrapolate(start, aligned, tmp_path / "out", 0.3)


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_an_invalid_alpha(tmp_path, alpha):
    with pytest.raises(UserError, match=r"^alpha: was .*, must be a finite number of at least 0"):
        extrapolate(tmp_path, tmp_path, tmp_path / "out", alpha)


def test_a_folder_that_is_not_empty_is_not_touched(tmp_path):
    start, aligned = save(tmp_path / "0", draw(0)), save(tmp_path / "1", draw(1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for taken in (start, aligned, aligned / "config.json"):
        with pytest.raises(UserError, match="already exists"):
            extrapolate(start, aligned, taken, 0.3)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    extrapolate(start, aligned, tmp_path / "empty", 0.3)
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_the_folder_appears_whole_and_synced(tmp_path, monkeypatch):
    """Leftovers of a kill are removed; at the rename everything is there and fsynced."""
    start, aligned, output = save(tmp_path / "0", draw(0)), save(tmp_path / "1", draw(1)), tmp_path / "out"
    hidden = tmp_path / ".out.expo"
    hidden.mkdir()
    (hidden / "half").write_text("left by a kill")
    synced, renamed, rename, sync = set(), [], files.os.rename, files.sync
    monkeypatch.setattr(files, "sync", lambda path: (synced.add(path), sync(path)))

    def note(source, target):
        if Path(target) == output:
            renamed.append(sorted(p.name for p in Path(source).iterdir()))
            assert {*Path(source).iterdir(), Path(source)} <= synced
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", note)
    extrapolate(start, aligned, output, 0.3)
    assert renamed == [["README.md", "config.json", "model.safetensors"]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "out"]


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(expo, "rewrite", full)
    with pytest.raises(UserError, match="out: cannot be written: No space left"):
        extrapolate(save(tmp_path / "0", draw(0)), save(tmp_path / "1", draw(1)), tmp_path / "out", 0.3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


# ---- memory ----


def resident(field: str) -> int:
    """Memory of this process in MiB; RssAnon leaves out pages of mapped files, which the kernel can take back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("shards", [1, 24])
def test_memory_holds_about_one_tensor(tmp_path, monkeypatch, shards):
    """With 24 tensors of 8 MiB per model: a whole model would be 192 MiB, and the result as much again."""
    monkeypatch.setattr(weights, "PIECE", 1 << 20)
    monkeypatch.setattr(expo, "PIECE", 1 << 20)
    tensors = {f"layer{i}": torch.full((1024, 2048), 1.0 + i) for i in range(24)}
    start, aligned = save(tmp_path / "0", tensors, 24), save(tmp_path / "1", tensors, shards)
    del tensors
    peaks = []

    def change(*args):
        peaks.append(resident("RssAnon"))
        return genuine(*args)

    genuine = expo.extrapolated
    monkeypatch.setattr(expo, "extrapolated", change)
    before = resident("RssAnon")
    extrapolate(start, aligned, tmp_path / "out", 0.3)
    assert len(peaks) == 24
    assert max(peaks) - before < 80  # one tensor, its pieces, and what malloc keeps


def test_no_pickle_is_read(tmp_path, monkeypatch):
    """Not even one next to the weights."""
    start, aligned = save(tmp_path / "0", draw(0)), save(tmp_path / "1", draw(1))
    for folder in (start, aligned):
        (folder / "pytorch_model.bin").write_bytes(b"no")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load"))
    extrapolate(start, aligned, tmp_path / "out", 0.3)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as found:
        assert set(found.keys()) == set(draw(0))
