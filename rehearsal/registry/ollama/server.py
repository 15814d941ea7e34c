# SPDX-License-Identifier: MIT
"""A stand-in for Ollama: its HTTP API in front of a real llama.cpp, where the original image can't be had.

It runs inside the image, from the standard library alone; models are run by runner.py in a process of their own, as
Ollama does it. Models come from a folder of the image instead of ollama.com, so `tiny` is all that can be pulled.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
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
from typing import Any

VERSION = "0.33.0+simulated"
HOME = Path(__file__).parent
AVAILABLE = HOME / "available"
RUNNER = HOME / "runner.py"
MIB = 1024 * 1024
FOREVER = timedelta(days=36500)
UNIT = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}

Json = dict[str, Any]


class Refused(Exception):
    """An answer that is an error: HTTP status and Ollama's own words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


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


def full_name(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


@dataclass(frozen=True)
class Model:
    """An installed model: its name with tag, the digest of its manifest, its weights and what is known of them."""

    name: str
    digest: str
    weights: Path
    size: int
    details: Json
    modified: datetime


class Store:
    """Models on disk, laid out as Ollama does: manifests by name, blobs by digest."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def manifest(self, name: str) -> Path:
        model, _, tag = full_name(name).partition(":")
        if not re.fullmatch(r"[A-Za-z0-9._/-]+", model) or ".." in model:
            raise Refused(400, f"invalid model name: {name}")
        owner = model if "/" in model else f"library/{model}"
        return self.root / "manifests/registry.ollama.ai" / owner / tag

    def blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest.replace(":", "-")

    def models(self) -> list[Model]:
        base = self.root / "manifests/registry.ollama.ai"
        found = []
        for path in sorted(base.rglob("*")):
            if path.is_file():
                owner = path.parent.relative_to(base).as_posix().removeprefix("library/")
                found.append(self._read(f"{owner}:{path.name}", path))
        return found

    def get(self, name: str) -> Model:
        path = self.manifest(name)
        if not path.is_file():
            raise Refused(404, f"model '{name}' not found")
        return self._read(full_name(name), path)

    def _read(self, name: str, path: Path) -> Model:
        text = path.read_bytes()
        manifest = json.loads(text)
        layer = manifest["layers"][0]
        return Model(
            name,
            hashlib.sha256(text).hexdigest(),
            self.blob(layer["digest"]),
            layer["size"],
            manifest["config"],
            datetime.fromtimestamp(path.stat().st_mtime, UTC),
        )

    def pull(self, name: str) -> Iterator[Json]:
        """Copy a model out of the image's folder of available ones, telling of it as Ollama does."""
        yield {"status": "pulling manifest"}
        source = AVAILABLE / f"{full_name(name).replace(':', '_')}.gguf"
        target = self.manifest(name)
        if not source.is_file():
            raise Refused(500, "pull model manifest: file does not exist")
        data = source.read_bytes()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        status = f"pulling {digest[7:19]}"
        yield {"status": status, "digest": digest, "total": len(data)}
        write(self.blob(digest), data)
        yield {"status": status, "digest": digest, "total": len(data), "completed": len(data)}
        yield {"status": "verifying sha256 digest"}
        yield {"status": "writing manifest"}
        details = json.loads(source.with_suffix(".json").read_text())
        layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": len(data)}
        manifest = {"schemaVersion": 2, "config": details, "layers": [layer]}
        write(target, json.dumps(manifest, sort_keys=True).encode())
        yield {"status": "success"}

    def delete(self, name: str) -> None:
        weights = self.get(name).weights
        self.manifest(name).unlink()
        if all(other.weights != weights for other in self.models()):
            weights.unlink()


def write(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: a reader never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}-partial")
    temporary.write_bytes(data)
    temporary.replace(path)


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
    """Loads models on demand and unloads those whose time is over."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.lock = threading.RLock()
        self.runners: dict[str, Runner] = {}
        self.default_keep = duration(os.environ.get("OLLAMA_KEEP_ALIVE") or "5m")
        self.context = setting("OLLAMA_CONTEXT_LENGTH", 0) or 4096
        self.overhead = setting("OLLAMA_GPU_OVERHEAD", 0)
        threading.Thread(target=self._expire, daemon=True).start()

    def keep_of(self, request: Json) -> timedelta:
        return self.default_keep if request.get("keep_alive") is None else duration(request["keep_alive"])

    def running(self) -> list[Runner]:
        with self.lock:
            for name in [name for name, runner in self.runners.items() if runner.process.poll() is not None]:
                del self.runners[name]
            return list(self.runners.values())

    def get(self, name: str, request: Json, busy: int = 0) -> tuple[Runner, int]:
        """The runner of a model, and how long loading it took (nanoseconds); `busy` requests begin with it."""
        started = time.monotonic_ns()
        with self.lock:
            model = self.store.get(name)
            self.running()
            runner = self.runners.get(model.name)
            if runner is None:
                runner = self.runners[model.name] = self._load(model, request)
            runner.busy += busy
            runner.touch(self.keep_of(request))
            return runner, time.monotonic_ns() - started

    def unload(self, name: str) -> None:
        with self.lock:
            if runner := self.runners.pop(full_name(name), None):
                runner.stop()
                log("unloaded (simulated)", model=name)

    def _load(self, model: Model, request: Json) -> Runner:
        context = int((request.get("options") or {}).get("num_ctx") or self.context)
        size = model_bytes(model, context)
        on_gpu = free_device_bytes() - self.overhead >= size
        argv = [sys.executable, str(RUNNER), str(model.weights), str(context), str(size if on_gpu else 0)]
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


def model_bytes(model: Model, context: int) -> int:
    """Memory a loaded model takes: weights, key-value cache and buffers, in whole MiB. Buffers are a guess."""
    shape = model.details
    cache = context * 2 * int(shape["block_count"]) * int(shape["embedding_length"]) * 2
    return -(-(model.size + cache + 192 * MIB) // MIB) * MIB


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    scheduler: Scheduler
    store: Store

    def version_string(self) -> str:
        return "ollama-stand-in (simulated)"

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(lambda: self._send(200, b""))

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_DELETE(self) -> None:
        self._answer(self._delete)

    def _answer(self, method: Any) -> None:
        try:
            method()
        except Refused as refused:
            self._json({"error": str(refused)}, refused.status)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _get(self) -> None:
        match self.path.partition("?")[0]:
            case "/":
                self._send(200, b"Ollama is running (simulated)", "text/plain; charset=utf-8")
            case "/api/version":
                self._json({"version": VERSION})
            case "/api/tags":
                self._json({"models": [tag(model) for model in self.store.models()]})
            case "/api/ps":
                self._json({"models": [loaded(runner) for runner in self.scheduler.running()]})
            case _:
                self._send(404, b"404 page not found", "text/plain")

    def _post(self) -> None:
        request = self._body()
        name = str(request.get("model") or request.get("name") or "")
        match self.path:
            case "/api/pull":
                self._pull(name, request)
            case "/api/show":
                model = self.store.get(name)
                info = {"general.architecture": "llama"}
                self._json({"details": details(model), "model_info": info, "modified_at": stamp(model.modified)})
            case "/api/generate":
                self._generate(name, request, str(request.get("prompt") or ""), "response")
            case "/api/chat":
                texts = [str(message.get("content", "")) for message in request.get("messages") or []]
                self._generate(name, request, "\n".join(texts), "message")
            case _:
                self._send(404, b"404 page not found", "text/plain")

    def _delete(self) -> None:
        if self.path != "/api/delete":
            raise Refused(404, "not found")
        request = self._body()
        name = str(request.get("model") or request.get("name") or "")
        self.store.get(name)
        self.scheduler.unload(name)
        self.store.delete(name)
        self._send(200, b"")

    def _pull(self, name: str, request: Json) -> None:
        if request.get("stream") is False:
            *_, last = self.store.pull(name)
            self._json(last)
            return
        self._stream(self.store.pull(name))

    def _generate(self, name: str, request: Json, prompt: str, key: str) -> None:
        started = time.monotonic_ns()
        if not prompt and self.scheduler.keep_of(request) == timedelta(0):
            self.store.get(name)
            self.scheduler.unload(name)
            self._json(self._part(name, key, "", done=True) | {"done_reason": "unload"})
            return
        runner, load = self.scheduler.get(name, request, busy=1 if prompt else 0)
        if not prompt:
            self._json(self._part(name, key, "", done=True) | {"done_reason": "load"})
            return
        if request.get("stream") is False:
            parts = list(self._parts(runner, name, request, prompt, key, started, load))
            whole = "".join(content(part, key) for part in parts)
            self._json(parts[-1] | self._part(name, key, whole, done=True))
            return
        self._stream(self._parts(runner, name, request, prompt, key, started, load))

    def _parts(
        self, runner: Runner, name: str, request: Json, prompt: str, key: str, started: int, load: int
    ) -> Iterator[Json]:
        options = request.get("options") or {}
        wanted = {
            "prompt": prompt,
            "n_predict": int(options.get("num_predict") or 64),
            "seed": int(options.get("seed") or 0),
            "temperature": float(options.get("temperature", 0.8)),
            "stream": True,
        }
        for event in self._events(runner, wanted):
            if not event.get("stop"):
                yield self._part(name, key, event["content"])
                continue
            timings = event["timings"]
            yield self._part(name, key, event.get("content", ""), done=True) | {
                "done_reason": "length" if event.get("stop_type") == "limit" else "stop",
                "total_duration": time.monotonic_ns() - started,
                "load_duration": load,
                "prompt_eval_count": timings["prompt_n"],
                "prompt_eval_duration": int(timings["prompt_ms"] * 1e6),
                "eval_count": timings["predicted_n"],
                "eval_duration": int(timings["predicted_ms"] * 1e6),
            }

    def _events(self, runner: Runner, wanted: Json) -> Iterator[Json]:
        try:
            yield from completion(runner.port, wanted)
        finally:
            with self.scheduler.lock:
                runner.busy -= 1
                runner.touch(runner.keep)

    def _part(self, name: str, key: str, text: str, done: bool = False) -> Json:
        value: object = {"role": "assistant", "content": text} if key == "message" else text
        created = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return {"model": name, "created_at": created, key: value, "done": done}

    def _body(self) -> Json:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body = json.loads(data or b"{}")
        except ValueError as error:
            raise Refused(400, str(error)) from None
        if not isinstance(body, dict):
            raise Refused(400, "json: cannot unmarshal into Go value")
        return body

    def _stream(self, parts: Iterator[Json]) -> None:
        """One JSON object a line. Once the first line is out, an error can only be a line of its own."""
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for part in parts:
                self._chunk(json.dumps(part).encode() + b"\n")
        except Refused as refused:
            self._chunk(json.dumps({"error": str(refused)}).encode() + b"\n")
        self._chunk(b"")

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


def content(part: Json, key: str) -> str:
    return str(part[key]["content"] if key == "message" else part[key])


def completion(port: int, wanted: Json) -> Iterator[Json]:
    """The events of llama.cpp's own server."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def details(model: Model) -> Json:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": model.details["parameter_size"],
        "quantization_level": model.details["quantization_level"],
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
    Handler.store = Store(root)
    Handler.scheduler = Scheduler(Handler.store)
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
