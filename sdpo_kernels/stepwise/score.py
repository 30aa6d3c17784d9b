"""`sdpo score`: how well models rank preference pairs. Rewards are relative to the run's initial model."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import read_json
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.data.fit import check_fit, check_vocabulary, load_model_config
from sdpo_kernels.stepwise.data.order import scored_counts
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.models.load import load_tokenizer
from sdpo_kernels.stepwise.models.weights import ADAPTER
from sdpo_kernels.stepwise.prepare import read_eval
from sdpo_kernels.stepwise.record.expo_record import expo_folder
from sdpo_kernels.stepwise.record.manifest import Record
from sdpo_kernels.stepwise.record.template_time import template_time
from sdpo_kernels.stepwise.references.evaluation import summarise
from sdpo_kernels.stepwise.references.scorer import Scorer, pad_token_id
from sdpo_kernels.stepwise.settings.columns import DataEntry
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments


def score_run(config: RunConfig, models: Sequence[str], data: Sequence[str], *, as_json: bool) -> None:
    """Print the metrics of `models` (default: the run's finished models) on `data` (default: its eval_data).

    1. Read the pairs, and check that `models` can read their tokens.
    2. Score them with the run's initial model, which rewards are relative to.
    3. Score them with each model in turn; only one is in memory at a time.

    UserError if there is no data, or a model cannot be loaded.
    """
    reporter = Reporter(quiet=as_json)
    sources: Sequence[str | DataEntry] | None = tuple(data) or config.eval_data
    if not sources:
        raise UserError("eval_data: is not set in the run's settings; set it, or use --data FILE")
    columns_go = "on this command line: 'columns={}'"
    tokens, warnings, tokenizer = read_eval(config, sources, template_time(config), columns_go, reporter)
    for warning in warnings:
        reporter.warn(warning)

    for path in models:
        _check_model(config, path, tokenizer, tokens)

    with tempfile.TemporaryDirectory() as folder:  # the arguments need one; nothing is written there
        args = training_arguments(config, config.stages[0], Path(folder), Path(folder))
    scorer = Scorer.of(config, args, pad_token_id(tokenizer), reporter)

    # the initial model has no reward of its own
    counts = scored_counts(tokens)
    reference = scorer.score_path(config.model, tokens, "initial model")
    results = {config.model: summarise(reference, counts, None, config.beta)}
    for path in models or _finished(config):
        logps = _scorer_of(path, scorer).score_path(path, tokens, Path(path).name)
        results[path] = summarise(logps, counts, reference, config.beta)

    if as_json:
        print(json.dumps(results, indent=2))
    else:
        reporter.say(_table(results, config.beta))


def _check_model(config: RunConfig, path: str, tokenizer: PreTrainedTokenizerBase, tokens: TokenizedPairs) -> None:
    """UserError unless the model in `path` has the run's vocabulary: it is given the run's tokens."""
    if _is_own(config, path) and (Path(path) / ADAPTER).is_dir():
        return  # the run's base, with the run's tokenizer

    theirs = config.model_copy(update={"model": path})
    rule = "it would be given other words; score it by a run of its own model"
    try:
        check_vocabulary(tokenizer.get_vocab(), load_tokenizer(theirs).get_vocab(), rule)
        check_fit(theirs, load_model_config(theirs), [tokens])
    except UserError as error:
        raise UserError(f"--model {path}: {str(error).removeprefix('model: ')}") from error


def _is_own(config: RunConfig, path: str) -> bool:
    """Whether the model in `path` is one of the run's."""
    return Path(path).resolve().parent == Path(config.output_dir).resolve()


def _scorer_of(path: str, scorer: Scorer) -> Scorer:
    """What scores the model in `path`: of another LoRA run its merged weights, as an adapter fits only its own base."""
    if _is_own(scorer.config, path) or scorer.config.lora is None:
        return scorer
    return dataclasses.replace(scorer, config=scorer.config.of_full_weights)


def _finished(config: RunConfig) -> list[str]:
    """The folders of the run's finished stages, and of its extrapolated model if there is one."""
    path = Path(config.output_dir) / "manifest.json"
    manifest = read_json(path) if path.exists() else {"stages": []}
    done = [s for s in manifest["stages"] if s["state"] == "done"]
    return [*(str(path.parent / f"stage-{s['index']}-{s['name']}") for s in done), *expo_folder(path.parent, manifest)]


def _table(results: dict[str, Record], beta: float) -> Table:
    table = Table(
        title="scores", caption=f"rewards: the run's β {beta:g}, relative to the initial model", padding=(0, 0)
    )
    table.add_column("model", overflow="fold", min_width=12)
    for title in ("pairs", "pair\nacc.", "per\ntoken", "reward\nacc.", "reward\nmargin", "log-prob\nmargin\n(nat)"):
        table.add_column(title, justify="right")
    for path, scores in results.items():
        keys = ("pair_accuracy", "pair_accuracy_per_token", "reward_accuracy", "reward_margin", "gamma")
        cells = ["–" if scores[key] is None else f"{scores[key]:.3f}" for key in keys]
        table.add_row(Path(path).name, f"{scores['pairs']:,}", *cells)
    return table
