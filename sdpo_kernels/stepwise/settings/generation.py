"""What samples the answers that a stage's pairs are generated from: `generation: {…}` in its `source`."""

from __future__ import annotations

import os
import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from sdpo_kernels.stepwise.settings.mistakes import SettingErrors, show
from sdpo_kernels.stepwise.settings.types import Count, Positive, Section, Text

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# the settings that one engine alone reads
_OF_ENGINE = {
    "url": ("url", "model", "api_key_env", "api", "requests", "timeout"),
    "vllm": ("python", "options"),
}

# of vllm.LLM: what the driver passes itself, and what would give other answers than the policy's
_OWN_OPTIONS = (
    "model", "tokenizer", "tokenizer_mode", "skip_tokenizer_init", "trust_remote_code", "revision",
    "tokenizer_revision", "seed", "enable_lora", "quantization", "load_format", "hf_overrides", "runner", "convert",
)  # fmt: skip


class GenerationSettings(Section):
    """What samples the answers.

    Args:
        engine: 'transformers': `generate` of transformers, in this process. 'vllm': vLLM, in a process of its own that
            has ended before the stage trains. Both sample from the policy. With `url` it is 'url'.
        url: Base address of an OpenAI-compatible server, such as http://localhost:8000/v1. The answers are those of the
            model that it serves.
        model: The name by which the server knows the model. By default the one that it lists, if it is one.
        api_key_env: Name of the environment variable that holds the server's key.
        api: 'completions' sends the prompt as text, rendered with the run's chat template. 'chat' sends messages, for a
            server that has chat completions alone; its own template renders them.
        requests: Requests to the server at a time.
        timeout: Seconds that the server has for one request.
        python: The Python that has vLLM, if it is not the one that runs `sdpo`.
        options: Further arguments of vllm.LLM, such as {tensor_parallel_size: 2}.
    """

    engine: Literal["transformers", "vllm", "url"] = "transformers"
    url: Text | None = None
    model: Text | None = None
    api_key_env: Text | None = None
    api: Literal["completions", "chat"] = "completions"
    requests: Count = 8
    timeout: Positive = 600.0
    python: Text | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _url_is_an_engine(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("url") is not None and "engine" not in value:
            return {**value, "engine": "url"}
        return value

    @field_validator("url")
    @classmethod
    def _base_address(cls, url: str | None) -> str | None:
        return url if url is None else _checked_address(url)

    @field_validator("api_key_env")
    @classmethod
    def _name_of_a_variable(cls, name: str | None) -> str | None:
        # the text is not shown: somebody may have written the key itself
        if name is not None and not _VARIABLE.fullmatch(name):
            raise ValueError("must be the name of an environment variable, such as OPENAI_API_KEY, not the key itself")
        return name

    @field_validator("python")
    @classmethod
    def _with_home(cls, path: str | None) -> str | None:
        return path and os.path.expanduser(path)

    @field_validator("options")
    @classmethod
    def _not_the_drivers(cls, options: dict[str, Any]) -> dict[str, Any]:
        if own := [name for name in _OWN_OPTIONS if name in options]:
            raise ValueError(f"has {', '.join(own)}, which must be left out: the run decides it")
        return options

    @model_validator(mode="after")
    def _one_engine(self) -> GenerationSettings:
        if self.engine == "url" and self.url is None:
            raise SettingErrors([("url", "is required with engine: url")])
        if self.engine != "url" and self.url is not None:
            raise SettingErrors([("engine", f"was {show(self.engine)} together with url, must be one of the two")])

        mistakes = []
        for engine, names in _OF_ENGINE.items():
            for name in names if engine != self.engine else ():
                if (value := getattr(self, name)) != GenerationSettings.model_fields[name].get_default(
                    call_default_factory=True
                ):
                    needs = "url" if engine == "url" else f"engine: {engine}"
                    mistakes.append((name, f"was {show(value)}, but only {needs} uses it (engine is {self.engine})"))
        if mistakes:
            raise SettingErrors(mistakes)
        return self


def _checked_address(url: str) -> str:
    """The address without a slash at its end, and with /v1 if it has no path. ValueError for one that cannot be."""
    must = "must be the base address of a server, such as http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        port_is_right = parts.port is None or parts.port > 0
    except ValueError:
        raise ValueError(f"was {show(url)}, {must}") from None

    # a password would end up in the run's files
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"contains a user or password, {must}; a key goes into the variable that api_key_env names")
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_right:
        raise ValueError(f"was {show(url)}, {must}")
    if parts.query or parts.fragment:
        raise ValueError(f"has a part after {'?' if parts.query else '#'}, {must}")
    if parts.path.endswith(("/completions", "/models")):
        raise ValueError(f"was {show(url)}, {must}: the part of the API is added to it")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
