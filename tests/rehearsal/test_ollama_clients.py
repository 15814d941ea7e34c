# SPDX-License-Identifier: MIT
"""Clients as users have them, against the Ollama stand-in: the packages `ollama` and `openai`, and curl."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import ollama
import openai
import pytest

from tests.rehearsal.ollama_server import servers

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ollama")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with servers(folder) as start:
        found = start()
        ollama.Client(found).pull("tiny")
        yield found


@pytest.fixture
def client(url: str) -> ollama.Client:
    return ollama.Client(url)


@pytest.fixture
def of_openai(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def test_ollama_pulls_with_progress_and_lists(client: ollama.Client) -> None:
    told = list(client.pull("tiny", stream=True))
    assert told[-1].status == "success"
    assert any(message.completed == message.total for message in told if message.total)
    assert [model.model for model in client.list().models] == ["tiny:latest"]
    assert client.show("tiny").details.family == "llama"


def test_ollama_generates_and_chats(client: ollama.Client) -> None:
    assert client.generate("tiny", "hello").response == "abc"
    assert [part.response for part in client.generate("tiny", "hello", stream=True)] == ["a", "b", "c", ""]
    assert client.chat("tiny", MESSAGES).message.content == "abc"
    assert "".join(part.message.content or "" for part in client.chat("tiny", MESSAGES, stream=True)) == "abc"
    assert client.ps().models[0].context_length == 4096


def test_ollama_embeds(client: ollama.Client) -> None:
    assert len(client.embed("tiny", ["a", "b"]).embeddings) == 2


def test_ollama_makes_a_model_of_a_file(client: ollama.Client, folder: Path) -> None:
    path = folder / "opt/available/tiny_latest.gguf"
    digest = client.create_blob(path)
    assert digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert client.create("own", files={"own.gguf": digest}).status == "success"
    assert client.generate("own", "hello").response == "abc"
    client.delete("own")
    with pytest.raises(ollama.ResponseError, match="model 'own' not found"):
        client.generate("own", "hello")


def test_ollama_is_told_what_cannot_be_pulled(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="pull model manifest: file does not exist"):
        client.pull("nosuch")


def test_openai_chats(of_openai: openai.OpenAI) -> None:
    answer = of_openai.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.choices[0].message.content == "abc"
    assert (answer.choices[0].finish_reason, answer.usage.total_tokens) == ("stop", 5)


def test_openai_streams_with_its_figures_at_the_end(of_openai: openai.OpenAI) -> None:
    chunks = list(
        of_openai.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "abc"
    assert chunks[-1].usage.completion_tokens == 3


def test_openai_completes(of_openai: openai.OpenAI) -> None:
    assert of_openai.completions.create(model="tiny", prompt="hello", max_tokens=3).choices[0].text == "abc"
    streamed = of_openai.completions.create(model="tiny", prompt="hello", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "abc"


def test_openai_embeds_and_lists(of_openai: openai.OpenAI) -> None:
    answer = of_openai.embeddings.create(model="tiny", input=["a", "bcd"])
    assert [len(each.embedding) for each in answer.data] == [4, 4]
    assert [model.id for model in of_openai.models.list()] == ["tiny:latest"]
    assert of_openai.models.retrieve("tiny").id == "tiny"


def test_openai_is_told_of_an_unknown_model(of_openai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'nosuch' not found"):
        of_openai.chat.completions.create(model="nosuch", messages=MESSAGES)


def test_curl_reads_the_answer_as_it_comes(url: str) -> None:
    body = json.dumps({"model": "tiny", "prompt": "hello"})
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--fail", "--no-buffer", f"{url}/api/generate", "--data", body],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [json.loads(line)["response"] for line in done.stdout.splitlines()] == ["a", "b", "c", ""]
