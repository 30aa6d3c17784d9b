"""`generation` of a source: its defaults, its engines, and the error line of every mistake."""

from __future__ import annotations

import re

import pytest

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.settings.generation import GenerationSettings
from sdpo_kernels.stepwise.settings.run_file import dump_config, load_config

RANKED = "kind: ranked, judge: 'm:f'"


@pytest.fixture
def loaded(tmp_path):
    """The settings of a run whose stage has a source with `text`, and the run's own `more`."""

    def load(text: str, more: str = ""):
        path = tmp_path / "run.yaml"
        path.write_text(
            f"model: org/name\noutput_dir: {tmp_path}/run\n{more}stages:\n"
            f"  - {{name: a, prompts: p.jsonl, source: {{{text}}}}}\n"
        )
        return load_config(path)

    return load


def engine_of(config) -> GenerationSettings:
    return config.stages[0].source.generation


def test_transformers_is_the_default(loaded):
    assert engine_of(loaded(RANKED)) == engine_of(loaded(f"{RANKED}, generation: {{}}")) == GenerationSettings()
    assert engine_of(loaded(f"{RANKED}, generation: null")).engine == "transformers"
    assert engine_of(loaded(f"{RANKED}, generation: {{engine: vllm}}")).engine == "vllm"


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://example.org", "https://example.org/v1"),
        ("https://example.org/openai/v1/", "https://example.org/openai/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
    ],
)
def test_a_url_is_an_engine_and_the_base_address_of_the_api(loaded, url, base):
    found = engine_of(loaded(f"{RANKED}, generation: {{url: '{url}'}}"))
    assert (found.engine, found.url) == ("url", base)


@pytest.mark.parametrize(
    "text",
    [
        "url: 'http://localhost/v1', model: m, api_key_env: KEY, api: chat, requests: 2, timeout: 5",
        "engine: vllm, python: ~/vllm/bin/python, options: {tensor_parallel_size: 2, gpu_memory_utilization: 0.5}",
    ],
)
def test_a_dumped_config_reads_back_equal(loaded, tmp_path, text):
    config = loaded(f"{RANKED}, generation: {{{text}}}")
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert "~" not in str(engine_of(config).python)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("engine: sglang", "engine: was 'sglang', must be 'transformers', 'vllm' or 'url'"),
        ("engine: url", "url: is required with engine: url"),
        ("engine: vllm, url: 'http://h'", "engine: was 'vllm' together with url, must be one of the two"),
        ("engine: transformers, url: 'http://h'", "engine: was 'transformers' together with url, must be one of"),
        ("engine: vllm, model: m", "model: was 'm', but only url uses it (engine is vllm)"),
        ("requests: 3", "requests: was 3, but only url uses it (engine is transformers)"),
        ("url: 'http://h', python: p", "python: was 'p', but only engine: vllm uses it (engine is url)"),
        ("url: 'http://h', options: {a: 1}", "options: was {'a': 1}, but only engine: vllm uses it"),
        ("url: 'ftp://h'", "url: was 'ftp://h', must be the base address of a server, such as http://localhost:8000"),
        ("url: 'localhost:8000'", "url: was 'localhost:8000', must be the base address"),
        ("url: 'http://h:port'", "url: was 'http://h:port', must be the base address"),
        ("url: 'http://h/v1?k=1'", "url: has a part after ?, must be the base address"),
        ("url: 'http://h/v1/completions'", "url: was 'http://h/v1/completions', must be the base address"),
        ("url: 'http://h', api: responses", "api: was 'responses', must be 'completions' or 'chat'"),
        ("url: 'http://h', requests: 0", "requests: was 0, must be greater than or equal to 1"),
        ("url: 'http://h', timeout: 0", "timeout: was 0, must be greater than 0"),
        ("url: 'http://h', key: k", "key: unknown key"),
        ("engine: vllm, options: {seed: 1, dtype: half}", "options: has seed, which must be left out: the run decides"),
    ],
)
def test_a_mistake_is_one_clear_line(loaded, text, expected):
    with pytest.raises(UserError, match=re.escape(f"stages.0.source.generation.{expected}")) as found:
        loaded(f"{RANKED}, generation: {{{text}}}")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("url: 'http://h', api_key_env: sk-1234", "sk-1234"),
        ("url: 'http://user:hunter2@h/v1'", "hunter2"),
    ],
)
def test_what_may_be_a_key_is_not_shown(loaded, text, secret):
    with pytest.raises(UserError, match=r"api_key_env|contains a user or password") as found:
        loaded(f"{RANKED}, generation: {{{text}}}")
    assert secret not in str(found.value)


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        (f"{RANKED}, batch_size: 4, generation: {{engine: vllm}}", "", "batch_size: was 4, but only engine: transf"),
        (
            "kind: self_augmented, pairs: 3, generation: {url: 'http://h'}", "",
            "generation.url: was 'http://h/v1', must be left out with this kind: the policy itself rewrites",
        ),
        (
            "kind: active, judge: 'm:f', acquire: 3, generation: {url: 'http://h'}",
            "policy: initial\nreference: initial\n",
            "generation.url: was 'http://h/v1', must be left out with this kind: entropy and rewards",
        ),
        (
            "kind: self_augmented, pairs: 3, generation: {engine: vllm}", "reference: ema\n",
            "generation.engine: was 'vllm', must be transformers with reference: ema",
        ),
    ],
)  # fmt: skip
def test_engines_that_do_not_fit_the_source(loaded, text, more, expected):
    with pytest.raises(UserError, match=re.escape(f"stages.0.source.{expected}")):
        loaded(text, more)
