# SPDX-License-Identifier: MIT
"""OpenAI's API on top of Ollama's own, as Ollama translates it: requests one way, answers the other."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from datetime import datetime
from typing import Any

Json = dict[str, Any]

#: Options of a request, by Ollama's names.
OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "max_tokens": "num_predict",
    "max_completion_tokens": "num_predict",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
}


class Invalid(Exception):
    """A request that is none."""


def error(status: int, message: str) -> Json:
    kinds = {400: "invalid_request_error", 404: "not_found_error"}
    return {"error": {"message": message, "type": kinds.get(status, "api_error"), "param": None, "code": None}}


def options(request: Json) -> Json:
    found = {ours: request[theirs] for theirs, ours in OPTIONS.items() if request.get(theirs) is not None}
    stop = request.get("stop")
    if stop:
        found["stop"] = [stop] if isinstance(stop, str) else list(stop)
    return found


def from_chat(request: Json) -> Json:
    """A request to `/api/chat`."""
    if not request.get("messages"):
        raise Invalid("[] is too short - 'messages'")
    messages = []
    for message in request["messages"]:
        content = message.get("content")
        if isinstance(content, list):
            content = "\n".join(str(part.get("text", "")) for part in content if part.get("type") == "text")
        if not isinstance(content, str):
            raise Invalid(f"invalid message content type: {type(content).__name__}")
        messages.append({"role": message.get("role", "user"), "content": content})
    return {"model": request.get("model", ""), "messages": messages, "options": options(request)}


def from_completion(request: Json) -> Json:
    """A request to `/api/generate`."""
    prompt = request.get("prompt") or ""
    if not isinstance(prompt, str):
        raise Invalid("json: cannot unmarshal array into Go struct field CompletionRequest.prompt of type string")
    return {"model": request.get("model", ""), "prompt": prompt, "options": options(request)}


def usage(part: Json) -> Json:
    prompt, completion = int(part.get("prompt_eval_count", 0)), int(part.get("eval_count", 0))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def created(part: Json) -> int:
    return int(datetime.fromisoformat(part["created_at"].replace("Z", "+00:00")).timestamp())


def head(id_: str, kind: str, part: Json) -> Json:
    return {
        "id": id_,
        "object": kind,
        "created": created(part),
        "model": part["model"],
        "system_fingerprint": "fp_ollama",
    }


def chat_completion(id_: str, part: Json) -> Json:
    choice = {"index": 0, "message": part["message"], "finish_reason": part.get("done_reason")}
    return {**head(id_, "chat.completion", part), "choices": [choice], "usage": usage(part)}


def completion(id_: str, part: Json) -> Json:
    choice = {"text": part["response"], "index": 0, "finish_reason": part.get("done_reason")}
    return {**head(id_, "text_completion", part), "choices": [choice], "usage": usage(part)}


def chunks(id_: str, parts: Iterator[Json], chat: bool, with_usage: bool) -> Iterator[Json]:
    """A stream's events; with `with_usage` one more, without a choice, that has the figures."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    for part in parts:
        reason = part.get("done_reason")
        choice = (
            {"index": 0, "delta": part["message"], "finish_reason": reason}
            if chat
            else {"text": part["response"], "index": 0, "finish_reason": reason}
        )
        yield {**head(id_, kind, part), "choices": [choice]}
        if part["done"] and with_usage:
            yield {**head(id_, kind, part), "choices": [], "usage": usage(part)}


def embeddings(answer: Json, encoding: str) -> Json:
    """A list of embeddings; OpenAI's own client asks for base64."""
    data = []
    for index, vector in enumerate(answer["embeddings"]):
        packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "embedding": packed if encoding == "base64" else vector, "index": index})
    count = answer["prompt_eval_count"]
    return {
        "object": "list",
        "data": data,
        "model": answer["model"],
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def model(name: str, modified: datetime) -> Json:
    owner = name.partition("/")[0] if "/" in name else "library"
    return {"id": name, "object": "model", "created": int(modified.timestamp()), "owned_by": owner}
