"""The page of results is generated from JSON alone; the committed page is that of the committed JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page, pictures, readme_table
from benchmarks.betas_statistics import conclusions

ROOT = Path(__file__).resolve().parents[1]
ABOUT: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {"processor": "a chip", "cores": 2, "threads": 2, "device": "cpu", "load_average": 0.5}
    | {"instructions": "avx2"},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "commit": "0123456789ab",
}
RAN = {"median_s": 0.5, "min_s": 0.25, "max_s": 1.0, "peak_extra_bytes": 3 * 2**20, "error_nat": 0.125}
CASES = [{"case": "gemms"} | RAN | {"ratio_to_floor": 1.0}, {"case": "cce", "skipped": "CUDA alone"}]
RIVALS = [{"case": case} | RAN | {"ratio_to_floor": 1.0} for case in readme_table.HEAD]
SPAN = {"mean": 0.5, "least": 0.25, "largest": 0.75}
STAGE = {"method": "sdpo", "seeds": 2, "exactly_right": SPAN, "gain": None, "ranked_right": SPAN}
SIDE = {"median_s": 0.5, "min_s": 0.25, "max_s": 1.0, "tokens_a_second": 1234.0, "peak_extra_bytes": 2**20}
STEP = {"task": "grammar", "sides": {"ours": SIDE, "trl": SIDE}}
STEP |= {"trl_over_ours": 1.5, "trl_over_ours_spread": [1.25, 1.75]}
EXACT = {"dtype": "bf16", "vocab": 300, "input": "plain", "case": "ours", "nats": 1e-5, "dx": 2e-3, "dw": 3e-3}
TOKEN = {"nats": 2e-6, "of_peak": 1e-7, "probability": 3e-7, "dx": 2e-3, "dw": 3e-3}
TOKENS = [
    {"case": case, "peak": peak, "same_bits": bits} | TOKEN | real
    for case, bits in (("ours", ["repeated", "order", "batch", "stash", "threads"]), ("trl", ["repeated"]))
    for peak, real in ((5, {}), (80, {}), (17.6, {"real": "smollm2"}))
]
PAIRED = {"mean": 0.5, "low": 0.25, "high": 0.75, "seeds": [0.25, 0.75]}
TRAINED = dict.fromkeys(("pair_accuracy", "reward_margin", "reward_chosen", "reward_rejected", "kl"), PAIRED)
TRAINED["accuracy_minus_initial"] = PAIRED
APART = {"body": [0.5, 0.25], "head_seen": [1.0, 1.0], "head_unseen": [3.0, 3.0]}
POINT = {"factor": "vocab", "value": 200, "shape": {"rows": 5}, "results": CASES}
SWEPT = [
    {"task": "sorting", "method": method, "seed": seed, "beta": beta, "kl": kl}
    | {"exactly_right": 0.5 + above, "pair_accuracy": 0.25}
    for method, above in (("initial_model", -0.25), ("dpo", 0.0), ("sdpo", 0.125), ("random", 0.25))
    for seed in (1, 2)
    for beta, kl in (((0.0, 0.0),) if method == "initial_model" else ((1.0, 0.5), (3.0, 0.25)))
]
REPORTS: dict[str, dict[str, Any]] = {
    "head": {"shape": {"pairs": 1, "rows": 5, "dtype": "bf16"}, "results": CASES + RIVALS},
    "accuracy": {"shape": {"pairs": 1}, "results": [EXACT, EXACT | {"input": "confident", "nats": 0.0}]},
    "grad_tol": {
        "model": "smollm2",
        "rows": 5,
        "hidden": 16,
        "vocab": 90,
        "tolerances": [
            {"grad_tol": 2**-8, "relative": True, "kept": 0.25, "dx_error": 4e-3, "dw_error": 8e-4}
            | {"dx_rows": {"median": 2e-3, "worst": 5e-3}}
        ],
        "cases": [
            {"name": "2**-8 relative, stash auto", "step_s": 0.5, "spread_s": [0.25, 0.75], "step_to_gemms": 0.75}
            | {"step_to_exact": ratio, "backward_to_exact": None, "grad_tol": 2**-8, "relative": True, "frozen": frozen}
            for frozen, ratio in ((False, 0.625), (False, 0.875), (True, 1.25))
        ],
    },
    "grad_tol_training": {
        "settings": {"beta": 0.1},
        "data": "pairs.jsonl",
        "pairs": 12,
        "held_out": 4,
        "kl_pairs": 2,
        "seeds": [1, 2],
        "initial_accuracy": PAIRED,
        "results": [
            {"grad_tol": 0.0, "losses": [[0.75] * 12, [0.25] * 12]} | TRAINED,
            {"grad_tol": 2**-8, "losses": [[0.75] * 8 + [1.0] * 4] * 2, "minus_exact": TRAINED} | TRAINED,
        ],
        "seen_tokens": 1234,
        "update_lengths": {"0": APART, "0.00390625": APART},
        "distances": {"0.00390625": APART},
        "distances_between_seeds": APART,
    },
    "mismatch": {"shape": {"pairs": 1}, "results": [*TOKENS, {"case": "liger", "skipped": "not installed"}]},
    "scaling": {"base": {"pairs": 1}, "results": [POINT, POINT | {"value": 400}]},
    "step": {"results": [STEP]},
    "body": {
        "results": [
            {"task": "full1", "unshared": {"tokens": 3000, "work": 30, "seconds": 2.0}}
            | {"shared": {"tokens": 2000, "work": 20, "seconds": 1.6}, "saved_of_tokens": 0.6, "saved_of_work": 0.75}
        ]
    },
    "sharded": {
        "shape": {"rows": 5},
        "results": [RAN | {"case": "gathered", "received_bytes": 2**21, "extra_bytes": 2**22}],
    },
    "vocab_parallel": {
        "shape": {"rows": 5},
        "results": [
            RAN | {"case": case, "median_s": seconds, "received_bytes": 2**19, "extra_bytes": 2**22}
            for case, seconds in (("ours", 0.5), ("loss_parallel", 0.75))
        ],
    },
    "stages": {"results": [STAGE], "sdpo_minus_dpo": [0.25, -0.125]},
    "betas": {
        "tasks": {"sorting": {"learning_rate": 5e-5, "betas": [1.0, 3.0], "batch": 16}},
        "rows": SWEPT,
        "results": conclusions(SWEPT),
    },
}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a page of every kind of report but one."""
    for kind, rest in REPORTS.items():
        report = {"benchmark": kind, "command": f"python -m benchmarks.{kind} --quick"} | ABOUT | rest
        (tmp_path / f"{kind}-cpu.json").write_text(json.dumps(report))
    (tmp_path / "other.json").write_text("{}")
    assert page.main([f"--results={tmp_path}", f"--docs={tmp_path}"]) == 0
    return tmp_path


def test_the_page_shows_every_report_and_its_origin(made):
    text = (made / "benchmarks.md").read_text()
    for kind in REPORTS:
        assert f"`python -m benchmarks.{kind} --quick` on a chip (avx2), 2 threads, load 0.5" in text
    assert "commit 0123456789ab; 2026-01-02." in text
    assert "| bare GEMMs (floor) (`gemms`) | 500.0 | 250.0 … 1000.0 | 1.00 | 3 | 1.2e-01 |" in text
    assert "- `cce`: CUDA alone" in text
    assert "| ours (`ours`) | 1.0e-05 | 2.0e-03 | 3.0e-03 | 0.0e+00 | 2.0e-03 | 3.0e-03 |" in text
    assert "| vocab 200 | 5 | 500.0 / 3 | – |" in text
    assert "| 0.00390625 | 0.7500 | 0.7500 | 1.0000 | 50.0 (25.0 … 75.0); 25.0, 75.0 | +50.0 (+25.0 … +75.0) |" in text
    assert (
        "| 0.00390625 | +50.0 (+25.0 … +75.0) | +0.50000 (+0.25000 … +0.75000) | +0.25000, +0.75000: +100.0 % |" in text
    )
    assert "| grad_tol 0.00390625 | 0.500, 0.250 | 1.000, 1.000 | 3.000, 3.000 |" in text
    assert "of the head's squared update 90 % is there, the rest at the 1,234 tokens" in text
    assert "| 0.00390625 · (1 − p) | 25 % | 4.0e-03 | 8.0e-04 | 2.0e-03 | 5.0e-03 |" in text
    assert "| smollm2 | 2**-8 relative | 25 % | 0.62 … 0.88 | 1.25 | 0.4 % | 0 % |" in text
    assert "| 2**-8 relative, stash auto | 500 | 250 … 750 | 0.75 | 0.62 | – |" in text
    assert "| grammar | ours | 500.0 | 250.0 … 1000.0 | 1234 | – | 1 |  |" in text
    assert "| grammar | trl | 500.0 | 250.0 … 1000.0 | 1234 | – | 1 | 1.50 (1.25 … 1.75) |" in text
    assert "| full1 | 3,000 / 2.0 | 2,000 / 1.6 | 1.50 | 1.50 | 1.25 | 60 % | 75 % |" in text
    assert "| `gathered` | 500 | 250 … 1000 | 2 | 4 |" in text
    assert "| `loss_parallel` | 750 | 250 … 1000 | 1.50 | 0.50 | 4 | 1.2e-01 |" in text
    assert "The two processes share the machine's 2 cores" in text
    assert "seed by seed: +25.0, -12.5." in text
    assert "| `sdpo` | 62.5 / 0.500 | 62.5 / 0.250 |" in text
    assert "| `sdpo` | +12.5 (+12.5 … +12.5); KL × 1.00 | +12.5 (+12.5 … +12.5); KL × 1.00 |" in text
    assert (
        "| minus `dpo` at β/3 | β 3 against 1 |\n| --- | --- |\n| `sdpo` | +12.5 (+12.5 … +12.5); KL × 0.50 |" in text
    )
    assert "| `random` | +25.0 (+25.0 … +25.0) | +25.0 (+25.0 … +25.0) |" in text
    assert "minus `sdpo` (points): `random` +12.5 (+12.5 … +12.5)." in text
    assert "Not measured yet: `python -m benchmarks.floor`." in text


def test_the_page_shows_errors_by_peak_and_what_changes_no_bit(made):
    text = (made / "benchmarks.md").read_text()
    assert "| largest error of a token's log-prob (nat) | peak 5 | peak 80 | peak smollm2 (18) |" in text
    assert "| ours (fused_linear_dpo) | 2.0e-06 | 2.0e-06 | 2.0e-06 |" in text
    assert "| ours | yes | yes | yes | yes | yes |" in text
    assert "| trl | yes | no | no | – | no |" in text
    assert "- liger: not installed" in text


def test_readmes_table_is_made_of_the_same_results(made):
    reports = page.read_reports(made)
    readme = readme_table.put(f"above\n{readme_table.BEGIN}\nold\n{readme_table.END}\nbelow\n", reports)
    assert readme.startswith(f"above\n{readme_table.BEGIN}\n\n| ")
    assert readme.endswith(f"{readme_table.END}\nbelow\n")
    assert "old" not in readme
    assert "| time of a DPO step at the head ÷ bare GEMMs (bf16, CPU with AVX2) | 1.00 | 1.00 | 1.00 | 1.00 |" in readme
    assert "| its extra memory, gradients included, MiB (bf16, CPU with AVX2) | 3 | 3 | 3 | 3 |" in readme
    assert "| largest error of a token's log-prob (nat; bf16, SmolLM2) | 2e-06 | 2e-06 | – | – |" in readme
    assert "| same bits in another order and in half the batch | yes | no | – | – |" in readme
    assert "| whole training step of small models, times ours | 1 | 1.5 … 1.5 | – | – |" in readme


def test_the_committed_readme_has_the_table_of_the_committed_results():
    reports = page.read_reports(ROOT / "benchmarks/results")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == readme_table.put(readme, reports), "run python -m benchmarks.page"


def test_pictures_are_reproducible(made, tmp_path):
    for kind in pictures.DRAWN:
        picture = (made / f"benchmarks-{kind}-cpu.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        pictures.draw(json.loads((made / f"{kind}-cpu.json").read_text()), tmp_path / "again.png")
        assert (tmp_path / "again.png").read_bytes() == picture


def test_the_committed_page_is_that_of_the_committed_results():
    reports = page.read_reports(ROOT / "benchmarks/results")
    made = page.page(reports)
    assert (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8") == made, "run python -m benchmarks.page"
