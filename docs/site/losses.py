"""A section for each loss, from the registry: formula and source of its docstring, options with defaults and ranges."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from docs.site.settings import as_yaml, table
from sdpo_kernels.losses import loss_names
from sdpo_kernels.losses.registry import _REGISTRY, Loss, lookup

F_DIVERGENCE = ("f_divergence", "f_alpha")  # described once, for all losses that have them


def part(words: Sequence[str]) -> str:
    """The sections of all losses."""
    assert words == ["losses"], words
    return "\n\n".join(section(lookup(name)) for name in loss_names())


def section(loss: Loss) -> str:
    """Heading, text of the docstring, how to write it, its options."""
    also = [f"`{name}`" for name, entry in _REGISTRY.items() if entry is loss and name != loss.name]
    names = f"Also called {', '.join(also)}." if also else ""
    facts = " ".join(filter(None, (names, *traits(loss))))
    parts = [f"### `{loss.name}`", described(loss), facts, "" if loss.of_errors else written(loss), options(loss)]
    return "\n\n".join(filter(None, parts))


def described(loss: Loss) -> str:
    """The docstring, with links to the papers."""
    text = inspect.getdoc(loss.function) or ""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def traits(loss: Loss) -> list[str]:
    """What the registry knows of a loss besides its options."""
    return [
        "It is ln 2 while policy and reference are equal." if loss.ln2_at_start else "",
        "It uses no reference." if loss.reference_free else "",
        "It takes `f_divergence` and `f_alpha`." if F_DIVERGENCE[0] in loss.options else "",
    ]


def written(loss: Loss) -> str:
    """The lines of run.yaml."""
    given = ", ".join(f"{name}: {as_yaml(value)}" for name, value in loss.options.items() if name not in F_DIVERGENCE)
    return f"```yaml\nloss: {loss.name}\n" + (f"loss_options: {{{given}}}\n" if given else "") + "```"


def options(loss: Loss) -> str:
    """Options, defaults and what they may be."""
    own = {name: value for name, value in loss.options.items() if name not in F_DIVERGENCE}
    lines = [(f"`{name}`", f"`{as_yaml(value)}`", loss.allowed[name].text) for name, value in own.items()]
    return table(("option", "default", "may be"), lines) if lines else ""
