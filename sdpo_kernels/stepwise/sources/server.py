"""An OpenAI-compatible server over HTTP, by Python's own library: GET /models, POST /completions, with retries.

    server = Server(GenerationSettings(url="http://localhost:8000/v1"))
    server.models()                                                     # ["my-model"]
    server.post("/completions", {"model": "my-model", "prompt": "2 + 2 ="})["choices"][0]["text"]

The key of `api_key_env` goes into the header, never into a message or a file.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from typing import Any

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.settings.generation import GenerationSettings

TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; the wait doubles from try to try
_AGAIN = (408, 409, 425, 429, *range(500, 600))  # statuses of a server that may answer later
_SHOWN = 300  # letters of a server's message


class Unreachable(UserError):
    """The server did not answer, or only said that it cannot at present, after all tries."""


class Refused(UserError):
    """The server answered with an error that another try would not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """The server that the settings name. UserError if the variable of `api_key_env` is not set."""

    def __init__(self, settings: GenerationSettings, tries: int | None = None, longest: float = math.inf) -> None:
        self.url, self.timeout, self.tries = settings.url, min(settings.timeout, longest), tries or TRIES
        self.name = f"the server {self.url}"
        self.key: str | None = None
        if settings.api_key_env is not None:
            self.key = os.environ.get(settings.api_key_env)
            if not self.key:
                text = "is the name of an environment variable that is not set, or empty"
                raise UserError(f"generation.api_key_env: {settings.api_key_env} {text}")
        self._open = urllib.request.build_opener(_NoRedirect).open

    def models(self) -> list[str]:
        """The names of the models that it lists; none if it has no list. Unreachable, or UserError for a wrong key."""
        try:
            reply = self._ask("/models", None)
        except Refused as error:
            if error.status in (401, 403):
                raise
            return []
        listed = reply.get("data") if isinstance(reply, dict) else None
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        return [entry["id"] for entry in entries if isinstance(entry.get("id"), str)]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that it answers. Unreachable or Refused."""
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None) -> Any:
        """Ask up to `tries` times; the wait doubles, or is what the server asks for."""
        wait = FIRST_WAIT
        for left in reversed(range(self.tries)):
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                problem = self._problem(error)
                # a server without a list may fail at it: that is no reason to wait
                if error.code not in _AGAIN or (body is None and error.code == 500):
                    raise Refused(problem, error.code) from None
                asked = error.headers.get("Retry-After", "")
                pause = float(asked) if asked.isdecimal() else wait
            except (OSError, http.client.HTTPException) as error:  # refused, broken, too slow
                reason = getattr(error, "reason", None) or error
                slow = isinstance(reason, TimeoutError)
                said = f"no answer within {self.timeout:g} s (generation.timeout)" if slow else str(reason)
                problem, pause = f"{self.name} cannot be reached: {said or type(error).__name__}", wait
            if left:
                time.sleep(min(pause, LONGEST_WAIT))
                wait *= 2
        raise Unreachable(f"{problem}" + (f" (after {self.tries} tries)" if self.tries > 1 else ""))

    def _once(self, path: str, body: bytes | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "sdpo_kernels"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}{path}", body, headers)
        end = time.monotonic() + self.timeout
        with self._open(request, timeout=self.timeout) as reply:
            content = _read(reply, end)
        try:
            return json.loads(content)
        except ValueError:
            text = self._safe(content.decode(errors="replace"))
            raise Refused(f"{self.name} answered {path} with something that is not JSON: {text!r}", 200) from None

    def _problem(self, error: urllib.error.HTTPError) -> str:
        """The status and what the server says about it."""
        try:
            text = error.read(10_000).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        if error.code in range(300, 400):
            text = f"is moved to {error.headers.get('Location')}: set generation.url"
        hint = "; set generation.api_key_env" if error.code == 401 and self.key is None else ""
        return f"{self.name} answered {error.code} {error.reason}: {self._safe(' '.join(text.split()))}{hint}"

    def _safe(self, text: str) -> str:
        """A server's text for a message: cut, and without the key, which some servers repeat."""
        return (text.replace(self.key, "<key>") if self.key else text)[:_SHOWN]


def _read(reply: Any, end: float) -> bytes:
    """The whole content. TimeoutError at `end`, by `time.monotonic`: a socket's own timeout starts anew at every byte.

    Gateways send spaces to a client that waits for a slow model.
    """
    found = []
    while piece := reply.read1(1 << 16):
        found.append(piece)
        if time.monotonic() > end:
            raise TimeoutError
    if reply.length:  # read1 does not say that the connection broke
        raise http.client.IncompleteRead(b"".join(found), reply.length)
    return b"".join(found)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection is an error: the key would go to another address, and a POST would become a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None
