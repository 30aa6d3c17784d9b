"""Chat templates with a clock that stands still: a template that prints today's date gives the same tokens tomorrow.

    text = apply_template(tokenizer, messages, template_time=datetime(2026, 11, 28), tokenize=False)

transformers gives templates a function `strftime_now(format)`, which reads the machine's clock. It takes no other one:
a function among the template's variables is replaced by a placeholder. So a template that calls `strftime_now` gets a
macro of that name in front. Nothing of transformers is patched.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

_DIRECTIVE = re.compile(r"%[-_0^#]*[0-9]*[EO]?[A-Za-z]")  # of strftime, with glibc's flags and widths

# It replaces the directives in the template's text, which are passed as a variable. The line break at its end is
# removed by Jinja (trim_blocks), so the template still starts at the beginning of a line (lstrip_blocks).
_MACRO = (
    "{% macro strftime_now(format) %}"
    "{% set done = namespace(parts=[]) %}"
    "{% for part in format.split('%%') %}"
    "{% set text = namespace(value=part) %}"
    "{% for directive, value in sdpo_strftime.items() %}"
    "{% set text.value = text.value.replace(directive, value) %}"
    "{% endfor %}"
    "{% if '%' in text.value %}{{ raise_exception('strftime_now: was ' ~ format ~ ', a directive of which is not in "
    "the text of the template') }}{% endif %}"
    "{% set done.parts = done.parts + [text.value] %}"
    "{% endfor %}"
    "{{ done.parts | join('%') }}"
    "{% endmacro %}\n"
)


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template, or one of several, calls `strftime_now`."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Any, *, template_time: datetime | None, **options: Any
) -> Any:
    """`tokenizer.apply_chat_template`, with `template_time` as the time that the template reads; None: now."""
    named = options.get("chat_template")
    if template_time is None or not ("strftime_now" in str(named) or reads_clock(tokenizer)):
        return tokenizer.apply_chat_template(messages, **options)

    # of several templates transformers chooses one, by its name or because there are tools
    text = tokenizer.get_chat_template(named, options.get("tools"))
    found = _directives(text) | _directives(json.dumps(options, default=str))

    # the longest first: %O is the start of %Od
    table = {name: _strftime(template_time, name) for name in sorted(found, key=lambda name: (-len(name), name))}
    return tokenizer.apply_chat_template(messages, **options | {"chat_template": _MACRO + text, "sdpo_strftime": table})


@lru_cache
def _directives(text: str) -> frozenset[str]:
    """What looks like a directive of strftime in a template; the start of a Jinja tag does not."""
    return frozenset(_DIRECTIVE.findall(text.replace("{%", "")))


def _strftime(time: datetime, directive: str) -> str:
    try:
        return time.strftime(directive)
    except ValueError:  # no directive of this platform: something else in the template looks like one
        return directive
