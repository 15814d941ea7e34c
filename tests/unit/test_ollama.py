# SPDX-License-Identifier: MIT
"""Ollama: what its settings become, what an inventory may not say, and what has to happen to its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import inventory
from inventory.services import OF_THE_GPU, Ollama, OllamaModel
from inventory.sharing import Client, client
from operations.containers.ollama import Models, decide_models, full_name, listed, not_had, ollama_spec
from operations.containers.spec import ContainerSpec
from tests.unit.test_inventory import GUEST, IMAGE, lab_file, refused

CARD_MIB = 16376
A, B = 64 * "a", 64 * "b"


def spec(client: Client | None = None, **keys: Any) -> ContainerSpec:
    return ollama_spec(Ollama(image=IMAGE, **keys), CARD_MIB, "/srv/data", client or Client())


def found(*models: dict[str, str], **made_of: str | None) -> dict[str, Any]:
    """A service that answers."""
    return {"answers": {"models": {"status": 200, "body": {"models": list(models)}}}, "made_of": made_of}


def there(name: str, digest: str = A) -> dict[str, str]:
    return {"name": name, "digest": digest}


def of_file(name: str = "own", sha256: str = A) -> OllamaModel:
    return OllamaModel(name=name, gguf="/srv/data/own.gguf", gguf_sha256=sha256)


def test_every_setting_reaches_the_container() -> None:
    environment = spec(
        context_length=4096,
        parallel=2,
        max_loaded_models=3,
        max_queue=16,
        keep_alive="-1",
        load_timeout="10m",
        flash_attention=True,
        kv_cache_type="q8_0",
        memory_budget_mib=8192,
        environment={"OLLAMA_DEBUG": "1"},
    ).environment

    assert environment == {
        "HOME": "/var/lib/ollama",
        "OLLAMA_HOST": "0.0.0.0:11434",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_CONTEXT_LENGTH": "4096",
        "OLLAMA_NUM_PARALLEL": "2",
        "OLLAMA_MAX_LOADED_MODELS": "3",
        "OLLAMA_MAX_QUEUE": "16",
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_LOAD_TIMEOUT": "10m",
        "OLLAMA_FLASH_ATTENTION": "1",
        "OLLAMA_KV_CACHE_TYPE": "q8_0",
        "OLLAMA_GPU_OVERHEAD": str((CARD_MIB - 8192) * 2**20),
        "OLLAMA_DEBUG": "1",
    }


def test_what_the_container_is_given_cannot_be_set_by_hand_as_well(tmp_path: Path) -> None:
    """A variable of ours that `environment` could set would be overruled without a word."""
    shared = client_of(tmp_path, max_loaded_models=2)
    ours = spec(shared).environment

    assert not ours.keys() - {**OF_THE_GPU, **Ollama.taken}.keys()


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("OLLAMA_CONTEXT_LENGTH", "expected `context_length` in place of OLLAMA_CONTEXT_LENGTH in `environment`"),
        ("OLLAMA_GPU_OVERHEAD", "expected `memory_budget_mib` in place of OLLAMA_GPU_OVERHEAD"),
        ("OLLAMA_MODELS", "expected `data_disk.mount` in place of OLLAMA_MODELS"),
        ("OLLAMA_NO_CLOUD", "expected no OLLAMA_NO_CLOUD, which gpulab sets"),
        ("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "expected `memory_budget_mib` in place of CUDA_MPS_PINNED"),
        ("CUDA_VISIBLE_DEVICES", "expected `gpu` in place of CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_variable_of_ours_is_refused_with_the_key_to_use(tmp_path: Path, variable: str, words: str) -> None:
    service = {"image": IMAGE, "environment": {variable: "1"}}

    told = refused(lab_file(tmp_path, guests={"gpu01": {**GUEST, "services": {"ollama": service}}}))

    assert words in told
    assert "gpu01: services.ollama" in told


def client_of(folder: Path, **keys: Any) -> Client:
    """What the sharing asks of Ollama on a guest with MPS."""
    service = {"image": IMAGE, **keys}
    guest = inventory.load(lab_file(folder, guests={"gpu01": {**GUEST, "services": {"ollama": service}}})).guests[
        "gpu01"
    ]
    declared = guest.services.ollama
    assert declared is not None
    return client(guest, budget_mib=declared.memory_budget_mib, processes=declared.max_loaded_models)


@pytest.mark.parametrize(("models", "limit"), [(1, "0=8192M"), (2, "0=4096M")])
def test_the_budget_is_the_limit_of_its_processes_under_mps(tmp_path: Path, models: int, limit: str) -> None:
    """Ollama has one process a loaded model, and MPS limits a process."""
    assert client_of(tmp_path, max_loaded_models=models).environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == limit


def test_ollama_is_the_client_that_the_sharing_asks_for(tmp_path: Path) -> None:
    shared = spec(client_of(tmp_path))
    words = shared.create()
    assert {"--user=850:850", "--ipc=host", "--env=CUDA_MPS_PIPE_DIRECTORY=/run/nvidia-mps"} <= set(words)
    assert "--mount=type=bind,source=/run/nvidia-mps,target=/run/nvidia-mps" in words
    # Somebody else's folder is neither made nor given away.
    assert shared.folders() == ["/srv/data/ollama"]
    assert shared.owned() == {"/srv/data/ollama": [850, 850]}


def test_ollama_of_its_own_has_its_models_where_a_client_has_them_and_as_root() -> None:
    alone = spec()
    assert alone.owned() == {"/srv/data/ollama": [0, 0]}
    assert not [word for word in alone.create() if word.startswith("--ipc")]
    assert alone.volumes == {"/srv/data/ollama": f"{alone.environment['HOME']}/.ollama"}


def test_it_is_closed_to_the_network_and_limited() -> None:
    words = spec(port=11500, host_memory_mib=4096).create()
    assert {"--publish=127.0.0.1:11500:11434", "--memory=4096m", "--pids-limit=1024", "--cap-drop=ALL"} <= set(words)
    assert "--read-only" in words
    assert "--health-cmd=ollama ps" in words


@pytest.mark.parametrize(
    ("model", "full"),
    [("tiny", "tiny:latest"), ("qwen3:8b", "qwen3:8b"), ("hf.co/a/b", "hf.co/a/b:latest")],
)
def test_a_model_without_tag_is_the_latest(model: str, full: str) -> None:
    assert full_name(model) == full == OllamaModel(name=model).full_name


@pytest.mark.parametrize("answer", [None, {"status": 0, "body": "refused"}, {"status": 200, "body": {"models": None}}])
def test_a_service_that_lists_nothing_has_nothing(answer: dict[str, Any] | None) -> None:
    assert listed(answer) == {}


def test_a_model_of_another_digest_is_pulled_again() -> None:
    models = decide_models(found(there("tiny:latest", B)), [OllamaModel(name="tiny", digest=A)], prune=False)

    assert [model.name for model in models.pull] == ["tiny"]
    assert models.lines == (f"tiny: digest {B} -> {A}",)


def test_a_model_without_declared_digest_stays_as_it_was_pulled() -> None:
    assert not decide_models(found(there("tiny:latest", B)), [OllamaModel(name="tiny")], prune=False).any()


def test_a_model_of_a_file_is_known_by_its_weights() -> None:
    state = found(there("own:latest", B), own=A)

    assert not decide_models(state, [of_file()], prune=False).any()
    other = decide_models(state, [of_file(sha256=B)], prune=False)
    assert [model.name for model in other.make] == ["own"]
    assert other.lines == (f"own: weights {A} -> {B}",)


def test_a_model_of_a_file_that_ollama_says_nothing_of_is_made_again() -> None:
    models = decide_models(found(there("own:latest")), [of_file()], prune=False)

    assert models.lines == (f"own: weights unknown -> {A}",)


def test_undeclared_models_are_told_and_stay_unless_they_are_to_be_pruned() -> None:
    state, wanted = found(there("tiny:latest"), there("old:1b")), [OllamaModel(name="tiny")]

    assert decide_models(state, wanted, prune=False) == Models(undeclared=("old:1b",))
    assert decide_models(state, wanted, prune=True) == Models(remove=("old:1b",))


NAMES = st.sampled_from(["tiny", "tiny:1b", "own", "qwen3:8b", "a/b"])
DIGESTS = st.sampled_from([A, B])


@given(
    have=st.dictionaries(NAMES, st.tuples(DIGESTS, DIGESTS)),
    pulled=st.dictionaries(NAMES, st.none() | DIGESTS),
    made=st.dictionaries(NAMES, DIGESTS),
    prune=st.booleans(),
)
def test_what_is_decided_is_enough_and_no_more(
    have: dict[str, tuple[str, str]], pulled: dict[str, str | None], made: dict[str, str], prune: bool
) -> None:
    """Done, nothing is left to do; what is declared is never removed, and what is as declared never touched."""
    wanted = [of_file(name, sha256) for name, sha256 in made.items()]
    wanted += [OllamaModel(name=name, digest=digest) for name, digest in pulled.items() if name not in made]

    def state(models: dict[str, tuple[str, str]]) -> dict[str, Any]:
        return found(
            *(there(full_name(name), digest) for name, (digest, _) in models.items()),
            **{name: weights for name, (_, weights) in models.items()},
        )

    first = decide_models(state(have), wanted, prune)
    after = {name: what for name, what in have.items() if full_name(name) not in first.remove}
    for model in first.make:
        after[model.name] = (B, str(model.gguf_sha256))
    for model in first.pull:
        after[model.name] = (model.digest or A, A)

    second = decide_models(state(after), wanted, prune)
    assert not second.any()
    declared = {model.full_name for model in wanted}
    assert declared <= {full_name(name) for name in after}
    assert not declared & {*first.remove, *first.undeclared}
    assert not (first.remove and not prune)
    for model in (*first.make, *first.pull):
        assert have.get(model.name) is None or model.digest not in (None, have[model.name][0]) or model in first.make


def test_ollamas_words_reach_the_user() -> None:
    output = "pulling tiny: 100 % of 0.5 MB\nmodel nosuch: pull model manifest: file does not exist\nmodel own: EOF"

    error = not_had("gpu01", output)

    assert error.brief == "gpu01: ollama: model nosuch: pull model manifest: file does not exist"
    assert "model own: EOF" in str(error)
