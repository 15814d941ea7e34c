# SPDX-License-Identifier: MIT
"""How fast Ollama reads prompts and generates, with its first declared model, by Ollama's own clock.

Runs on the guest, as root, with the standard library alone: see docs/benchmarks.md, "Ollama". The model is left
as it was found: in memory if somebody had loaded it, else not. Prints one JSON object on stdout and progress on stderr.
"""

from __future__ import annotations

import json
import random
import string
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verify.benchmarks.host import device, entry, in_use, inspected, nvml_from, others, report, ruled, say
from verify.benchmarks.intervals import stop

PROMPT, GENERATION = "ollama.prompt", "ollama.generation"
#: How well a median is to be known, as a share of it, before sampling ends.
NOISE = {PROMPT: 0.05, GENERATION: 0.05}
#: Samples of each metric at least: with fewer, 95 % say nothing of a median.
LEAST = 6
#: Tokens of a prompt, about, and tokens to generate, exactly. Shares of the context that both may have.
TOKENS = {"cpu": (128, 32), "cuda": (512, 64)}
ROOM = 0.75
#: Tokens of context where Ollama does not say what it loaded the model with: its smallest default.
CONTEXT = 2048
#: Answers that stopped by themselves before so many tokens are too short to be timed.
SHORTEST = 16
#: Seconds of sampling on a CPU at most, and beside those of sampling, twice: to load the model.
CPU_S, AROUND_S = 4.0, 30.0
#: Seconds for short answers, and for a model to leave memory.
REPLY_S, UNLOAD_S = 10.0, 10.0
#: Seconds of an answer that were neither its prompt's nor its generation's: more, and it stood behind others' requests,
#: or another model had taken the place of this one.
WAITED_S = 1.0
#: Share of a prompt that Ollama may have kept from the one before: what begins each text.
KEPT = 0.1
#: Ollama's durations are at most this much longer than the client's: two clocks.
CLOCKS = 1.05
SEED = 1
TEXT = (
    "apple arch bank barn bell bird boat book bread bridge brook cart castle chair chalk clock cloud coast corn cup "
    "desk door dust eagle earth farm fence field fire fish flag flour forest fruit garden gate glass grain grass hand "
    "harbor hill horse house island key lake lamp leaf light map market meadow mill moon mountain night ocean orchard "
    "paper path pencil plain plant queen rain ring river road roof rope sail salt sand school seed shadow sheep shell "
    "ship shore silver sky snow song spring star stone storm street summer sun table tower train tree valley village "
    "wall water wheat wheel wind window winter wood wool"
)
WORDS = TEXT.split()


class Unanswered(Exception):
    """Ollama did not answer (`status` 0), or with an error: HTTP's `status`."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status


class TimeUp(Exception):
    """The run has to end in the middle of an answer."""


class Unmeasurable(Exception):
    """There is nothing to measure here; not a failure of what is measured."""


@dataclass(frozen=True)
class Answer:
    """What Ollama says of one request: tokens, and seconds by its own clock. `kept`: tokens of the prompt that it did
    not have to read; None: it does not say. `wall_s`: seconds by the client's clock.
    """

    prompt: int
    prompt_s: float
    kept: int | None
    generated: int
    generated_s: float
    wall_s: float
    reason: str
    text: str

    @property
    def waited_s(self) -> float:
        return self.wall_s - self.prompt_s - self.generated_s

    @property
    def short(self) -> bool:
        """Too short to be timed. Its only token may be the one that ends it, without text and in no time."""
        return self.generated < SHORTEST


def answer_of(found: dict[str, Any], wall_s: float) -> Answer:
    """Ollama leaves out what is 0. What is no number counts as 0, which no answer may have."""

    def number(key: str) -> float:
        value = found.get(key)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0

    return Answer(
        prompt=int(number("prompt_eval_count")),
        prompt_s=number("prompt_eval_duration") / 1e9,
        kept=int(number("prompt_eval_cached_count")) if "prompt_eval_cached_count" in found else None,
        generated=int(number("eval_count")),
        generated_s=number("eval_duration") / 1e9,
        wall_s=wall_s,
        reason=str(found.get("done_reason") or ""),
        text=str(found.get("response") or ""),
    )


def mistakes(answer: Answer, words: int, text: str, predict: int) -> dict[str, str]:
    """Metric to why the answer's figure can't be right. Each word is a token at least, and each token a byte."""
    found = {}
    size = len(text.encode())
    if answer.prompt < words:
        found[PROMPT] = f"prompt_eval_count {answer.prompt} for {words} words: it was cut, or read before"
    elif answer.prompt > size + 64:
        found[PROMPT] = f"prompt_eval_count {answer.prompt} for {size} bytes"
    elif (answer.kept or 0) > KEPT * answer.prompt:
        found[PROMPT] = f"prompt_eval_cached_count {answer.kept} of {answer.prompt}, of a prompt never sent before"
    elif answer.prompt_s <= 0:
        found[PROMPT] = "prompt_eval_duration is not above 0"
    if answer.generated != predict and not (answer.reason == "stop" and 0 < answer.generated < predict):
        found[GENERATION] = (
            f"eval_count {answer.generated} where num_predict is {predict} ({answer.reason or 'no'} reason)"
        )
    elif answer.generated_s <= 0 and not answer.short:
        found[GENERATION] = "eval_duration is not above 0"
    if answer.prompt_s + answer.generated_s > answer.wall_s * CLOCKS:
        seconds = answer.prompt_s + answer.generated_s
        found.setdefault(GENERATION, f"{seconds:.3g} s of work in an answer that took {answer.wall_s:.3g} s")
    return found


def sizes(kind: str, context: int) -> tuple[int, int]:
    """Tokens of the prompt and tokens to generate: as many as the context has room for."""
    prompt, predict = TOKENS[kind]
    room = int(context * ROOM)
    if prompt + predict > room:
        predict = max(min(predict, room // 4), SHORTEST)
        prompt = max(room - predict, SHORTEST)
    return prompt, predict


class Server:
    """Ollama's API on the guest's loopback address."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        # The guest may have a proxy in its environment; loopback is never behind it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(self, path: str, body: dict[str, Any] | None = None, limit_s: float = REPLY_S) -> dict[str, Any]:
        """
        Raises:
            Unanswered: no answer, or an error.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{path}", data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=max(limit_s, 1.0)) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise Unanswered(error.code, f"HTTP {error.code}: {said(error.read(1000))}") from None
        except (OSError, ValueError) as error:
            raise Unanswered(0, str(getattr(error, "reason", error))) from None
        if not isinstance(found, dict):
            raise Unanswered(0, f"{path} gives no JSON object")
        if found.get("error"):
            raise Unanswered(500, str(found["error"])[:300])
        return found

    def loaded(self, model: str) -> dict[str, Any] | None:
        """What `/api/ps` tells of a model; None: it is not in memory."""
        models = self.call("/api/ps").get("models") or []
        return next((each for each in models if model in (each["name"], each["name"].removesuffix(":latest"))), None)

    def load(self, model: str, limit_s: float) -> None:
        """As an empty prompt does."""
        self.call("/api/generate", {"model": model, "prompt": "", "stream": False}, limit_s)

    def unload(self, model: str) -> None:
        self.call("/api/generate", {"model": model, "prompt": "", "stream": False, "keep_alive": 0})
        end = time.monotonic() + UNLOAD_S
        while self.loaded(model) is not None and time.monotonic() < end:
            time.sleep(0.1)

    def generate(self, model: str, prompt: str, predict: int, limit_s: float) -> Answer:
        """One answer, without the model's template: the prompt is what it reads. The context stays what it is, another
        would load the model anew.
        """
        options = {"num_predict": predict, "temperature": 0, "seed": SEED}
        body = {"model": model, "prompt": prompt, "raw": True, "stream": False, "options": options}
        began = time.monotonic()
        found = self.call("/api/generate", body, limit_s)
        return answer_of(found, time.monotonic() - began)


def said(body: bytes) -> str:
    """Ollama's own words of an error."""
    text = body.decode(errors="replace").strip()
    try:
        return str(json.loads(text)["error"])[:300]
    except (ValueError, KeyError, TypeError):
        return text[:300]


@dataclass
class Run:
    """One run: what it fills is `found`, the report."""

    server: Server
    order: dict[str, Any]
    found: dict[str, Any]
    deadline: float
    random: random.Random
    wrong: dict[str, list[str]] = field(default_factory=lambda: {PROMPT: [], GENERATION: []})
    samples: dict[str, list[float]] = field(default_factory=lambda: {PROMPT: [], GENERATION: []})
    answers: int = 0
    waited: int = 0
    short: int = 0
    #: What would be wrong with timed answers without text. Of some it is right: not every token is a character.
    silent: list[str] = field(default_factory=list)

    @property
    def model(self) -> str:
        return str(self.order["model"])

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def prompt(self, words: int) -> str:
        """Letters, then words at random: no prompt begins as one that Ollama has read, and keeps. Two of a hundred
        prompts have their first words alike, if those are of a dictionary.
        """
        letters = "".join(self.random.choices(string.ascii_lowercase, k=16))
        return " ".join([letters, *self.random.choices(WORDS, k=words - 1)])

    def ask(self, prompt: str, predict: int) -> Answer:
        """
        Raises:
            Unanswered: no answer, or an error.
            TimeUp
        """
        try:
            return self.server.generate(self.model, prompt, predict, self.left())
        except Unanswered as error:
            if error.status or self.left() > 0:
                raise
            raise TimeUp(f"the time is up after {self.answers} answers") from None

    def measure(self, loaded: dict[str, Any], version: str) -> None:
        """
        Raises:
            Unanswered, TimeUp, Unmeasurable
        """
        # The stand-in says that its model is on the card, but a CPU computes.
        simulated = "simulated" in version
        kind = "cuda" if loaded.get("size_vram") and not simulated else "cpu"
        self.found |= device(kind)
        context = int(loaded.get("context_length") or CONTEXT)
        if not loaded.get("context_length"):
            self.found["notes"].append(f"Ollama does not tell the context; {CONTEXT} tokens are taken for it")
        if simulated:
            self.found["notes"].append("a stand-in for Ollama, which says so: a CPU computes (simulated)")
        digest = str(loaded.get("digest") or "").removeprefix("sha256:")
        declared = str(self.order.get("digest") or "").removeprefix("sha256:")
        if declared and declared != digest:
            self.found["notes"].append(f"the model's digest is {digest[:12]}, declared is {declared[:12]}")
        if kind == "cuda" and self.found["card"] is None:
            raise Unmeasurable("the model is on the GPU, and NVML knows no card")
        prompt, predict = sizes(kind, context)
        words = self.words_for(prompt, predict)
        parallel = parallel_of(self.order["containers"])
        self.found["setting"] = (
            f"{self.model} {digest[:12]}, at most {prompt} tokens of prompt, {predict} generated, context {context}, "
            f"parallel {parallel or 'unknown'}"
        )
        self.sample(words, predict, float(self.order["limit_s"]) if kind == "cuda" else CPU_S)

    def words_for(self, tokens: int, predict: int) -> int:
        """How many words make at most so many tokens: an untimed prompt of a few tells how its tokens are. Warms up."""
        text = self.prompt(SHORTEST)
        answer = self.ask(text, predict)
        each = max(answer.prompt / SHORTEST, 1.0)
        # A little less: other words may take more tokens.
        return max(int(tokens * 0.9 / each), 1)

    def sample(self, words: int, predict: int, limit_s: float) -> None:
        """Both metrics, of each request."""
        self.ask(self.prompt(words), predict)
        began = time.monotonic()
        try:
            while self.left() > 0 and not self.enough(time.monotonic() - began, limit_s):
                text = self.prompt(words)
                self.take(self.ask(text, predict), words, text, predict)
        finally:
            if len(self.silent) == len(self.samples[GENERATION]):
                self.wrong[GENERATION] += self.silent
            for name, samples in self.samples.items():
                if samples:
                    self.found["metrics"][name] = entry("tokens/s", samples, len(self.wrong[name]))
                    say(f"{name}: {sorted(samples)[len(samples) // 2]:.5g} tokens/s, {len(samples)} samples")

    def enough(self, elapsed_s: float, limit_s: float) -> bool:
        if elapsed_s >= limit_s and self.answers >= LEAST:
            return True
        return all(
            len(samples) >= LEAST and stop(samples, noise=NOISE[name], elapsed_s=elapsed_s, limit_s=limit_s)
            for name, samples in self.samples.items()
        )

    def take(self, answer: Answer, words: int, text: str, predict: int) -> None:
        self.answers += 1
        self.waited += answer.waited_s > WAITED_S
        found = mistakes(answer, words, text, predict)
        for name, why in found.items():
            self.wrong[name].append(why)
        read = answer.prompt - (answer.kept or 0)
        if answer.prompt_s > 0 and read > 0:
            self.samples[PROMPT].append(read / answer.prompt_s)
        if answer.short and GENERATION not in found:
            self.short += 1
        elif answer.generated_s > 0 and answer.generated > 0:
            self.samples[GENERATION].append(answer.generated / answer.generated_s)
            if not answer.text:
                self.silent.append(f"an empty response of {answer.generated} tokens, as all are")


def parallel_of(containers: Sequence[str], root: Path = Path("/")) -> str:
    """Requests that Ollama answers at the same time, as its process was told; empty: nobody says."""
    for name in containers:
        try:
            pid = int(inspected(name, "{{.State.Pid}}"))
            variables = (root / f"proc/{pid}/environ").read_text(errors="replace").split("\0")
        except (OSError, ValueError):
            continue
        for each in variables:
            if each.startswith("OLLAMA_NUM_PARALLEL="):
                return each.partition("=")[2]
    return ""


def measured(order: dict[str, Any]) -> dict[str, Any]:
    """The report: `order` has `port`, `model`, its declared `digest` or None, `containers`, `limit_s` of sampling, and
    the `folder` of pynvml where Python has none.
    """
    began = time.monotonic()
    if "folder" in order:
        nvml_from(order["folder"])
    found = report("ollama", software="ollama", setting=str(order["model"]))
    found |= device("cpu")
    deadline = began + 2 * float(order["limit_s"]) + AROUND_S
    run = Run(Server(order["port"]), order, found, deadline, random.Random(found["seed"]))
    try:
        version = str(run.server.call("/api/version").get("version"))
        found["software"] = f"ollama {version}"
        if users := others(order["containers"]):
            ruled(found, "inconclusive", in_use(users))
        else:
            with_model(run, version)
            judged(run, others(order["containers"]) if found["device"] == "cuda" else [])
    except Unmeasurable as error:
        ruled(found, "not run", str(error))
    except TimeUp as error:
        ruled(found, "inconclusive", str(error))
    except Unanswered as error:
        if error.status == 503:
            ruled(found, "inconclusive", f"others' requests fill Ollama's queue: {error}")
        elif error.status == 404 or (error.status == 0 and found["software"] == "ollama"):
            ruled(found, "not run", f"Ollama: {error}")
        else:
            ruled(found, "failed", f"Ollama: {error}")
    found["not_run"] = {name: found["reason"] for name in NOISE if name not in found["metrics"]}
    found["duration_s"] = time.monotonic() - began
    return found


def with_model(run: Run, version: str) -> None:
    """Measure, and leave the model as it was."""
    server = run.server
    mine = server.loaded(run.model) is None
    if mine:
        server.load(run.model, run.left())
    try:
        loaded = server.loaded(run.model)
        if loaded is None:
            raise Unanswered(500, f"{run.model} is not in memory after it was loaded")
        say(f"{run.model} is loaded")
        run.measure(loaded, version)
    finally:
        if mine:
            try:
                server.unload(run.model)
            except Unanswered as error:
                run.found["notes"].append(f"the model stays in memory until its time is over: {error}")


def judged(run: Run, users: Sequence[str]) -> None:
    """What the answers come to."""
    found, wrong = run.found, [why for each in run.wrong.values() for why in each]
    missing = [name for name in NOISE if name not in found["metrics"]]
    if wrong:
        ruled(found, "failed", f"{len(wrong)} figures of {run.answers} answers are wrong: {wrong[0]}")
    elif users:
        ruled(found, "inconclusive", in_use(users))
    elif run.waited:
        ruled(found, "inconclusive", f"{run.waited} of {run.answers} answers stood behind others' requests")
    elif missing and run.short:
        ruled(found, "inconclusive", f"{run.short} of {run.answers} answers ended before {SHORTEST} tokens")
    elif missing:
        ruled(found, "inconclusive", "the time is up")


def main() -> None:
    print(json.dumps(measured(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
