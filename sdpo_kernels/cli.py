"""The command `sdpo`: init, train, check, score, report, expo and info. Each subcommand only calls into `stepwise/`."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdpo_kernels.stepwise.common.errors import Interrupted, UserError
from sdpo_kernels.version import __version__

if TYPE_CHECKING:
    from sdpo_kernels.stepwise.common.progress import Reporter

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Stepwise DPO (arXiv 2403.19270): preference training in stages, with one model in memory.",
)

# an unknown option becomes an override, so that `_settings` can say how settings are overridden
_TAKES_OVERRIDES = {"ignore_unknown_options": True}

_LOADING = "loading torch and transformers"  # takes seconds, from a slow disk many

ConfigFile = Annotated[Path, typer.Argument(metavar="RUN.YAML", help="The run's settings.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to override, e.g. beta=0.05.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for the run.")],
    model: Annotated[
        str | None, typer.Option(help="A model of yours, a folder or a name on the hub; without it a tiny one is made.")
    ] = None,
) -> None:
    """Write a small run to start from: a run.yaml, preference pairs and a tiny model. It trains in a minute."""
    from sdpo_kernels.stepwise.common import ranks

    with _reporter().waiting(_LOADING):
        from sdpo_kernels.stepwise.starter.init import write_starter

    run_file = ranks.once(lambda: write_starter(folder, model))
    if _is_first():
        typer.echo(f"wrote {folder}; to train: sdpo train {run_file}")


@app.command(context_settings=_TAKES_OVERRIDES)
def train(config: ConfigFile, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train all stages. Run the same command again after a crash: it resumes where it stopped."""
    reporter, given = _reporter(quiet), _settings(overrides)
    with reporter.waiting(_LOADING):
        from sdpo_kernels.stepwise.run import run
        from sdpo_kernels.stepwise.settings.run_file import load_config

        gc.freeze()  # what is imported stays: collections between stages scan only the rest

    settings = load_config(config, given)
    try:
        run(settings, reporter)
    except KeyboardInterrupt as stop:
        # training steps handle the signal themselves and save, or say what is lost; outside of them nothing is
        raise Interrupted(str(stop) or "stopped; run the same command again to resume") from None
    finally:
        gc.unfreeze()  # libraries complain at exit of objects that were not collected


@app.command(context_settings=_TAKES_OVERRIDES)
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Plan the memory of a run on this many GPUs.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of one GPU, e.g. 80GiB; says what to change.")] = None,
) -> None:
    """Read config, data and tokenizer, and print what `train` would do, without training."""
    from sdpo_kernels.stepwise.memory.target import Target

    reporter, given, target = _reporter(), _settings(overrides), Target.of(gpus, memory)
    with reporter.waiting(_LOADING):
        from sdpo_kernels.stepwise.check import check_run
        from sdpo_kernels.stepwise.common import ranks
        from sdpo_kernels.stepwise.settings.run_file import load_config

    settings = load_config(config, given)
    ranks.once(lambda: check_run(settings, reporter, target))


@app.command(context_settings=_TAKES_OVERRIDES)
def score(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[list[str] | None, typer.Option(help="Score this model; can be repeated.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Score on this data instead of the run's eval_data; can be repeated.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print accuracies and margins on preference data, for the run's initial and finished models or --model."""
    given = _settings(overrides)
    with _reporter(quiet=json_output).waiting(_LOADING):
        from sdpo_kernels.stepwise.common import ranks
        from sdpo_kernels.stepwise.score import score_run
        from sdpo_kernels.stepwise.settings.run_file import load_config

    settings = load_config(config, given)
    ranks.once(lambda: score_run(settings, model or [], data or [], as_json=json_output))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The output_dir of a run.")]) -> None:
    """Write a run's report.html and pictures again."""
    from sdpo_kernels.stepwise.common import ranks
    from sdpo_kernels.stepwise.report.run_report import write_report

    for path in ranks.once(lambda: write_report(run_dir)):
        if _is_first():
            typer.echo(path)


@app.command()
def expo(
    start: Annotated[Path, typer.Argument(metavar="START", help="θ0: the folder of the model before alignment.")],
    aligned: Annotated[
        Path,
        typer.Argument(metavar="ALIGNED", help="θ1: the folder of the model after alignment, or of its LoRA adapter."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new folder for the result.")],
    alpha: Annotated[float | None, typer.Option(help="How far to go beyond ALIGNED, usually 0.3 to 0.5.")] = None,
    search: Annotated[str | None, typer.Option(help="Search these values of α for the best, e.g. 0.1,0.3,0.5.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Preference pairs to search with; can be repeated.")] = None,
    metric: Annotated[str | None, typer.Option(help="Metric on --data: pair_accuracy, reward_margin, gamma …")] = None,
    config: Annotated[Path | None, typer.Option(help="A run.yaml with β, lengths and batch sizes for --data.")] = None,
    score_command: Annotated[
        str | None,
        typer.Option(help="Search with this command: it gets a model folder and prints the score last."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Time limit of --score-command for one model, in seconds.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Extrapolate beyond ALIGNED to the model θ1 + α(θ1 − θ0) (ExPO), without training."""
    reporter = _reporter(quiet)
    with reporter.waiting(_LOADING):
        from sdpo_kernels.stepwise.common import ranks
        from sdpo_kernels.stepwise.post.command import expo_command

    ranks.once(
        lambda: expo_command(
            start,
            aligned,
            output,
            alpha=alpha,
            alphas=search,
            data=data or [],
            metric=metric,
            config=config,
            score_command=score_command,
            timeout=timeout,
            reporter=reporter,
        )
    )


@app.command()
def info() -> None:
    """Print versions, libraries and devices, for a bug report."""
    from sdpo_kernels.info import info_text

    typer.echo(info_text())


def _reporter(quiet: bool = False) -> Reporter:
    """What prints on rank 0, and nothing on the other ranks."""
    from sdpo_kernels.stepwise.common.progress import Mute, Reporter

    return Reporter(quiet) if _is_first() else Mute()


def _is_first() -> bool:
    """Whether this is rank 0 of a launcher's processes, or the only one; `ranks` would import torch."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _settings(overrides: list[str] | None) -> list[str]:
    """The overrides 'key=value' of a command line. Raises UserError for an option, with what to write instead."""
    given = overrides or []
    for at, text in enumerate(given):
        if not text.startswith("-"):
            continue
        name, equals, value = text.lstrip("-").partition("=")
        if not equals:  # the value is the next word
            value = next((word for word in given[at + 1 :] if not word.startswith("-")), "VALUE")
        raise UserError(f"{text}: no such option; settings are overridden as key=value: {name}={value}")
    return given


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sdpo_kernels {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of `sdpo` itself."""


def main() -> None:
    """Entry point. User errors end with one line and exit code 2, a stop by a signal with exit code 130."""
    # only rank 0 of a launcher's processes logs
    first = _is_first()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING if first else logging.CRITICAL)
    # bitsandbytes is imported by PEFT even without quantization, and then asks for a package of faster CPU kernels
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    if not first:
        warnings.simplefilter("ignore")

    # transformers and accelerate: deprecations of their own, messages and progress bars; the variables can be set
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=FutureWarning, module="accelerate")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    try:
        app()
    except UserError as error:
        _end(error, f"error: {error}", 2)
    except Interrupted as stop:
        _end(stop, str(stop), 130)


def _end(error: BaseException, message: str, code: int) -> None:
    """Print `message` to stderr, on one rank only, and exit."""
    from sdpo_kernels.stepwise.common import ranks

    if ranks.launched() == 1:
        print(message, file=sys.stderr)
        sys.exit(code)

    if ranks.says(error):
        print(message, file=sys.stderr, flush=True)
    # an ordinary exit may wait for connections to ranks that are gone
    os._exit(code)
