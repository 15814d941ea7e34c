# SPDX-License-Identifier: MIT
"""A stand-in for Ollama: its HTTP API in front of a real llama.cpp, where the original image can't be had.

It runs inside the image, from the standard library alone; models are run by runner.py in a process of their own, as
Ollama does it. Models come from a folder of the image instead of ollama.com, so `tiny` is all that can be pulled, and
with GPULAB_STAND_IN_MODELS=away not even that; a GGUF file can be made a model of. Of Ollama's scheduling it has the
number of models and of requests at once, the queue and its limit, and how long a model stays; a model is on the GPU as
a whole or not at all, and prompts are put together without the model's own template.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from rehearsal.registry.ollama import openai_api
    from rehearsal.registry.ollama.gguf_file import Gguf
    from rehearsal.registry.ollama.store import Json, Model, Refused, Store, full_name, human
else:
    import openai_api
    from store import Json, Model, Refused, Store, full_name, human

VERSION = "0.33.0+simulated"
HOME = Path(__file__).parent
AVAILABLE = HOME / "available"
RUNNER = HOME / "runner.py"
MIB = 1024 * 1024
FOREVER = timedelta(days=36500)
UNIT = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
#: Bytes of an element of the context, by OLLAMA_KV_CACHE_TYPE.
CACHE_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
BUSY = "server busy, please try again.  maximum pending requests exceeded"
#: Options of a request that llama.cpp's server knows by the same names.
SAME = ("seed", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "frequency_penalty", "presence_penalty")


def log(message: str, **values: object) -> None:
    words = " ".join(f"{key}={json.dumps(str(value)) if ' ' in str(value) else value}" for key, value in values.items())
    stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
    print(f'time={stamp} level=INFO msg="{message}" {words}'.rstrip(), file=sys.stderr, flush=True)


def duration(value: object) -> timedelta:
    """Ollama's keep-alive: seconds as a number, or Go's "5m" and "1h30m"; a negative one is for ever."""
    if isinstance(value, str) and not re.fullmatch(r"-?\d+(\.\d+)?", value):
        sign = -1 if value.startswith("-") else 1
        parts = re.findall(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)", value)
        if not parts or "".join(number + unit for number, unit in parts) != value.lstrip("+-"):
            raise Refused(400, f'time: invalid duration "{value}"')
        seconds = sign * sum(float(number) * UNIT[unit] for number, unit in parts)
    else:
        seconds = float(str(value))
    return FOREVER if seconds < 0 else timedelta(seconds=seconds)


def setting(name: str, otherwise: int) -> int:
    """A whole number of the environment."""
    text = os.environ.get(name, "").strip()
    return int(text) if text.isdigit() else otherwise


def stamp(moment: datetime) -> str:
    return moment.astimezone().isoformat(timespec="microseconds")


def free_device_bytes() -> int:
    """What the first card has left, by NVML; 0 when there is none to be talked to, and the CPU is used instead."""
    with contextlib.suppress(OSError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0:
            device, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()
            error = nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
            error = error or nvml.nvmlDeviceGetMemoryInfo(device, memory)
            nvml.nvmlShutdown()
            return 0 if error else int(memory[1])
    return 0


@dataclass
class Runner:
    """A model in memory: the process that serves it, and until when it stays."""

    model: Model
    process: subprocess.Popen[str]
    port: int
    vram: int
    size: int
    context: int
    keep: timedelta
    #: Requests in work: a model is not unloaded under them.
    busy: int = 0
    expires: datetime = field(default_factory=lambda: datetime.now(UTC))

    def touch(self, keep: timedelta) -> None:
        self.keep = keep
        self.expires = datetime.now(UTC) + keep

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


class Scheduler:
    """Loads models on demand and unloads those whose time is over, or whose place another one needs."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.lock = threading.Condition(threading.RLock())
        self.runners: dict[str, Runner] = {}
        self.default_keep = duration(os.environ.get("OLLAMA_KEEP_ALIVE") or "5m")
        self.context = setting("OLLAMA_CONTEXT_LENGTH", 0) or 4096
        self.parallel = setting("OLLAMA_NUM_PARALLEL", 0) or 1
        self.most = setting("OLLAMA_MAX_LOADED_MODELS", 0) or 3
        self.queue = setting("OLLAMA_MAX_QUEUE", 512)
        self.overhead = setting("OLLAMA_GPU_OVERHEAD", 0)
        self.cache = CACHE_BYTES.get(os.environ.get("OLLAMA_KV_CACHE_TYPE") or "f16", 2.0)
        self.waiting = 0
        threading.Thread(target=self._expire, daemon=True).start()

    def keep_of(self, request: Json) -> timedelta:
        return self.default_keep if request.get("keep_alive") is None else duration(request["keep_alive"])

    def running(self) -> list[Runner]:
        with self.lock:
            for name in [name for name, runner in self.runners.items() if runner.process.poll() is not None]:
                del self.runners[name]
            return list(self.runners.values())

    def get(self, name: str, request: Json, busy: int = 0) -> tuple[Runner, int]:
        """The runner of a model, and how long loading it took (nanoseconds); `busy` requests begin with it.

        Raises:
            Refused: there is no such model, it cannot be loaded, or too many requests wait already.
        """
        started = time.monotonic_ns()
        with self.lock:
            keep = self.keep_of(request)
            model = self.store.get(name)
            context = int((request.get("options") or {}).get("num_ctx") or self.context)
            # A model is not asked for more than it was trained with.
            context = min(context, model.gguf.of_architecture("context_length") or context)
            runner = self._place(model, context, busy)
            if runner is None:
                if self.waiting >= self.queue:
                    raise Refused(503, BUSY)
                self.waiting += 1
                try:
                    while (runner := self._place(model, context, busy)) is None:
                        self.lock.wait()
                finally:
                    self.waiting -= 1
            runner.busy += busy
            runner.touch(keep)
            return runner, time.monotonic_ns() - started

    def _place(self, model: Model, context: int, busy: int) -> Runner | None:
        """A runner that has room for `busy` more requests; None: somebody has to finish first."""
        running = self.running()
        runner = self.runners.get(model.name)
        if runner is not None and (runner.context, runner.model.digest) == (context, model.digest):
            return runner if not busy or runner.busy < self.parallel else None
        if runner is not None:
            if runner.busy:
                return None
            self.unload(model.name)
        elif len(running) >= self.most:
            idle = [each for each in running if not each.busy]
            if not idle:
                return None
            self.unload(min(idle, key=lambda each: each.expires).model.name)
        runner = self.runners[model.name] = self._load(model, context)
        return runner

    def done(self, runner: Runner) -> None:
        """One request has ended."""
        with self.lock:
            runner.busy -= 1
            runner.touch(runner.keep)
            self.lock.notify_all()

    def unload(self, name: str) -> None:
        with self.lock:
            if runner := self.runners.pop(full_name(name), None):
                runner.stop()
                self.lock.notify_all()
                log("unloaded (simulated)", model=name)

    def _load(self, model: Model, context: int) -> Runner:
        size = model_bytes(model.gguf, model.size, context * self.parallel, self.cache)
        on_gpu = free_device_bytes() - self.overhead >= size
        argv = [sys.executable, str(RUNNER), str(model.weights), *map(str, (context, self.parallel, size * on_gpu))]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            ready = json.loads(process.stdout.readline())
        except json.JSONDecodeError:
            process.kill()
            raise Refused(500, "llama runner process has terminated: exit status 1") from None
        log("loaded (simulated)", model=model.name, library="CUDA" if ready["vram"] else "cpu", vram=ready["vram"])
        return Runner(model, process, ready["port"], ready["vram"], size, context, self.default_keep)

    def _expire(self) -> None:
        while True:
            time.sleep(0.25)
            with self.lock:
                for runner in self.running():
                    if not runner.busy and runner.expires <= datetime.now(UTC):
                        self.unload(runner.model.name)


def model_bytes(gguf: Gguf, weights: int, context: int, cache_bytes: float) -> int:
    """Memory a loaded model takes: weights, key-value cache and buffers, in whole MiB. Buffers are a guess."""
    heads = gguf.of_architecture("attention.head_count", 1)
    of_keys = gguf.of_architecture("attention.head_count_kv", heads) / heads
    width = gguf.of_architecture("embedding_length") * of_keys
    cache = context * 2 * gguf.of_architecture("block_count") * width * cache_bytes
    return math.ceil((weights + cache + 192 * MIB) / MIB) * MIB


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    scheduler: Scheduler
    store: Store
    ids = itertools.count(1)

    def version_string(self) -> str:
        return "ollama-stand-in (simulated)"

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._head)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_DELETE(self) -> None:
        self._answer(self._delete)

    def _answer(self, method: Any) -> None:
        self.begun = self.taken = False
        try:
            method()
        except Refused as refused:
            if self.begun:
                raise
            if not self.taken and self.headers.get("Transfer-Encoding"):
                # What the client still sends is not the next request.
                self.close_connection = True
            of_openai = self.path.startswith("/v1/")
            self._json(
                openai_api.error(refused.status, str(refused)) if of_openai else {"error": str(refused)}, refused.status
            )
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    @property
    def place(self) -> str:
        return self.path.partition("?")[0]

    def _head(self) -> None:
        if self.place.startswith("/api/blobs/"):
            digest = self.place.rpartition("/")[2]
            if not self.store.blob(digest).is_file():
                raise Refused(404, f'blob "{digest}" not found')
        self._send(200, b"")

    def _get(self) -> None:
        match self.place:
            case "/":
                self._send(200, b"Ollama is running (simulated)", "text/plain; charset=utf-8")
            case "/api/version":
                self._json({"version": VERSION})
            case "/api/tags":
                self._json({"models": [tag(model) for model in self.store.models()]})
            case "/api/ps":
                self._json({"models": [loaded(runner) for runner in self.scheduler.running()]})
            case "/v1/models":
                models = [openai_api.model(model.name, model.modified) for model in self.store.models()]
                self._json({"object": "list", "data": models})
            case place if place.startswith("/v1/models/"):
                name = place.removeprefix("/v1/models/")
                self._json(openai_api.model(name, self.store.get(name).modified))
            case _:
                self._send(404, b"404 page not found", "text/plain")

    def _post(self) -> None:
        if self.place.startswith("/api/blobs/"):
            self._send(self.store.take(self.place.rpartition("/")[2], self._blocks()), b"")
            return
        request = self._body()
        name = str(request.get("model") or request.get("name") or "")
        match self.place:
            case "/api/pull":
                self._progress(self.store.pull(name), request)
            case "/api/create":
                self._progress(self.store.create(name, request), request)
            case "/api/copy":
                self.store.copy(str(request.get("source")), str(request.get("destination")))
                self._send(200, b"")
            case "/api/show":
                self._json(shown(self.store.get(name)))
            case "/api/generate":
                self._native(request, "response")
            case "/api/chat":
                self._native(request, "message")
            case "/api/embed":
                self._json(self._embed(name, request))
            case "/api/embeddings":
                answer = self._embed(name, {**request, "input": request.get("prompt") or ""})
                self._json({"embedding": answer["embeddings"][0]})
            case "/v1/chat/completions" | "/v1/completions" | "/v1/embeddings":
                self._openai(name, request)
            case _:
                self._send(404, b"404 page not found", "text/plain")

    def _delete(self) -> None:
        if self.place != "/api/delete":
            raise Refused(404, "not found")
        request = self._body()
        name = str(request.get("model") or request.get("name") or "")
        self.store.get(name)
        self.scheduler.unload(name)
        self.store.delete(name)
        self._send(200, b"")

    def _progress(self, messages: Iterator[Json], request: Json) -> None:
        if request.get("stream") is False:
            *_, last = messages
            self._json(last)
            return
        self._stream(messages)

    def _native(self, request: Json, key: str) -> None:
        parts = self._generate(request, key)
        if request.get("stream") is False or not self.has_prompt:
            self._json(whole(list(parts), key))
            return
        self._stream(parts)

    def _openai(self, name: str, request: Json) -> None:
        """OpenAI's API: not streamed unless it is asked for."""
        try:
            if self.place == "/v1/embeddings":
                encoding = str(request.get("encoding_format") or "float").lower()
                self._json(openai_api.embeddings(self._embed(name, request), encoding))
                return
            chat = self.place == "/v1/chat/completions"
            own = openai_api.from_chat(request) if chat else openai_api.from_completion(request)
        except openai_api.Invalid as invalid:
            raise Refused(400, str(invalid)) from None
        key, id_ = ("message", f"chatcmpl-{next(self.ids)}") if chat else ("response", f"cmpl-{next(self.ids)}")
        parts = self._generate(own, key)
        if request.get("stream"):
            with_usage = bool((request.get("stream_options") or {}).get("include_usage"))
            self._events(openai_api.chunks(id_, parts, chat, with_usage))
            return
        answer = whole(list(parts), key)
        self._json(openai_api.chat_completion(id_, answer) if chat else openai_api.completion(id_, answer))

    def _generate(self, request: Json, key: str) -> Iterator[Json]:
        """The parts of an answer. All that can be refused is, before the first of them is asked for."""
        started = time.monotonic_ns()
        name = str(request.get("model") or "")
        prompt = prompt_of(request, key)
        self.has_prompt = bool(prompt)
        if not prompt and self.scheduler.keep_of(request) == timedelta(0):
            self.store.get(name)
            self.scheduler.unload(name)
            return iter([part(name, key, "", done=True) | {"done_reason": "unload"}])
        runner, load = self.scheduler.get(name, request, busy=1 if prompt else 0)
        if not prompt:
            return iter([part(name, key, "", done=True) | {"done_reason": "load"}])
        return self._parts(runner, name, request, prompt, key, started, load)

    def _parts(
        self, runner: Runner, name: str, request: Json, prompt: str, key: str, started: int, load: int
    ) -> Iterator[Json]:
        own = runner.model.extras
        options = {**json.loads(own.get("parameters") or "{}"), **(request.get("options") or {})}
        system = request.get("system") or own.get("system")
        most = int(options.get("num_predict") or 64)
        wanted = {
            **{option: options[option] for option in SAME if option in options},
            # The newest part of a prompt that is longer than the context, of which a token takes a byte at least.
            "prompt": (f"{system}\n{prompt}" if system else prompt)[-max(runner.context - most - 8, 16) :],
            "n_predict": most,
            "stop": options.get("stop") or [],
            "stream": True,
        }
        try:
            for event in completion(runner.port, wanted):
                if not event.get("stop"):
                    yield part(name, key, event["content"])
                    continue
                timings = event["timings"]
                # Of llama.cpp's own clock, as are the durations; `prompt_n` is without what it still had in its cache.
                cached = timings.get("cache_n", 0)
                yield part(name, key, event.get("content", ""), done=True) | {
                    "done_reason": "length" if event.get("stop_type") == "limit" else "stop",
                    "total_duration": time.monotonic_ns() - started,
                    "load_duration": load,
                    "prompt_eval_count": timings["prompt_n"] + cached,
                    "prompt_eval_cached_count": cached,
                    "prompt_eval_duration": int(timings["prompt_ms"] * 1e6),
                    "eval_count": timings["predicted_n"],
                    "eval_duration": int(timings["predicted_ms"] * 1e6),
                }
        finally:
            self.scheduler.done(runner)

    def _embed(self, name: str, request: Json) -> Json:
        given = request.get("input")
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Refused(400, "invalid input type")
        started = time.monotonic_ns()
        runner, load = self.scheduler.get(name, request, busy=1)
        try:
            shortened = [text[: runner.context - 8] for text in texts]
            answer = ask_runner(runner.port, "/v1/embeddings", {"input": shortened}) if texts else {}
        finally:
            self.scheduler.done(runner)
        size = int(request.get("dimensions") or 0)
        return {
            "model": name,
            "embeddings": [unit(each["embedding"][: size or None]) for each in answer.get("data", [])],
            "total_duration": time.monotonic_ns() - started,
            "load_duration": load,
            "prompt_eval_count": (answer.get("usage") or {}).get("prompt_tokens", 0),
        }

    def _blocks(self) -> Iterator[bytes]:
        """The body, block by block, of whatever length."""
        self.taken = True
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return
        rest = int(self.headers.get("Content-Length") or 0)
        while rest > 0 and (block := self.rfile.read(min(rest, MIB))):
            rest -= len(block)
            yield block

    def _body(self) -> Json:
        try:
            body = json.loads(b"".join(self._blocks()) or b"{}")
        except ValueError as error:
            raise Refused(400, str(error)) from None
        if not isinstance(body, dict):
            raise Refused(400, "json: cannot unmarshal into Go value")
        return body

    def _stream(self, parts: Iterator[Json]) -> None:
        """One JSON object a line. Once the first line is out, an error can only be a line of its own."""
        first = next(parts)
        self._begin("application/x-ndjson")
        try:
            for each in itertools.chain([first], parts):
                self._chunk(json.dumps(each).encode() + b"\n")
        except Refused as refused:
            self._chunk(json.dumps({"error": str(refused)}).encode() + b"\n")
        self._chunk(b"")

    def _events(self, parts: Iterator[Json]) -> None:
        """Server-sent events, as OpenAI streams."""
        first = next(parts)
        self._begin("text/event-stream")
        for each in itertools.chain([first], parts):
            self._chunk(b"data: " + json.dumps(each).encode() + b"\n\n")
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _begin(self, kind: str) -> None:
        self.begun = True
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _json(self, value: Json, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json; charset=utf-8")

    def _send(self, status: int, data: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        status = args[1] if len(args) > 1 else ""
        print(f'[GIN] (simulated) {self.address_string()} "{self.command} {self.path}" {status}', file=sys.stderr)


def prompt_of(request: Json, key: str) -> str:
    if key == "response":
        return str(request.get("prompt") or "")
    return "\n".join(str(message.get("content", "")) for message in request.get("messages") or [])


def part(name: str, key: str, text: str, done: bool = False) -> Json:
    value: object = {"role": "assistant", "content": text} if key == "message" else text
    created = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return {"model": name, "created_at": created, key: value, "done": done}


def whole(parts: list[Json], key: str) -> Json:
    """An answer in one piece: its last part, with all that the parts say."""
    text = "".join(str(each[key]["content"] if key == "message" else each[key]) for each in parts)
    return parts[-1] | {key: {"role": "assistant", "content": text} if key == "message" else text}


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]


def completion(port: int, wanted: Json) -> Iterator[Json]:
    """The events of llama.cpp's own server."""
    with open_runner(port, "/completion", wanted) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def ask_runner(port: int, path: str, wanted: Json) -> Json:
    with open_runner(port, path, wanted) as answer:
        found: Json = json.load(answer)
        return found


def open_runner(port: int, path: str, wanted: Json) -> Any:
    """
    Raises:
        Refused: llama.cpp says no, or is gone.
    """
    url, kind = f"http://127.0.0.1:{port}{path}", {"Content-Type": "application/json"}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, json.dumps(wanted).encode(), kind))
    except urllib.error.HTTPError as error:
        raise Refused(500, error.read()[:500].decode(errors="replace")) from None
    except OSError:
        raise Refused(500, "model runner has unexpectedly stopped") from None


def details(model: Model) -> Json:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": model.gguf.architecture,
        "families": [model.gguf.architecture],
        "parameter_size": human(model.gguf.parameters),
        "quantization_level": model.gguf.file_type,
    }


def tag(model: Model) -> Json:
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": stamp(model.modified),
        "size": model.size,
        "digest": model.digest,
        "details": details(model),
    }


def shown(model: Model) -> Json:
    """What `/api/show` answers. The model file names the weights' blob, and thereby what the model was made of."""
    template = model.extras.get("template") or "{{ .Prompt }}"
    lines = [
        '# Modelfile generated by "ollama show"',
        "# To build a new Modelfile based on this, replace FROM with:",
        f"# FROM {model.name}",
        "",
        f"FROM {model.weights}",
        f"TEMPLATE {template}",
    ]
    parameters = json.loads(model.extras.get("parameters") or "{}")
    return {
        "modelfile": "\n".join(lines) + "\n",
        "parameters": "\n".join(f"{key:<30} {value}" for key, value in parameters.items()),
        "template": template,
        "system": model.extras.get("system", ""),
        "details": details(model),
        "model_info": {**model.gguf.values, "general.parameter_count": model.gguf.parameters},
        "capabilities": ["completion"],
        "modified_at": stamp(model.modified),
    }


def loaded(runner: Runner) -> Json:
    return {
        "name": runner.model.name,
        "model": runner.model.name,
        "size": runner.size,
        "digest": runner.model.digest,
        "details": details(runner.model),
        "expires_at": stamp(runner.expires),
        "size_vram": runner.vram,
        "context_length": runner.context,
    }


def address() -> tuple[str, int]:
    """Where to listen, or (for a client) whom to ask: OLLAMA_HOST as Ollama reads it."""
    text = os.environ.get("OLLAMA_HOST", "").removeprefix("http://").strip("/") or "127.0.0.1:11434"
    host, _, port = text.rpartition(":") if ":" in text else (text, "", "11434")
    return host or "0.0.0.0", int(port)


def serve() -> None:
    root = Path(os.environ.get("OLLAMA_MODELS") or Path(os.environ.get("HOME", "/root")) / ".ollama/models")
    Handler.store = Store(root, None if os.environ.get("GPULAB_STAND_IN_MODELS") == "away" else AVAILABLE)
    Handler.store.prune()
    Handler.scheduler = Scheduler(Handler.store)
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(address(), Handler)
    free = free_device_bytes()
    log("server config (simulated)", env=f"OLLAMA_MODELS:{root} OLLAMA_KEEP_ALIVE:{Handler.scheduler.default_keep}")
    log(f"Listening on {':'.join(map(str, server.server_address))} (version {VERSION})")
    if free:
        log("inference compute (simulated)", library="CUDA", available=f"{free // MIB} MiB")
    else:
        log("inference compute (simulated)", id="cpu", library="cpu")
    # As PID 1 of a container this process gets no default handling of SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server.serve_forever()
    finally:
        for runner in Handler.scheduler.running():
            runner.stop()


def server_url() -> str:
    """The running server as a client inside the same container reaches it."""
    host, port = address()
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def ask(path: str, body: Json | None = None, method: str | None = None) -> Iterator[Json]:
    """The lines of an answer of the running server."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(server_url() + path, data, method=method)) as answer:
            for line in answer:
                yield json.loads(line)
    except urllib.error.HTTPError as error:
        sys.exit(f"Error: {json.loads(error.read() or b'{}').get('error', error)}")
    except urllib.error.URLError:
        sys.exit("Error: could not connect to ollama server, run 'ollama serve' to start it (simulated)")


def rows(titles: tuple[str, ...], lines: list[tuple[str, ...]]) -> None:
    widths = [max(len(line[column]) for line in [titles, *lines]) + 4 for column in range(len(titles))]
    for line in [titles, *lines]:
        print("".join(f"{word:<{width}}" for word, width in zip(line, widths, strict=True)).rstrip())


def main(words: list[str]) -> None:
    match words:
        case ["serve"]:
            serve()
        case ["--version"] | ["-v"]:
            print(f"ollama version is {VERSION}")
        case ["list"] | ["ls"]:
            models = next(ask("/api/tags"))["models"]
            rows(("NAME", "ID", "SIZE"), [(m["name"], m["digest"][:12], f"{m['size'] // 1000} KB") for m in models])
        case ["ps"]:
            running = next(ask("/api/ps"))["models"]
            place = {True: "100% GPU", False: "100% CPU"}
            rows(
                ("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT"),
                [
                    (
                        m["name"],
                        m["digest"][:12],
                        f"{m['size'] // MIB} MB",
                        place[m["size_vram"] > 0],
                        str(m["context_length"]),
                    )
                    for m in running
                ],
            )
        case ["pull", name]:
            for line in ask("/api/pull", {"model": name}):
                if "error" in line:
                    sys.exit(f"Error: {line['error']}")
                print(line["status"])
        case ["rm", name]:
            list(ask("/api/delete", {"model": name}, method="DELETE"))
            print(f"deleted '{name}'")
        case ["run", name, *prompt]:
            for line in ask("/api/generate", {"model": name, "prompt": " ".join(prompt)}):
                print(line["response"], end="", flush=True)
            print()
        case _:
            sys.exit("Usage: ollama serve|list|ps|pull|run|rm (simulated)")


if __name__ == "__main__":
    main(sys.argv[1:])
