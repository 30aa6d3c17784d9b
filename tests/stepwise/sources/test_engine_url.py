"""Answers of an OpenAI-compatible server on loopback: whole runs, what is sent, resuming, and all that can fail."""

from __future__ import annotations

import itertools
import json
import re
import signal
import time
from pathlib import Path

import pytest

from sdpo_kernels.stepwise.check import check_run
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.settings.generation import GenerationSettings
from sdpo_kernels.stepwise.sources import generation, server
from sdpo_kernels.stepwise.sources.engine_url import check_url
from tests.stepwise import runs
from tests.stepwise.ranks_of_a_run import Ranks
from tests.stepwise.runs import CHAT, Child, make_model
from tests.stepwise.sources.test_generation import JUDGE, PROMPTS, context
from tests.stepwise.sources.test_sources import pairs_of, source_config
from tests.stepwise.sources.tiny_server import TinyServer

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), spread=0.1)


@pytest.fixture(scope="module")
def stronger(tmp_path_factory):
    """The model that the server serves, another one than the run's."""
    return make_model(tmp_path_factory.mktemp("stronger"), seed=7, spread=0.1)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)


def asked(folder: Path, model: Path, url: str, prompts=PROMPTS, **more):
    """A context whose answers come from `url`; `generation` has further settings of it."""
    engine = {"url": url, **more.pop("generation", {})}
    return context(folder, model, prompts, batch_size=16, generation=engine, **more)


def url_config(folder: Path, model: Path, url: str, /, stages: int = 1, settings=(), **engine):
    return source_config(
        folder, model, "ranked", stages, settings, judge=JUDGE, batch_size=16, generation={"url": url, **engine}
    )


# --- what is asked, and what becomes of the answers ---


def test_a_run_trains_on_the_servers_answers_and_says_whose_they_are(tmp_path, model, stronger, spoken):
    with TinyServer(stronger) as tiny:
        config = url_config(tmp_path, model, tiny.url)
        (record,) = run(config, spoken.reporter)["stages"]
        answers = {body["prompt"]: [tiny.sampled(body["prompt"], body, i) for i in range(3)] for body in tiny.requests}

    pairs = pairs_of(tmp_path / "run/stage-1-s1")
    assert len(tiny.requests) == len(answers) == 10
    assert len(pairs) == record["pairs"] > 2
    for pair in pairs:
        whole = [text for text, reason in answers[pair["prompt"]] if reason == "stop"]
        assert {pair["chosen"], pair["rejected"]} <= set(whole)

    assert record["generation"] == {"engine": "url", "url": tiny.url, "model": "tiny", "answered": ["tiny@1"]}
    text = f"stage s1: answers come from the server {tiny.url}, model tiny, not from the policy"
    assert spoken.text.count(text) == 1
    card = (tmp_path / "run/stage-1-s1/README.md").read_text()
    assert "| answers of the pairs | tiny@1, not the policy's |" in card
    assert tiny.url not in card


def test_a_request_has_the_settings_of_sampling_and_a_seed_of_its_own(tmp_path, model):
    with TinyServer(model) as tiny:
        ctx = asked(tmp_path, model, tiny.url, temperature=0.7, top_p=0.9, max_new_tokens=6, samples=2)
        generation.sample(ctx, 2)
    same = {"model": "tiny", "n": 2, "temperature": 0.7, "top_p": 0.9, "max_tokens": 6}
    sent = {body["prompt"]: body for body in tiny.requests}
    assert set(sent) == {row.prompt for row in PROMPTS}
    assert all(body == same | {"prompt": prompt, "seed": body["seed"]} for prompt, body in sent.items())
    assert len({body["seed"] for body in sent.values()}) == 4
    assert {body["seed"] for body in sent.values()} == {ctx.seed("samples.jsonl", n) >> 2 for n in range(4)}


def test_answers_cut_off_by_max_new_tokens_and_empty_ones_are_left_out(tmp_path, model, spoken):
    def fault(handler, body):
        texts = [("good1", "stop"), ("good2", "length"), (" ", "stop"), ("bad1", "content_filter")]
        choices = [{"text": text, "finish_reason": reason} for text, reason in texts]
        return handler.reply(200, {"model": "tiny", "choices": choices})

    with TinyServer(model, fault=fault) as tiny:
        ctx = asked(tmp_path, model, tiny.url, PROMPTS[:2], samples=4)
        object.__setattr__(ctx, "reporter", spoken.reporter)
        assert generation.sample(ctx, 4) == [["good1"], ["good1"]]
    assert "samples: 6 of 8 left out: empty, or did not end within max_new_tokens (40)" in spoken.text
    assert "the server's answers to a prompt are all alike: does it sample?" in spoken.text


def test_a_server_that_gives_one_choice_at_a_time_is_asked_again(tmp_path, model):
    """As `transformers serve` does; its answers are those of one that gives all, as both count on from the seed."""
    drawn = []
    for most in (1, 10):
        folder = tmp_path / str(most)
        folder.mkdir()
        with TinyServer(model) as tiny:
            tiny.most_choices = most
            drawn.append(generation.sample(asked(folder, model, tiny.url), 3))
        assert len(tiny.requests) == (12 if most == 1 else 4)
    assert drawn[0] == drawn[1]
    assert any(len(set(group)) > 1 for group in drawn[0])


def test_no_more_requests_at_a_time_than_the_settings_say(tmp_path, model):
    def slow(handler, body):
        time.sleep(0.05)
        return False

    with TinyServer(model, fault=slow) as tiny:
        generation.sample(asked(tmp_path, model, tiny.url, PROMPTS * 2, generation={"requests": 3}), 2)
    assert len(tiny.requests) == 8
    assert tiny.most_at_once == 3


def test_the_template_of_a_conversation_is_the_runs_and_its_start_token_is_sent_once(tmp_path, model):
    """The server's tokenizer adds the start token that the template has written."""
    row = PromptRow([{"role": "user", "content": "word1"}], {}, "p:1")
    with TinyServer(model) as tiny:
        ctx = asked(tmp_path, model, tiny.url, [row])
        ctx.tokenizer.chat_template = "<s>" + CHAT
        ctx.tokenizer.add_bos_token = True
        for adds in (True, False):
            object.__setattr__(ctx, "tokenizer", _starting(ctx.tokenizer, adds))
            generation.sample(ctx, 2, f"{adds}.jsonl")
    assert [body["prompt"] for body in tiny.requests] == [
        "user word1 </s>assistant ", "<s>user word1 </s>assistant "
    ]  # fmt: skip


def _starting(tokenizer, adds: bool):
    """The tokenizer with, or without, a start token before every text."""
    from tokenizers.processors import TemplateProcessing

    single = "<s> $A" if adds else "$A"
    start = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=start)
    return tokenizer


def test_a_server_with_chat_completions_gets_messages(tmp_path, model, stronger):
    messages = [{"role": "user", "content": "word1"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = PromptRow(messages, {}, "p:1", tools=tools)
    with TinyServer(stronger) as tiny:
        tiny.tokenizer.chat_template = CHAT
        ctx = asked(tmp_path, model, tiny.url, [row], generation={"api": "chat"})
        ctx.tokenizer.chat_template = CHAT
        (texts,) = generation.sample(ctx, 3)
        (body,) = tiny.requests
        answers = [tiny.sampled("user word1 </s>assistant ", body, number) for number in range(3)]
    assert (body["messages"], body["tools"], body["n"]) == (messages, tools, 3)
    assert texts == [text for text, reason in answers if reason == "stop"] != []

    settings = GenerationSettings(url=tiny.url, api="chat")
    with pytest.raises(UserError, match=r"generation\.api: was 'chat', but p:1 is plain text, must be messages"):
        check_url(settings, PROMPTS)


# --- resuming ---


def test_a_run_killed_while_it_asks_asks_for_the_rest_only(tmp_path, model):
    """The second process asks another address: a server may have moved."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    with TinyServer(model) as tiny:
        run(url_config(whole, model, tiny.url), QUIET)

    arrived = itertools.count()  # not the number answered: two requests at a time may both see three

    def stalls(handler, body):
        if next(arrived) < 4:
            return False
        time.sleep(60)
        return True

    source_config(killed, model, "ranked", 1, judge=JUDGE)  # its prompts
    with TinyServer(model, fault=stalls) as tiny:
        url_config(killed, model, tiny.url, requests=2)
        child = Child(killed, "train", killed / "run.yaml", "--quiet")
        file = killed / "run/.stage-1-s1/source/samples.jsonl"
        child.wait_for(lambda: file.exists() and file.read_bytes().count(b"\n") == 5)
        child.signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    before = {body["prompt"] for body in tiny.requests}
    with TinyServer(model) as tiny:
        run(url_config(killed, model, tiny.url), QUIET)
    after = {body["prompt"] for body in tiny.requests}
    assert (len(before), len(after), before & after) == (4, 6, set())
    assert pairs_of(killed / "run/stage-1-s1") == pairs_of(whole / "run/stage-1-s1")


def test_a_server_that_dies_half_way_ends_the_run_and_its_answers_are_kept(tmp_path, model):
    def dies(handler, body):
        if len(handler.server.requests) < 2:
            return False
        handler.close_connection = True
        handler.connection.close()
        return True

    with TinyServer(model, fault=dies) as tiny:
        ctx = asked(tmp_path, model, tiny.url, generation={"requests": 1})
        with pytest.raises(UserError, match=rf"the server {tiny.url} cannot be reached: .*\(after 6 tries\)"):
            generation.sample(ctx, 3)
        assert len(tiny.requests) == 2
        tiny.fault = None
        drawn = generation.sample(asked(tmp_path, model, tiny.url), 3)
    assert sorted(body["prompt"] for body in tiny.requests) == sorted(row.prompt for row in PROMPTS)
    assert len(drawn) == 4


def test_a_started_stage_keeps_its_model_and_may_change_its_address(tmp_path, model):
    with TinyServer(model) as tiny:
        run(url_config(tmp_path, model, tiny.url, model="tiny"), QUIET)
    moved = url_config(tmp_path, model, "http://127.0.0.1:9/v1", requests=2, timeout=5.0, model="tiny")
    assert run(moved, QUIET)["stages"][0]["state"] == "done"  # nothing is asked
    text = r"source.generation.model: tiny -> other \(the stage's pairs were generated with it\)"
    with pytest.raises(UserError, match=text):
        run(url_config(tmp_path, model, tiny.url, model="other"), QUIET)


@pytest.mark.xdist_group("distributed")
def test_rank_0_alone_asks(tmp_path, model):
    with TinyServer(model) as tiny:
        url_config(tmp_path, model, tiny.url, settings={"trainer": {"per_device_train_batch_size": 1}})
        ranks = Ranks(tmp_path, "train", tmp_path / "run.yaml", "--quiet")
        assert ranks.wait() == [0, 0], ranks.text
    assert len({body["prompt"] for body in tiny.requests}) == len(tiny.requests) == 10


# --- what can fail ---


def refusing(status: int, message: str, **headers: str):
    return lambda handler, body: handler.reply(status, {"error": {"message": message}}, **headers)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (refusing(400, "max_tokens is too large"), r"p:1: .*answered 400 Bad Request: .*max_tokens is too large"),
        (lambda handler, body: handler.reply(200, "<html>hello</html>"), "something that is not JSON: '<html>hello"),
        (lambda handler, body: handler.reply(200, {"choices": []}), r"p:1: .*gave no answer as /completions has it"),
        (lambda handler, body: handler.reply(200, [1]), r"p:1: .*gave no answer as /completions has it: \[1\]"),
        (lambda handler, body: handler.reply(200, {"choices": [{"index": 0}]}), "gave no answer as /completions"),
        (lambda handler, body: handler.reply(200, {"choices": [{"text": 3}]}), "gave no answer as /completions"),
        (
            lambda handler, body: handler.reply(302, "", Location="http://127.0.0.1:9/v1/completions"),
            r"answered 302 .*is moved to http://127.0.0.1:9/v1/completions: set generation.url",
        ),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_used_ends_the_run_at_once(tmp_path, model, fault, message):
    tries = []

    def counted(handler, body):
        tries.append(body)
        return fault(handler, body)

    with TinyServer(model, fault=counted) as tiny, pytest.raises(UserError, match=message):
        generation.sample(asked(tmp_path, model, tiny.url, PROMPTS[:1]), 3)
    assert len(tries) == 1


def test_a_model_that_the_server_does_not_have(tmp_path, model):
    with (
        TinyServer(model) as tiny,
        pytest.raises(
            UserError, match=r"answered 404 Not Found: .*The model `huge` does not exist.*check generation.model"
        ),
    ):
        generation.sample(asked(tmp_path, model, tiny.url, generation={"model": "huge"}), 3)


def test_busy_and_broken_answers_are_asked_for_again(tmp_path, model):
    faults = [(429, {"Retry_After": "0"}), (503, {}), (500, {})]
    waits = []

    def fault(handler, body):
        if not faults:
            return False
        waits.append(time.monotonic())
        status, headers = faults.pop(0)
        return handler.reply(status, "later", **headers)

    with TinyServer(model, fault=fault) as tiny:
        drawn = generation.sample(asked(tmp_path, model, tiny.url, PROMPTS[:1]), 3)
    assert len(waits) == 3
    assert len(tiny.requests) == 1
    assert len(drawn) == 1


def test_a_server_that_takes_too_long(tmp_path, model, monkeypatch):
    monkeypatch.setattr(server, "TRIES", 2)
    tries = []

    def fault(handler, body):
        tries.append(body)
        time.sleep(1)
        return True

    with TinyServer(model, fault=fault) as tiny:
        ctx = asked(tmp_path, model, tiny.url, PROMPTS[:1], generation={"timeout": 0.2, "model": "tiny"})
        with pytest.raises(UserError, match=r"no answer within 0.2 s \(generation.timeout\) \(after 2 tries\)"):
            generation.sample(ctx, 3)
        end = time.monotonic() + 20
        while len(tries) < 2 and time.monotonic() < end:  # a busy machine's server reads it later
            time.sleep(0.01)
    assert len(tries) == 2


def test_a_server_that_sends_a_byte_now_and_then_takes_too_long_as_well(tmp_path, model, monkeypatch):
    """Gateways send spaces to keep a connection open; a socket's own timeout begins anew at each of them."""
    monkeypatch.setattr(server, "TRIES", 1)

    def fault(handler, body):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            time.sleep(0.1)
        handler.close_connection = True
        handler.wfile.write(json.dumps({"choices": [{"text": "late", "finish_reason": "stop"}] * 3}).encode())
        return True

    with TinyServer(model, fault=fault) as tiny:
        ctx = asked(tmp_path, model, tiny.url, PROMPTS[:1], generation={"timeout": 0.3, "model": "tiny"})
        with pytest.raises(UserError, match=r"no answer within 0.3 s \(generation.timeout\)"):
            generation.sample(ctx, 3)


def test_an_answer_that_breaks_off_is_asked_for_again(tmp_path, model):
    broken = []

    def fault(handler, body):
        if broken:
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [')
        broken.append(body)
        handler.close_connection = True
        return True

    with TinyServer(model, fault=fault) as tiny:
        assert len(generation.sample(asked(tmp_path, model, tiny.url, PROMPTS[:1]), 3)) == 1
    assert (len(broken), len(tiny.requests)) == (1, 1)


def test_a_wrong_or_missing_key_is_reported_before_training_and_never_shown(tmp_path, model, monkeypatch):
    monkeypatch.setenv("TINY_KEY", "sk-right")
    with TinyServer(model, key="sk-right") as tiny:
        with pytest.raises(UserError, match=r"answered 401 Unauthorized: .*; set generation.api_key_env"):
            run(url_config(tmp_path, model, tiny.url), QUIET)

        config = url_config(tmp_path, model, tiny.url, api_key_env="TINY_KEY")
        monkeypatch.setenv("TINY_KEY", "sk-wrong")
        with pytest.raises(UserError, match=r"401 Unauthorized: .*Bearer <key>") as found:
            run(config, QUIET)
        assert "sk-wrong" not in str(found.value)

        monkeypatch.delenv("TINY_KEY")
        with pytest.raises(UserError, match="api_key_env: TINY_KEY is the name of an environment variable that is not"):
            run(config, QUIET)
        assert not (tmp_path / "run").exists()

        monkeypatch.setenv("TINY_KEY", "sk-right")
        run(config, QUIET)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if b"sk-right" in path.read_bytes()]


def test_the_model_must_be_named_unless_the_server_lists_one(tmp_path, model):
    with TinyServer(model) as tiny:
        for listed, found in (([], "lists no model"), (["a", "tiny"], "lists 2: a, tiny")):
            tiny.listed = listed
            with pytest.raises(UserError, match=f"generation.model: is required: the server {tiny.url} {found}"):
                run(url_config(tmp_path, model, tiny.url), QUIET)
        assert not (tmp_path / "run").exists()
        note, warnings = check_url(GenerationSettings(url=tiny.url, model="b"), [])
        assert "model b, not from the policy" in note
        assert warnings == ["generation.model: was 'b'; the server lists a, tiny"]


def test_check_says_who_answers_and_that_nobody_does_yet(tmp_path, model, spoken):
    with TinyServer(model) as tiny:
        check_run(url_config(tmp_path, model, tiny.url), spoken.reporter)
    assert f"note       stage s1: answers come from the server {tiny.url}, model tiny, not from" in spoken.text
    assert "warning" not in spoken.text

    check_run(url_config(tmp_path, model, tiny.url), spoken.reporter)  # it has ended
    assert "model not known yet, not from" in spoken.text
    text = rf"source: the server {tiny.url} cannot be reached: .*refused; it must answer when the stage samples"
    assert len(re.findall(text, spoken.text)) == 1
    with pytest.raises(UserError, match=r"cannot be reached: .*refused \(after 6 tries\)"):
        run(url_config(tmp_path, model, tiny.url), QUIET)


def test_old_runs_have_no_generation_in_their_settings_and_go_on(tmp_path, model):
    config = source_config(tmp_path, model, "ranked", 1, judge=JUDGE)
    run(config, QUIET)
    path = tmp_path / "run/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["config"]["stages"][0]["source"]["generation"]
    path.write_text(json.dumps(manifest))
    assert run(config, QUIET)["stages"][0]["state"] == "done"
    assert runs.leftovers(tmp_path / "run") == []
