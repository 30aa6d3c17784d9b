"""Answers of an OpenAI-compatible server: of the model that it serves, which need not be the policy.

A prompt is one request for all of its answers; for answers that the server does not give at once, it is asked again. A
few requests are under way at a time, and each prompt's answers are kept as soon as they are there.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.settings.generation import GenerationSettings
from sdpo_kernels.stepwise.sources.context import SourceContext
from sdpo_kernels.stepwise.sources.engine import Answers, Batch, Completion, Prompt, Row
from sdpo_kernels.stepwise.sources.server import Refused, Server, Unreachable

CHECK_SECONDS = 10.0  # that a server has to list its models before the run starts


def check_url(settings: GenerationSettings, prompts: Sequence[PromptRow]) -> tuple[str, list[str]]:
    """Which model answers, for the user, and warnings.

    A server that cannot be reached is a warning: it may be started later, or have been stopped after a stage whose
    answers are kept. UserError: it refuses the key, its model cannot be chosen, or `api: chat` with plain prompts.
    """
    if settings.api == "chat" and (plain := next((row for row in prompts if not row.is_conversational), None)):
        raise UserError(
            f"generation.api: was 'chat', but {plain.where} is plain text, must be messages; or use api: completions"
        )
    server, warnings, model = Server(settings, tries=1, longest=CHECK_SECONDS), [], settings.model
    try:
        model = model_of(server, settings)
        known = server.models()
        if known and model not in known:
            warnings.append(f"generation.model: was {model!r}; the server lists {', '.join(known[:5])}")
    except Unreachable as error:
        warnings.append(f"{error}; it must answer when the stage samples")
    return (
        f"answers come from the server {settings.url}, model {model or 'not known yet'}, not from the policy",
        warnings,
    )


def model_of(server: Server, settings: GenerationSettings) -> str:
    """The name by which the server knows the model. UserError if none is given and it does not list exactly one."""
    if settings.model is not None:
        return settings.model
    known = server.models()
    if len(known) == 1:
        return known[0]
    found = f"lists {len(known)}: {', '.join(known[:10])}" if known else "lists no model"
    raise UserError(f"generation.model: is required: the server {settings.url} {found}")


class UrlEngine:
    """Asks a server for every prompt's answers."""

    column = "texts"

    def __init__(self, ctx: SourceContext, count: int) -> None:
        self.ctx, self.count, self.size = ctx, count, count
        self.settings = ctx.settings.generation
        self.server = Server(self.settings)
        self.model = model_of(self.server, self.settings)

    def depends_on(self) -> dict[str, Any]:
        """The model's name: what it stands for, the server alone knows."""
        return {"engine": "url", "model": self.model, "api": self.settings.api}

    def answer(self, batches: Sequence[Batch]) -> Generator[Answers, None, None]:
        """Ask with a few threads; the first error ends all, and what is under way then is lost."""
        waiting: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        found: queue.SimpleQueue[Answers | Exception] = queue.SimpleQueue()
        for batch in batches:
            waiting.put(batch)
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    found.put(self._answers(waiting.get_nowait(), stop))
                except queue.Empty:
                    return
                except Exception as error:  # goes to the thread that waits
                    stop.set()
                    found.put(error)

        # daemons: Ctrl-C must not wait for a server that thinks
        for _ in range(min(self.settings.requests, len(batches))):
            threading.Thread(target=work, name="generation", daemon=True).start()
        try:
            for _ in batches:
                answers = found.get()
                if isinstance(answers, Exception):
                    raise answers
                yield answers
        finally:
            stop.set()

    def completion(self, prompt: Prompt, row: Row) -> Completion:
        """The completion of a row [text, finished]."""
        text, finished = row
        return Completion([], text, finished)

    def record(self, by: Sequence[str]) -> dict[str, Any]:
        """The address, the model's name, and the names that the server gave in its answers."""
        return {"engine": "url", "url": self.settings.url, "model": self.model, "answered": list(by)}

    def _answers(self, batch: Batch, stop: threading.Event) -> Answers:
        """All answers to one prompt."""
        row, rows, names = batch.prompts[0].row, list[Row](), set[str]()
        assert row is not None  # sources whose prompts have none do not take a server
        what = self._prompt(row)
        while len(rows) < self.count and not stop.is_set():
            # servers count on from the seed for further answers, as is done here
            request = what | {
                "model": self.model,
                "n": self.count - len(rows),
                "temperature": self.ctx.settings.temperature,
                "top_p": self.ctx.settings.top_p,
                "max_tokens": self.ctx.settings.max_new_tokens,
                "seed": (batch.seed >> 2) + len(rows),  # some servers take 31 bits
            }
            try:
                reply = self.server.post(self.path, request)
            except Refused as error:
                raise UserError(f"{row.where}: {error}{_advice(error, self.settings)}") from error
            got = [_choice(choice) for choice in _choices(reply)]
            if not got or None in got:
                raise UserError(f"{row.where}: {self.server.name} gave no answer as {self.path} has it: {reply!r:.300}")
            rows += got[: self.count - len(rows)]
            names.add(str(reply.get("model") or self.model))
        return Answers(batch.number, rows, ", ".join(sorted(names)))

    @property
    def path(self) -> str:
        """The part of the API that is used."""
        return "/chat/completions" if self.settings.api == "chat" else "/completions"

    def _prompt(self, row: PromptRow) -> dict[str, Any]:
        """The prompt as the API takes it."""
        if self.settings.api == "chat":
            tools = {"tools": row.tools} if row.tools else {}
            options = {"chat_template_kwargs": row.chat_template_kwargs} if row.chat_template_kwargs else {}
            return {"messages": row.prompt, **tools, **options}

        # the server adds the start token, as our tokenizer does to plain text; a template may have written it as well
        text, tokenizer = row.text(self.ctx.tokenizer), self.ctx.tokenizer
        start = tokenizer.bos_token
        if row.is_conversational and start and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
            text = text.removeprefix(start)
        return {"prompt": text}


def _choices(reply: Any) -> list[Any]:
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    return choices if isinstance(choices, list) else []


def _choice(choice: Any) -> Row | None:
    """[text, whether the model ended it] of one choice; None if it has neither text nor a message."""
    if not isinstance(choice, Mapping):
        return None
    message = choice.get("message")
    text = message.get("content") if isinstance(message, Mapping) else choice.get("text")
    if text is None and isinstance(message, Mapping):
        text = ""  # a refusal, or a call of a tool: left out like any empty answer
    return [text, choice.get("finish_reason") == "stop"] if isinstance(text, str) else None


def _advice(error: Refused, settings: GenerationSettings) -> str:
    """What to change after an answer that says that there is no such thing."""
    if error.status not in (404, 405) or settings.api == "chat":
        return ""
    return "; check generation.model; if the server has chat completions alone, set generation.api: chat"
