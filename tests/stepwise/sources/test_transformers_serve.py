"""Answers of `transformers serve`, a real server: pip install 'transformers[serving]', else the test is skipped."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.sources import generation, server
from tests.stepwise.runs import CHAT, make_model
from tests.stepwise.sources.test_engine_url import asked, url_config
from tests.stepwise.sources.test_generation import PROMPTS
from tests.stepwise.sources.test_sources import pairs_of, write_rows

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason="needs transformers[serving]")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With a chat template, and a generation config that samples, as serve would otherwise be greedy."""
    folder = make_model(tmp_path_factory.mktemp("model"), spread=0.1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    GenerationConfig(do_sample=True, top_k=0, eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    return folder


class Serve:
    """`transformers serve` on a free port, until `stop`."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}/v1", log
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*command, "--port", str(port), "--device", "cpu"], stdout=stream, stderr=stream, env=environment
            )
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.url.replace("/v1", "/health"), timeout=1)
                return
            except OSError:
                time.sleep(0.2)
        self.stop()
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    found = Serve(model, tmp_path_factory.mktemp("serve") / "log.txt")
    yield found
    found.stop()


def test_a_run_with_its_answers(tmp_path, model, served):
    """It ignores `n` and has no list of models; pairs come from whole answers, of which it draws different ones."""
    config = url_config(tmp_path, model, served.url, model=str(model))
    (record,) = run(config, Reporter(quiet=True))["stages"]
    assert record["generation"]["answered"] == [f"{model}@main"]
    assert record["pairs"] == len(pairs_of(tmp_path / "run/stage-1-s1")) > 2
    lines = (tmp_path / "run/stage-1-s1/source/samples.jsonl").read_text().splitlines()[1:]
    groups = [json.loads(line)["texts"] for line in lines]
    assert [len(group) for group in groups] == [3] * 10
    assert {type(text) for group in groups for text, _ in group} == {str}
    assert {finished for group in groups for _, finished in group} == {True, False}


def test_one_request_at_a_time_gives_the_same_answers_again(tmp_path, model, served):
    """Its seed is that of the process, so that two requests at a time would mix."""
    drawn = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        engine = {"model": str(model), "requests": 1}
        drawn.append(generation.sample(asked(folder, model, served.url, generation=engine), 3))
    assert drawn[0] == drawn[1]
    assert any(len(set(group)) > 1 for group in drawn[0])


def test_chat_completions(tmp_path, model, served):
    config = url_config(tmp_path, model, served.url, model=str(model), api="chat")
    words = [f"word{n}" for n in range(10)]
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": word}]} for word in words])
    (record,) = run(config, Reporter(quiet=True))["stages"]
    assert record["pairs"] > 2
    assert "POST /v1/chat/completions" in served.log.read_text()


def test_a_model_that_it_does_not_serve(tmp_path, model, served):
    with pytest.raises(UserError, match=r"answered 400 Bad Request: .*Server is pinned to .*; requested 'other'"):
        generation.sample(asked(tmp_path, model, served.url, generation={"model": "other"}), 2)
    with pytest.raises(UserError, match=r"generation\.model: is required: the server .* lists no model"):
        generation.sample(asked(tmp_path, model, served.url), 2)


def test_it_is_killed_and_another_one_answers_the_rest(tmp_path, model, monkeypatch):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    first = Serve(model, tmp_path / "first.txt")
    genuine = generation.os.fsync

    def kills(descriptor: int) -> None:
        genuine(descriptor)
        first.stop()

    engine = {"model": str(model), "requests": 1}
    with monkeypatch.context() as patch:
        patch.setattr(generation.os, "fsync", kills)
        with pytest.raises(UserError, match=r"cannot be reached: .*after 6 tries"):
            generation.sample(asked(tmp_path, model, first.url, generation=engine), 2)
    kept = (tmp_path / "source/samples.jsonl").read_text().splitlines()
    assert 2 <= len(kept) < 1 + len(PROMPTS)

    second = Serve(model, tmp_path / "second.txt")
    try:
        generation.sample(asked(tmp_path, model, second.url, generation=engine), 2)
    finally:
        second.stop()
    lines = (tmp_path / "source/samples.jsonl").read_text().splitlines()
    assert lines[: len(kept)] == kept
    assert len(lines) == 1 + len(PROMPTS)
    posts = (tmp_path / "second.txt").read_text().count("POST /v1/completions")
    assert posts == 2 * (len(PROMPTS) - len(kept) + 1)
