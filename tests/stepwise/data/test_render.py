"""Prompts and answers as text: what chat templates drop, move or write twice, prefills, BOS and EOS."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.pairs import Pair
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs, tokenize_pairs

MINIMIND = Path(__file__).resolve().parents[4] / "shared" / "data" / "tokenizers" / "minimind-6k"

# strips contents; results of tools as JSON; any other role is dropped
LLAMA = """{{ bos_token }}{% for m in messages %}
{%- if m.role in ["system", "user", "assistant"] %}
{{- "<|start|>" + m.role + "<|end|>\n\n" + m.content | trim }}{{ m.tool_calls | tojson if m.tool_calls }}{{ eos_token }}
{%- elif m.role == "tool" %}{{ "<|start|>ipython<|end|>\n\n" }}{{ m.content | tojson }}{{ eos_token }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ "<|start|>assistant<|end|>\n\n" }}{% endif %}"""

# drops the reasoning of every assistant's message but the last
QWEN = """{% for m in messages %}{% set content = m.content %}
{%- if m.role == "assistant" and not loop.last and "</think>" in content %}
{%- set content = content.split("</think>")[-1].lstrip("\n") %}{% endif %}
{%- if m.role in ["system", "user", "assistant"] %}<|start|>{{ m.role }}
{{ content }}{{ eos_token }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""

# the system message becomes part of the last user's message, as in Mistral's
MISTRAL = """{{ bos_token }}{% set system = messages[0].content if messages[0].role == "system" else "" %}
{%- for m in messages %}{% if m.role == "user" %}
{%- set last = messages[loop.index0 + 1:] | selectattr("role", "equalto", "user") | list | length == 0 %}
{{- "[INST] " }}{% if last and system %}{{ system + "\n\n" }}{% endif %}{{ m.content }}{{ " [/INST]" }}
{%- elif m.role == "assistant" %}{{ " " + m.content + eos_token }}{% endif %}{% endfor %}"""

# only the answer, as DeepSeek-R1's template does even with the last message
NO_REASONING = "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}"


def tokenizer_of(template: str = LLAMA, *, adds: str = "") -> PreTrainedTokenizerFast:
    """One token per printable character, with <s> and </s>; `adds` is what it puts around plain text, "<s> $A"."""
    characters = [chr(code) for code in range(32, 127)] + ["\n", "…"]
    vocabulary = {text: place for place, text in enumerate(["<s>", "</s>", "?unknown", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 0), ("</s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "?unknown"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def turns(*texts: str) -> list[dict[str, str]]:
    """Messages of "role: content"."""
    return [{"role": role, "content": content} for role, _, content in (text.partition(": ") for text in texts)]


def pair(prompt, chosen, rejected) -> Pair:
    return Pair(prompt, chosen, rejected, "d.jsonl:3")


def tokenized(one: Pair, tokenizer: PreTrainedTokenizerFast) -> TokenizedPairs:
    return tokenize_pairs([one], tokenizer, max_length=10_000, truncation="keep_start")


def texts(one: Pair, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str, str]:
    """Prompt, scored text of chosen, scored text of rejected; the tokenizer found nothing to warn of."""
    tokens = tokenized(one, tokenizer)
    assert tokens.warnings == []
    chosen, rejected = tokens[0]
    halves = [(s.ids[: s.prompt_length], s.ids[s.prompt_length :]) for s in (chosen, rejected)]
    (prompt, first), (same, second) = [tuple(map(tokenizer.decode, half)) for half in halves]
    assert prompt == same
    return prompt, first, second


def refusal(one: Pair, tokenizer: PreTrainedTokenizerFast) -> str:
    with pytest.raises(UserError) as raised:
        tokenized(one, tokenizer)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture(scope="module")
def minimind():
    if not MINIMIND.exists():
        pytest.skip(f"{MINIMIND} is absent")
    return AutoTokenizer.from_pretrained(MINIMIND)


# Messages that a template drops


ANSWERS = turns("assistant: four"), turns("assistant: five")
RENAMED = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system", "ipython": "tool"}


def dropped_error(role: str, at: str) -> str:
    """The error line, with the name that templates have for a role of other schemas."""
    name = f" to {RENAMED[role]!r}" if role in RENAMED else ""
    what = f"drops the message of role {role!r} ({at})"
    return f"d.jsonl:3: the chat template {what}; rename the role{name} or change the template"


@pytest.mark.parametrize("role", ["developer", "human", "ipython"])
@pytest.mark.parametrize("template", [LLAMA, QWEN, MISTRAL])
def test_a_dropped_message_of_the_prompt_is_an_error(template, role):
    prompt = turns(f"{role}: Be brief.", "user: What is 2+2?")
    assert refusal(pair(prompt, *ANSWERS), tokenizer_of(template)) == dropped_error(role, "prompt[0]")
    later = turns("user: What is 2+2?", "assistant: Wait.", f"{role}: Be brief.")
    assert refusal(pair(later, *ANSWERS), tokenizer_of(template)) == dropped_error(role, "prompt[2]")


@pytest.mark.parametrize("role", ["developer", "human"])
def test_minimind_drops_them_too(minimind, role):
    prompt = turns(f"{role}: Be brief.", "user: What is 2+2?")
    assert refusal(pair(prompt, *ANSWERS), minimind) == dropped_error(role, "prompt[0]")


@pytest.mark.parametrize("template", [LLAMA, QWEN, MISTRAL])
def test_a_dropped_answer_is_not_blamed_on_max_length(template):
    prompt = turns("user: What is 2+2?")
    gpt = pair(prompt, turns("gpt: four"), turns("gpt: five"))
    assert refusal(gpt, tokenizer_of(template)) == dropped_error("gpt", "chosen[0]")
    one = pair(prompt, turns("assistant: four"), turns("assistant: Well.", "model: five"))
    assert refusal(one, tokenizer_of(template)) == dropped_error("model", "rejected[1]")


def test_a_dropped_message_is_missed_although_another_contains_its_text():
    tokenizer = tokenizer_of(LLAMA)
    same = turns("user: Go on.", "assistant: Yes.", "human: Go on.")
    assert refusal(pair(same, *ANSWERS), tokenizer) == dropped_error("human", "prompt[2]")
    within = turns("human: ok", "user: Have a look.")
    assert refusal(pair(within, *ANSWERS), tokenizer) == dropped_error("human", "prompt[0]")


def test_equal_messages_that_are_both_there_are_fine():
    prompt = turns("user: Go on.", "assistant: Yes.", "user: Go on.")
    text, chosen, _ = texts(pair(prompt, *ANSWERS), tokenizer_of(LLAMA))
    assert text.count("Go on.") == 2
    assert chosen == "four</s>"


def test_prompts_of_generated_pairs_are_checked_alike():
    row = PromptRow(turns("human: Be brief.", "user: What is 2+2?"), {}, "d.jsonl:3")
    with pytest.raises(UserError, match="drops the message of role 'human'"):
        row.ids(tokenizer_of(LLAMA))
    failing = PromptRow(turns("user: Hi"), {}, "d.jsonl:3")
    with pytest.raises(UserError, match=r"^d.jsonl:3: the tokenizer's chat template failed: TemplateError: no"):
        failing.ids(tokenizer_of("{{ raise_exception('no') }}"))


def test_bad_rows_of_the_template_can_be_skipped():
    pairs = [
        pair(turns("human: What is 2+2?"), *ANSWERS),
        pair(turns("user: What is 2+2?"), *ANSWERS),
        pair(turns("user: What is 2+2?", "assistant: It is"), turns("user: Sure?"), ANSWERS[1]),
    ]
    tokens = tokenize_pairs(pairs, tokenizer_of(), max_length=99, truncation="keep_start", on_bad_row="skip")
    assert tokens.kept.tolist() == [1]
    assert tokens.dropped[0] == dropped_error("human", "prompt[0]")
    assert "'chosen' starts with the role 'user'" in tokens.dropped[1]
    with pytest.raises(UserError, match=r"nothing to learn in any of 1 pair; first: d\.jsonl:3: the chat template"):
        tokenize_pairs(pairs[:1], tokenizer_of(), max_length=99, truncation="keep_start", on_bad_row="skip")


def test_rows_that_the_template_refuses_are_counted_with_the_way_to_skip_them():
    human, good = pair(turns("human: What is 2+2?"), *ANSWERS), pair(turns("user: What is 2+2?"), *ANSWERS)
    for pairs, more in (([good, human], ""), ([human, good, human, human], " (and 2 more bad rows)")):
        with pytest.raises(UserError) as error:
            tokenize_pairs(pairs, tokenizer_of(), max_length=99, truncation="keep_start")
        skip = "; set on_bad_row: skip to leave bad rows out"
        assert str(error.value) == dropped_error("human", "prompt[0]") + more + skip

    # nothing would be left
    with pytest.raises(UserError) as error:
        tokenize_pairs([human, human], tokenizer_of(), max_length=99, truncation="keep_start")
    assert str(error.value) == dropped_error("human", "prompt[0]") + " (and 1 more bad row)"


def test_a_template_that_fails_at_a_role_names_the_usual_one():
    strict = "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    strict += "{{ raise_exception('Unknown role: ' ~ m.role) }}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
    text = refusal(pair(turns("user: 2+2?"), turns("gpt: four"), turns("gpt: five")), tokenizer_of(strict))
    assert text.endswith("Unknown role: gpt; its message of role 'gpt': rename the role to 'assistant'")


# the second condition is that of Llama 3.1's and gpt-oss's templates
CALLS_ALONE = """{% for m in messages %}{{ m.role }}: {% if m.tool_calls %}{{ m.tool_calls | tojson }}
{%- else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"""


def test_text_next_to_a_tool_call_is_a_warning_in_prompts_and_an_error_in_answers():
    call = {"role": "assistant", "content": "Let me look.", "tool_calls": [{"name": "look"}]}
    prompt = [*turns("user: Weather?"), call, *turns("tool: grey")]
    tokens = tokenized(pair(prompt, *ANSWERS), tokenizer_of(CALLS_ALONE))
    assert tokens.warnings == [
        "1 of 1 pairs (first: d.jsonl:3): the chat template leaves out the text next to a tool call of the prompt"
    ]
    assert refusal(pair(turns("user: Weather?"), [call], ANSWERS[1]), tokenizer_of(CALLS_ALONE)) == (
        "d.jsonl:3: the chat template drops the text next to the tool call (chosen[0]); leave it out or change the "
        "template"
    )


def test_text_next_to_a_tool_call_that_the_prompt_alone_has_is_an_error():
    """As in gpt-oss's template: the answers would start at the call."""
    drops_with_answer = """{% for m in messages %}{{ m.role }}: {% if m.tool_calls and (messages | last) != m
    and (messages | last).role == "assistant" %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}
    {{- m.tool_calls | tojson if m.tool_calls }}{% endif %}{{ eos_token }}{% endfor %}"""
    call = {"role": "assistant", "content": "Let me look.", "tool_calls": [{"name": "look"}]}
    prompt = [*turns("user: Weather?"), call, *turns("tool: grey")]
    expected = "d.jsonl:3: the chat template drops the text next to the tool call (prompt[1]); leave it out or"
    assert refusal(pair(prompt, *ANSWERS), tokenizer_of(drops_with_answer)).startswith(expected)


def test_a_message_that_the_template_writes_itself_is_no_message_of_the_data():
    """Qwen 2.5 has this text as its default system message; the data's has the role developer."""
    helpful = "You are a helpful assistant."
    default = QWEN.replace(
        "{% for m", "{% if messages[0].role != 'system' %}<|start|>system\n" + helpful + "\n{% endif %}{% for m", 1
    )
    prompt = turns(f"developer: {helpful}", "user: What is two plus two?")
    answers = turns("assistant: It is certainly four."), turns("assistant: It is certainly five.")
    assert refusal(pair(prompt, *answers), tokenizer_of(default)) == dropped_error("developer", "prompt[0]")


def test_the_second_conversation_of_a_structure_is_looked_at_too():
    """The template drops a message by its content."""
    picky = QWEN.replace(
        '["system", "user", "assistant"]', '["system", "user", "assistant"] and "secret" not in content'
    )
    tokenizer = tokenizer_of(picky)
    texts(pair(turns("user: What is 2+2?"), *ANSWERS), tokenizer)
    secret = pair(turns("user: What is the secret?"), *ANSWERS)
    assert refusal(secret, tokenizer) == dropped_error("user", "prompt[0]")


def test_a_template_that_refuses_marks_does_not_hide_what_it_drops():
    strict = QWEN.replace(
        "{% for m in messages %}",
        """{% for m in messages %}
{%- if m.role == "user" and not m.content.endswith("?") %}{{ raise_exception("no question") }}{% endif %}""",
        1,
    )
    prompt = turns("human: Be brief and kind.", "user: What is 2+2?")
    assert refusal(pair(prompt, *ANSWERS), tokenizer_of(strict)) == dropped_error("human", "prompt[0]")


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {}}}],
}
NESTED = {"type": "function", "function": {"name": "w", "arguments": {"city": "Paris"}}}
NO_CALL = "d.jsonl:3: the chat template drops a tool call or its arguments ({}); use a template that writes them"


def test_a_dropped_tool_call_is_an_error():
    """Otherwise an empty turn would be trained."""
    prompt = [*turns("user: Weather?"), CALL, *turns("tool: grey")]
    plain = QWEN.replace('"assistant"] %}<', '"assistant", "tool"] %}<')
    assert refusal(pair(prompt, *ANSWERS), tokenizer_of(plain)) == NO_CALL.format("prompt[1]")
    assert refusal(pair(turns("user: Weather?"), [CALL], ANSWERS[1]), tokenizer_of(plain)) == NO_CALL.format(
        "chosen[0]"
    )


# templates that write some of the calls, or some of a call
CALLS = """{%% for m in messages %%}{{ m.role }}: {{ m.content }}{%% if m.tool_calls %%}{%% for call in %s %%}
{%%- set f = call.function or {} %%}{{ f.name }}({{ %s | tojson }}){%% endfor %%}{%% endif %%}{{ eos_token }}
{%%- endfor %%}"""
ARGUMENTS = "f.arguments | default({})"
EVERY = CALLS % ("m.tool_calls", ARGUMENTS)
FIRST = CALLS % ("m.tool_calls[:1]", ARGUMENTS)
OBJECTS = CALLS % ("m.tool_calls", "(f.arguments if f.arguments is mapping else {})")


def calling(*calls: dict) -> list[dict]:
    return [{"role": "assistant", "content": "", "tool_calls": list(calls)}]


@pytest.mark.parametrize(
    ("template", "good", "bad"),
    [
        (FIRST, calling(NESTED), calling(NESTED, NESTED | {"function": {"name": "v", "arguments": {}}})),
        (EVERY, calling(NESTED), calling(NESTED["function"])),  # its name is not where the template reads it
        (OBJECTS, calling(NESTED), calling({"function": {"name": "w", "arguments": '{"city": "Paris"}'}})),
    ],
    ids=["second call", "another form", "arguments as text"],
)
def test_a_part_of_a_tool_call_that_is_dropped_is_an_error(template, good, bad):
    """Also after a conversation of the same roles that was written whole."""
    tokenizer, question = tokenizer_of(template), turns("user: Weather?")
    assert tokenized(pair(question, good, ANSWERS[1]), tokenizer).dropped == []
    assert refusal(pair(question, bad, ANSWERS[1]), tokenizer) == NO_CALL.format("chosen[0]")


def test_several_calls_with_text_arguments_are_not_taken_for_dropped():
    every = calling({"function": {"name": "w", "arguments": '{"city": "Paris"}'}}, NESTED, {"function": {"name": "v"}})
    tokens = tokenized(pair(turns("user: Weather?"), every, ANSWERS[1]), tokenizer_of(EVERY))
    assert tokens.dropped == []


def test_tools_that_the_template_does_not_write_are_a_warning():
    one = Pair(turns("user: Weather?"), *ANSWERS, "d.jsonl:3", tools=[{"type": "function", "function": {"name": "w"}}])
    (warning,) = tokenized(one, tokenizer_of(QWEN)).warnings
    assert warning.endswith(
        "the chat template does not write the row's tools, so the model does not see them; change the template"
    )
    tools = QWEN.replace("{% for m", "{{ tools | tojson if tools }}{% for m", 1)
    assert tokenized(one, tokenizer_of(tools)).warnings == []


def test_a_template_without_an_end_token_is_a_warning():
    (warning,) = tokenized(
        pair(turns("user: 2+2?"), *ANSWERS), tokenizer_of(QWEN.replace("{{ eos_token }}", ""))
    ).warnings
    assert "the chat template writes no end token after the answer" in warning


def test_one_answer_without_an_end_token_is_enough_for_the_warning():
    half = QWEN.replace("{{ eos_token }}", "{{ eos_token if 'five' not in m.content }}")
    (warning,) = tokenized(pair(turns("user: 2+2?"), *ANSWERS), tokenizer_of(half)).warnings
    assert "the chat template writes no end token after the answer" in warning


def test_an_answer_of_which_a_part_is_dropped_is_a_warning():
    """Gemma's channels; the end of the answer is there."""
    channels = QWEN.replace("set content = m.content", "set content = m.content.split('<channel|>')[-1]")
    answers = turns("assistant: <|channel>thought I add.<channel|>It is four."), turns("assistant: five")
    (warning,) = tokenized(pair(turns("user: What is 2+2?"), *answers), tokenizer_of(channels)).warnings
    assert "the chat template changes an answer (it leaves out a part of it" in warning


def test_generation_cannot_start_after_a_tool_call():
    row = PromptRow([*turns("user: Weather?"), CALL], {}, "d.jsonl:3")
    with pytest.raises(UserError, match=r"d\.jsonl:3: 'prompt' ends with a tool call, must end with the tool's result"):
        row.ids(tokenizer_of(LLAMA))


# What templates may do with contents


# SmolLM3's flags, and a template that escapes
FLAGS = """{% for m in messages %}{{ m.role }}: {{ m.content.replace("/no_think", "").replace("/system_override", "") }}
{{- eos_token }}{% endfor %}"""
ESCAPED = "{% for m in messages %}{{ m.role }}: {{ m.content | e }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("system", ["/no_think", "/system_override Be brief and kind.", "Be brief. /no_think"])
def test_flags_in_a_system_message_may_be_taken_out(system):
    text = texts(pair(turns(f"system: {system}", "user: What is 2+2?"), *ANSWERS), tokenizer_of(FLAGS))[0]
    assert "/no" not in text
    assert "What is 2+2?" in text


def test_contents_may_be_escaped():
    prompt = turns("user: Is 1 < 2 && 2 > 1?")
    assert texts(pair(prompt, *ANSWERS), tokenizer_of(ESCAPED))[0] == "user: Is 1 &lt; 2 &amp;&amp; 2 &gt; 1?</s>"


# writes only contents that are lists of parts, as the templates of SmolVLM and Idefics 3
PARTS = """{% for m in messages %}{{ m.role }}:{% for part in m.content %}{% if part.type == "text" %} {{ part.text }}
{%- endif %}{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def test_a_template_that_wants_parts_gets_them():
    assert texts(pair(turns("user: What is 2+2?"), *ANSWERS), tokenizer_of(PARTS)) == (
        "user: What is 2+2?</s>assistant:",
        " four</s>",
        " five</s>",
    )
    prefilled = pair(turns("user: What is 2+2?", "assistant: It is"), turns("assistant:  4"), turns("assistant:  5"))
    assert texts(prefilled, tokenizer_of(PARTS))[1:] == (" 4</s>", " 5</s>")


def test_a_rows_own_template_decides_about_parts():
    own = Pair(turns("user: What is 2+2?"), *ANSWERS, "d.jsonl:3", chat_template_kwargs={"chat_template": NO_REASONING})
    assert texts(own, tokenizer_of(PARTS))[0] == "user: What is 2+2?</s>"
    several = tokenizer_of()
    several.chat_template = {"default": PARTS, "tool_use": "{{ tools | tojson }}" + NO_REASONING}
    tools = [{"type": "function", "function": {"name": "w"}}]
    with_tools = Pair(turns("user: What is 2+2?"), *ANSWERS, "d.jsonl:3", tools=tools)
    assert texts(with_tools, several)[0].endswith("user: What is 2+2?</s>")
    assert texts(pair(turns("user: What is 2+2?"), *ANSWERS), several)[0] == "user: What is 2+2?</s>assistant:"


def test_contents_may_be_stripped():
    prompt, chosen, _ = texts(pair(turns("user:  2+2? \n"), *ANSWERS), tokenizer_of(LLAMA))
    assert prompt == "<s><|start|>user<|end|>\n\n2+2?</s><|start|>assistant<|end|>\n\n"
    assert chosen == "four</s>"


def test_whitespace_within_contents_may_change():
    joining = "{% for m in messages %}{{ m.role }}: {{ m.content.split() | join(' ') + eos_token }}\n{% endfor %}"
    prompt = turns("user: What\n\n  is 2+2?")
    assert texts(pair(prompt, *ANSWERS), tokenizer_of(joining))[0] == "user: What is 2+2?</s>\n"


def test_the_system_message_may_be_moved():
    prompt = turns("system: Be brief.", "user: Hi", "assistant: Hi.", "user: 2+2?")
    text, chosen, rejected = texts(pair(prompt, *ANSWERS), tokenizer_of(MISTRAL))
    assert text == "<s>[INST] Hi [/INST] Hi.</s>[INST] Be brief.\n\n2+2? [/INST]"
    assert (chosen, rejected) == (" four</s>", " five</s>")


def test_reasoning_of_earlier_turns_may_be_dropped():
    prompt = turns("user: Hi", "assistant: <think>\nGreet.\n</think>\n\nHello.", "user: 2+2?")
    answers = turns("assistant: <think>\nEasy.\n</think>\n\n4"), turns("assistant: <think>\nHm.\n</think>\n\n5")
    text, chosen, rejected = texts(pair(prompt, *answers), tokenizer_of(QWEN))
    assert "Greet." not in text
    assert "Hello." in text
    assert chosen == "<think>\nEasy.\n</think>\n\n4</s>\n"
    assert rejected == "<think>\nHm.\n</think>\n\n5</s>\n"


def test_reasoning_dropped_from_an_answer_is_a_warning():
    answers = turns("assistant: <think>Easy.</think>4"), turns("assistant: <think>Hm.</think>5")
    tokens = tokenized(pair(turns("user: 2+2?"), *answers), tokenizer_of(NO_REASONING))
    (warning,) = tokens.warnings
    assert warning.startswith(
        "1 of 1 pairs (first: d.jsonl:3): the chat template leaves out the reasoning of an answer"
    )
    keyed = [[{**answer[0], "reasoning_content": "I add."}] for answer in ANSWERS]
    assert len(tokenized(pair(turns("user: 2+2?"), *keyed), tokenizer_of(QWEN)).warnings) == 1


def test_reasoning_that_minimind_keeps_is_no_warning(minimind):
    keyed = [[{**answer[0], "reasoning_content": "I add.\n"}] for answer in ANSWERS]
    one = Pair(turns("user: 2+2?"), *keyed, "d.jsonl:3", chat_template_kwargs={"open_thinking": True})
    assert texts(one, minimind)[1] == "I add.\n</think>\n\nfour<|im_end|>\n"


def test_results_of_tools_may_be_json_and_calls_in_the_templates_own_way():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w", "arguments": {"at": "é"}}}]}
    result = {"role": "tool", "content": json.dumps({"sky": "grau"})}
    prompt = [*turns("user: Weather?"), call, result]
    text, *_ = texts(pair(prompt, *ANSWERS), tokenizer_of(LLAMA))
    assert '"{\\"sky\\": \\"grau\\"}"' in text


# Prefills


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA, ("<s><|start|>user<|end|>\n\n2+2?</s><|start|>assistant<|end|>\n\nIt is", " four</s>", " five</s>")),
        (QWEN, ("<|start|>user\n2+2?</s>\n<|start|>assistant\nIt is", " four</s>\n", " five</s>\n")),
        (MISTRAL, ("<s>[INST] 2+2? [/INST] It is", " four</s>", " five</s>")),
    ],
)
def test_the_answers_continue_a_prefill(template, expected):
    prompt = turns("user: 2+2?", "assistant: It is")
    answers = turns("assistant:  four"), turns("assistant:  five")
    assert texts(pair(prompt, *answers), tokenizer_of(template)) == expected

    # the same as one message in the answers, but for what is scored
    plain = pair(turns("user: 2+2?"), turns("assistant: It is four"), turns("assistant: It is five"))
    ids = [
        [s.ids.tolist() for s in tokenized(one, tokenizer_of(template))[0]] for one in (plain, pair(prompt, *answers))
    ]
    assert ids[0] == ids[1]


def test_minimind_continues_a_prefill(minimind):
    prompt = turns("user: 2+2?", "assistant: It is")
    text, chosen, rejected = texts(pair(prompt, turns("assistant:  four"), turns("assistant:  five")), minimind)
    assert text.endswith("It is")
    assert text.count("assistant") == 1
    assert (chosen, rejected) == (" four<|im_end|>\n", " five<|im_end|>\n")


def test_a_prefill_is_continued_by_the_first_message_only():
    prompt = turns("user: 2+2?", "assistant: It is")
    longer = turns("assistant:  four.", "user: Sure?", "assistant: Yes.")
    tokenizer = tokenizer_of(MISTRAL)
    tokens = tokenized(pair(prompt, longer, turns("assistant:  five.")), tokenizer)
    ids, start = tokens[0].chosen
    assert tokenizer.decode(ids[start:]) == " four.</s>[INST] Sure? [/INST] Yes.</s>"
    (warning,) = tokens.warnings
    assert "messages of role 'user', which are trained on" in warning


def test_a_space_at_the_end_of_a_prefill_that_the_template_strips():
    prompt = turns("user: 2+2?", "assistant: It is ")
    text, chosen, _ = texts(pair(prompt, *ANSWERS), tokenizer_of(LLAMA))
    assert text.endswith("It is")
    assert chosen == " four</s>"


@pytest.mark.parametrize(
    ("start", "chosen", "reason"),
    [
        ({}, "user: Sure?", "'chosen' starts with the role 'user'"),
        ({}, "tool: 4", "'chosen' starts with the role 'tool'"),
        ({"tool_calls": [{}]}, "assistant: 4", "that message calls a tool"),
        ({"name": "a"}, "assistant: 4", "it and the first message of 'chosen' have different 'name'"),
    ],
)
def test_answers_that_cannot_continue_a_prefill(start, chosen, reason):
    prompt = [*turns("user: 2+2?"), {**turns("assistant: It is")[0], **start}]
    answer = [turns(chosen)[0] | ({"name": "b"} if "name" in start else {})]
    text = refusal(pair(prompt, answer, turns("assistant: five")), tokenizer_of(LLAMA))
    assert text == (
        "d.jsonl:3: 'prompt' ends with an assistant's message, which the answers must continue, but "
        f"{reason}; end the prompt with the user's message, or start the answers with the assistant's"
    )


@pytest.mark.parametrize("role", ["user", "tool"])
def test_answers_of_another_role_follow_the_assistants_message(role):
    """The prompt of TRL, where both conversations start with [user, assistant] and part in a later user's turn."""
    prompt = turns("user: What is 2+2?", "assistant: It is four.")
    chosen, rejected = turns(f"{role}: Sure?", "assistant: Yes."), turns(f"{role}: Why?", "assistant: So.")
    tokens = tokenized(pair(prompt, chosen, rejected), tokenizer_of(NO_REASONING))
    (sequence, _) = tokens[0]
    text = tokenizer_of(NO_REASONING).decode(sequence.ids[: sequence.prompt_length])
    assert text == "user: What is 2+2?</s>assistant: It is four.</s>"
    assert tokens.warnings[-1] == (
        f"1 of 1 pairs (first: d.jsonl:3): the answers have messages of role {role!r}, which are trained on like the "
        "assistant's; move them into the prompt if that is not meant"
    )


def test_generated_answers_continue_a_prefill():
    tokenizer = tokenizer_of(MISTRAL)
    row = PromptRow(turns("user: 2+2?", "assistant: It is"), {}, "d.jsonl:3")
    assert tokenizer.decode(row.ids(tokenizer)) == "<s>[INST] 2+2? [/INST] It is"
    assert tokenizer.decode(row.whole_ids(tokenizer, " four")) == "<s>[INST] 2+2? [/INST] It is four</s>"


# BOS and EOS of plain text


ONCE = "<s>Once", " upon a</s>", " more</s>"


@pytest.mark.parametrize("adds", ["<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("start", ["", "<s>", "<s><s>"])
@pytest.mark.parametrize("end", ["", "</s>", "</s></s>", "</s>\n"])
def test_plain_text_has_bos_and_eos_once(adds, start, end):
    one = pair(f"{start}Once", f" upon a{end}", f" more{end}")
    assert texts(one, tokenizer_of(adds=adds)) == ONCE


def test_a_space_after_an_own_bos_stays():
    one = pair("<s> Once", " upon a", " more")
    assert texts(one, tokenizer_of(adds="<s> $A")) == ("<s> Once", *ONCE[1:])


def test_an_own_bos_stays_and_none_is_added_by_a_tokenizer_that_adds_none():
    assert texts(pair("<s>Once", " upon a", " more"), tokenizer_of()) == ONCE
    assert texts(pair("Once", " upon a", " more"), tokenizer_of()) == ("Once", *ONCE[1:])
    assert texts(pair("Once", " upon a", " more"), tokenizer_of(adds="$A </s>")) == ("Once", *ONCE[1:])


def test_an_own_eos_at_the_end_of_a_prompt_stays():
    one = pair("Once</s>", " upon a", " more")
    for adds in ("", "$A </s>"):
        assert texts(one, tokenizer_of(adds=adds)) == ("Once</s>", *ONCE[1:])


def test_an_empty_prompt_is_the_bos_token():
    assert texts(pair("", "<s>Once", "more"), tokenizer_of(adds="<s> $A </s>")) == ("<s>", "Once</s>", "more</s>")


def test_prompts_of_generated_pairs_have_them_once_too():
    tokenizer = tokenizer_of(adds="<s> $A </s>")
    row = PromptRow("<s>Once", {}, "d.jsonl:3")
    assert tokenizer.decode(row.ids(tokenizer)) == "<s>Once"
    assert tokenizer.decode(row.ids(tokenizer, " upon")) == "<s>Once upon"
    assert tokenizer.decode(row.whole_ids(tokenizer, " upon")) == "<s>Once upon</s>"


# BOS and EOS in conversations


@pytest.mark.parametrize("adds", ["", "<s> $A </s>"])
@pytest.mark.parametrize("template", [LLAMA, QWEN, MISTRAL])
def test_a_conversation_has_the_templates_tokens_once(template, adds):
    plain = pair(turns("user: Once"), *ANSWERS)
    expected = texts(plain, tokenizer_of(template))
    assert texts(plain, tokenizer_of(template, adds=adds)) == expected
    ended = pair(turns("user: Once"), turns("assistant: four</s>"), turns("assistant: five</s>"))
    assert texts(ended, tokenizer_of(template, adds=adds)) == expected


@pytest.mark.parametrize("template", [LLAMA, MISTRAL])
def test_an_own_bos_gives_way_to_the_templates(template):
    expected = texts(pair(turns("user: Once"), *ANSWERS), tokenizer_of(template))
    assert expected[0].count("<s>") == 1
    assert texts(pair(turns("user: <s>Once"), *ANSWERS), tokenizer_of(template)) == expected


def test_an_own_bos_stays_with_a_template_that_writes_none():
    bare = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    answers = turns("assistant: four</s>"), turns("assistant: five</s>")
    expected = ("<s>Once\n", "four</s>\n", "five</s>\n")
    assert texts(pair(turns("user: <s>Once"), *answers), tokenizer_of(bare)) == expected
    assert texts(pair(turns("user: <s><s>Once"), *answers), tokenizer_of(bare))[0] == "<s>Once\n"
    for end in ("</s>", "</s></s>"):
        ended = turns(f"assistant: four{end}"), turns(f"assistant: five{end}")
        expected = "Once\n", "four</s>\n", "five</s>\n"
        assert texts(pair(turns("user: Once"), *ended), tokenizer_of(bare)) == expected


# The prompt again in both answers


def test_plain_answers_that_repeat_the_prompt_are_a_warning():
    fine = Pair("Once", " upon a", " more", "d.jsonl:1")
    repeated = pair("Once upon ", "Once upon a time", "Once upon more")
    one_only = Pair("Once upon", "Once upon a time", " more", "d.jsonl:4")
    tokens = tokenize_pairs([fine, repeated, one_only], tokenizer_of(), max_length=99, truncation="keep_start")
    assert tokens.warnings == [
        "1 of 3 pairs (first: d.jsonl:3): both answers begin with the prompt, which is then trained on as a part of "
        "them; remove it from the answers, or drop the column prompt and set prompt: implicit"
    ]
