"""An OpenAI-compatible server on loopback that samples from a tiny model; faults are chosen by the test.

    with TinyServer(model) as server:
        server.url, server.requests                # the address; the body of every answered POST

It answers as the API's reference says: n choices, a seed that gives the same ones, finish reasons.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Fault = Callable[["Handler", dict[str, Any]], bool]  # answers the request itself and returns True, or False


class TinyServer(ThreadingHTTPServer):
    """Serves the model in a folder under `name`, until the block ends."""

    daemon_threads = True

    def __init__(self, model: Path, *, name: str = "tiny", key: str | None = None, fault: Fault | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.key, self.fault = name, key, fault
        self.listed, self.most_choices = [name], 10**6
        self.requests: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model).eval()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> TinyServer:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @torch.no_grad()
    def sampled(self, text: str, body: dict[str, Any], number: int) -> tuple[str, str]:
        """(text, finish reason) of choice `number`, by a generator of its own."""
        draw = torch.Generator().manual_seed(body.get("seed", 0) + number)
        prompt = self.tokenizer(text)["input_ids"]
        ids = list(prompt)
        while len(ids) - len(prompt) < body["max_tokens"]:
            p = (self.model(torch.tensor([ids])).logits[0, -1] / body["temperature"]).softmax(-1)
            ordered, order = p.sort(descending=True)
            ordered[ordered.cumsum(0) - ordered >= body["top_p"]] = 0
            token = int(order[torch.multinomial(ordered, 1, generator=draw)])
            if token == self.tokenizer.eos_token_id:
                return self._text(prompt, ids), "stop"
            ids.append(token)
        return self._text(prompt, ids), "length"

    def _text(self, prompt: list[int], ids: list[int]) -> str:
        before, whole = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, ids))
        return whole[len(before) :]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: TinyServer
    counted = False  # whether this request is one of `at_once`

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def reply(self, status: int, value: Any, **headers: str) -> bool:
        """Answer with JSON, or with text as it is."""
        self._ended()  # before the client can read the answer, and send its next request
        content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)
        return True

    def refused(self, status: int, message: str) -> bool:
        """Answer with an error in the API's form."""
        return self.reply(status, {"error": {"message": message, "type": "invalid_request_error"}})

    def _wrong_key(self) -> bool:
        sent, key = self.headers.get("Authorization"), self.server.key
        return key is not None and sent != f"Bearer {key}" and self.refused(401, f"Incorrect API key provided: {sent}")

    def do_GET(self) -> None:
        if self._wrong_key():
            return
        listed = [{"id": name, "object": "model"} for name in self.server.listed]
        self.reply(200, {"object": "list", "data": listed})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        self._began()
        try:
            if self._wrong_key() or (server.fault is not None and server.fault(self, body)):
                return
            if body["model"] != server.name:
                self.refused(404, f"The model `{body['model']}` does not exist")
                return
            self._answer(body)
        finally:
            self._ended()

    def _began(self) -> None:
        server, self.counted = self.server, True
        with server.lock:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)

    def _ended(self) -> None:
        if self.counted:
            self.counted = False
            with self.server.lock:
                self.server.at_once -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        server, chat = self.server, self.path == "/v1/chat/completions"
        text = body.get("prompt")
        if chat:
            text = server.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        choices = []
        for number in range(min(body["n"], server.most_choices)):
            answer, reason = server.sampled(text, body, number)
            what = {"message": {"role": "assistant", "content": answer}} if chat else {"text": answer}
            choices.append({"index": number, "finish_reason": reason, **what})
        with server.lock:
            server.requests.append(body)
        self.reply(200, {"object": "text_completion", "model": f"{server.name}@1", "choices": choices})
