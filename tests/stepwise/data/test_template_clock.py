"""Chat templates that read the clock: the same text on every day of a run, and transformers' own text on its first."""

from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from sdpo_kernels.stepwise.data.pairs import Pair
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.data.template_clock import apply_template, reads_clock
from sdpo_kernels.stepwise.data.tokenize import tokenize_pairs
from tests.stepwise import runs

START = datetime(2026, 11, 8, 14, 5, 9)
ASK = [{"role": "user", "content": "word1 word2"}]
MESSAGES = "{% for m in messages %}{{ m.role }} {{ m.content }} </s>{% endfor %}"

# the lines about dates in the templates of these models; the whole templates are longer
TEMPLATES = {
    "llama-3.2": """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}""",
    "smollm3": '{%- set today = strftime_now("%d %B %Y") -%}\n{{- "Today Date: " ~ today ~ "\\n" -}}',
    "granite-3.3": """{%- if not date is defined %}{%- set date = strftime_now('%B %d, %Y') %}{%- endif %}
Today's Date: {{ date }}.""",
    "mistral-small-3.2": """{%- set today = strftime_now("%Y-%m-%d") %}
{%- set yesterday = strftime_now("%d") | int - 1 %}
{%- set clock = strftime_now('%H:%M:%S') %}
{{ "The current date is " + today + ", " }}{{ clock }}{{ " yesterday " ~ yesterday }}""",
    "gpt-oss": """{%- macro build_system_message() -%}
    {{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
{%- endmacro -%}
{{- build_system_message() }}""",
    "other": "  {% if messages %}\n{{ strftime_now('100%% of %A the %-d, day %j of %Y') }}\n  {% endif %}\n",
}


def set_clock(monkeypatch, now: datetime) -> None:
    """transformers' `strftime_now` reads `now`."""

    class Clock:
        @staticmethod
        def now() -> datetime:
            return now

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.fixture
def tokenizer(request):
    return runs.make_tokenizer(chat_template=TEMPLATES[request.param] + MESSAGES)


@pytest.mark.parametrize("tokenizer", TEMPLATES, indirect=True)
def test_the_text_of_the_runs_start_on_a_later_day(tokenizer, monkeypatch):
    assert reads_clock(tokenizer)
    set_clock(monkeypatch, START)
    first = tokenizer.apply_chat_template(ASK, tokenize=False)
    assert apply_template(tokenizer, ASK, template_time=START, tokenize=False) == first
    assert apply_template(tokenizer, ASK, template_time=None, tokenize=False) == first

    set_clock(monkeypatch, datetime(2027, 3, 30, 23, 59, 58))
    assert tokenizer.apply_chat_template(ASK, tokenize=False) != first
    assert apply_template(tokenizer, ASK, template_time=START, tokenize=False) == first
    assert apply_template(tokenizer, ASK, template_time=None, tokenize=False) != first


def test_dates_as_the_models_print_them():
    def text(name, **options):
        tokenizer = runs.make_tokenizer(chat_template=TEMPLATES[name] + MESSAGES)
        return apply_template(tokenizer, ASK, template_time=START, tokenize=False, **options)

    assert "Today Date: 08 Nov 2026\n\n" in text("llama-3.2")
    assert "Today Date: 08 November 2026\n" in text("smollm3")
    assert "The current date is 2026-11-08, 14:05:09 yesterday 7" in text("mistral-small-3.2")
    assert text("other").startswith("100% of Sunday the 8, day 312 of 2026")

    # the row's own date is what the template takes first
    assert "Today Date: 1 May 1999\n\n" in text("llama-3.2", date_string="1 May 1999")


def test_a_template_of_the_row_and_one_of_several():
    several = {"default": "{{ strftime_now('%Y') }} " + MESSAGES, "tool_use": "{{ strftime_now('%m') }} " + MESSAGES}
    tokenizer = runs.make_tokenizer(chat_template=several)
    assert reads_clock(tokenizer)

    def text(**options):
        return apply_template(tokenizer, ASK, template_time=START, tokenize=False, **options).split()[0]

    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    assert [text(), text(tools=tools), text(chat_template="tool_use")] == ["2026", "11", "11"]
    assert text(chat_template="{{ strftime_now(format) }}", format="%d") == "08"
    plain = runs.make_tokenizer(chat_template=MESSAGES)
    row = {"chat_template": "{{ strftime_now('%H') }}"}
    assert apply_template(plain, ASK, template_time=START, tokenize=False, **row) == "14"


def test_a_directive_that_the_template_puts_together_is_an_error():
    tokenizer = runs.make_tokenizer(chat_template="{{ strftime_now('%' ~ 'd') }}" + MESSAGES)
    with pytest.raises(Exception, match="strftime_now: was %d, a directive of which is not in the text"):
        apply_template(tokenizer, ASK, template_time=START, tokenize=False)


def test_a_template_without_a_date_goes_to_transformers_as_it_is(monkeypatch):
    tokenizer = runs.make_tokenizer(chat_template=runs.CHAT)
    assert not reads_clock(tokenizer)
    assert not reads_clock(runs.make_tokenizer())
    seen = []
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda messages, **options: seen.append(options))
    apply_template(tokenizer, ASK, template_time=START, tokenize=False, tools=None)
    assert seen == [{"tokenize": False, "tools": None}]


def dated() -> str:
    """A template with one word of the vocabulary a day."""
    return "{{ 'word' ~ strftime_now('%d') | int }} " + runs.CHAT


@pytest.mark.parametrize("day", [8, 9])
def test_tokens_of_pairs_and_prompts_are_those_of_the_given_day(day, monkeypatch):
    set_clock(monkeypatch, datetime(2027, 1, day))
    tokenizer = runs.make_tokenizer(chat_template=dated())
    answers = [[{"role": "assistant", "content": text}] for text in ("good1", "bad1")]
    pair = Pair(ASK, *answers, "d:1")
    expected = tokenizer.convert_tokens_to_ids("word8")

    tokens = tokenize_pairs([pair], tokenizer, max_length=64, truncation="keep_start", template_time=START)
    assert [sequence.ids[0] for sequence in tokens[0]] == [expected, expected]
    assert PromptRow(ASK, {}, "", START).ids(tokenizer)[0] == expected

    # without a time it is the machine's clock
    live = tokenize_pairs([pair], tokenizer, max_length=64, truncation="keep_start")
    today = tokenizer.convert_tokens_to_ids(f"word{day}")
    assert [live[0].chosen.ids[0], PromptRow(ASK, {}, "").ids(tokenizer)[0]] == [today, today]


def test_tokens_without_a_date_do_not_depend_on_the_time():
    tokenizer = runs.make_tokenizer(chat_template=runs.CHAT)
    pairs = [Pair(ASK, *([{"role": "assistant", "content": text}] for text in ("good1", "bad1")), "d:1")]

    def digest(**options):
        return tokenize_pairs(pairs, tokenizer, max_length=64, truncation="keep_start", **options).content_hash()

    assert digest() == digest(template_time=START) == digest(template_time=datetime(2030, 1, 1))
