# SPDX-License-Identifier: MIT
"""The kernels: text and source agree, every card's assembler takes them, and their data is exact.

That they compute what they should is shown by test_gpubench.py, where they run on this machine.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from verify.benchmarks import KERNELS, PLACE, PROGRAM, gpubench, nvrtc, program

DOCUMENT = Path(__file__).parents[2] / "docs/benchmarks.md"
SOURCES = sorted(KERNELS.glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
#: Releases of ptxas whose counts are in the document.
RECORDED = ("12.2", "13.0")
by_name = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def ptx(source: Path) -> str:
    return source.with_suffix(".ptx").read_text()


@by_name
def test_text_is_of_this_source(source: Path) -> None:
    """Without the compiler: `make kernels` was run after the last change."""
    assert nvrtc.recorded(ptx(source)) == nvrtc.digest(source)


@by_name
def test_compiler_makes_the_same_text_again(source: Path) -> None:
    try:
        compiler = nvrtc.Nvrtc()
    except nvrtc.CompileError as error:
        pytest.skip(str(error))
    assert nvrtc.ptx_of(source, compiler) == ptx(source)


def test_error_in_a_source_is_told_in_the_compilers_words(tmp_path: Path) -> None:
    try:
        compiler = nvrtc.Nvrtc()
    except nvrtc.CompileError as error:
        pytest.skip(str(error))
    (tmp_path / "bad.cu").write_text("int x = y;\n")
    with pytest.raises(nvrtc.CompileError, match=r'bad\.cu\(1\): error: identifier "y" is undefined'):
        compiler.compile(tmp_path / "bad.cu")


@by_name
def test_text_is_what_driver_r535_takes(source: Path) -> None:
    assert re.findall(r"^\.(version|target) (.+)$", ptx(source), re.M) == [("version", "8.2"), ("target", "sm_80")]


def test_program_is_sent_with_every_kernel() -> None:
    text = program()
    (sent,) = re.findall(r"^PTX = (\{.*?^\})$", text, re.MULTILINE | re.DOTALL)

    assert ast.literal_eval(sent) == {source.stem: ptx(source) for source in SOURCES}
    assert PROGRAM.read_text().count(PLACE) == 1
    assert text.isascii()
    said = subprocess.run([sys.executable, "-m", "verify.benchmarks"], capture_output=True, text=True, check=True)
    assert said.stdout == text


@pytest.fixture(scope="module", params=["package", "toolkit"])
def ptxas(request: pytest.FixtureRequest) -> str:
    """The pinned package's, and the one of a toolkit on this machine."""
    if request.param == "toolkit":
        return shutil.which("ptxas") or pytest.skip("no ptxas in PATH: a CUDA toolkit has it")
    spec = importlib.util.find_spec("nvidia.cuda_nvcc") if importlib.util.find_spec("nvidia") else None
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no ptxas of the pinned package: pip install '.[kernels]'")
    return str(Path(spec.submodule_search_locations[0]) / "bin/ptxas")


def assembled(ptxas: str, source: Path, architecture: str) -> dict[str, tuple[int, int]]:
    """Registers, and bytes of spills, of each kernel."""
    words = [ptxas, "-v", f"-arch={architecture}", str(source.with_suffix(".ptx")), "-o", "/dev/null"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    spills = r"(\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(rf"entry function '(\w+)'.*?{spills}.*?Used (\d+) registers", said, re.DOTALL)
    return {name: (int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found}


def documented(release: str) -> dict[str, list[str]]:
    """The table of registers: a number for each architecture. Two, `12.2 / 13.0`, where the releases differ."""
    rows = re.findall(r"^\| `(\w+)` \|((?: [\d /]+ \|){4})$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    place = RECORDED.index(release)
    cells = {name: [cell.split(" / ") for cell in row.strip(" |").split(" | ")] for name, row in rows}
    return {name: [numbers[place if len(numbers) > 1 else 0] for numbers in row] for name, row in cells.items()}


@pytest.mark.parametrize("column", range(4), ids=ARCHITECTURES)
def test_every_cards_assembler_takes_the_kernels_without_spills(ptxas: str, column: int) -> None:
    kernels = {k: v for source in SOURCES for k, v in assembled(ptxas, source, ARCHITECTURES[column]).items()}

    assert set(kernels) == set(documented(RECORDED[0]))
    assert {name: spills for name, (_, spills) in kernels.items() if spills} == {}
    version = re.search(r"release ([0-9.]+)", subprocess.check_output([ptxas, "--version"], text=True))
    if version and version[1] in RECORDED:
        assert {name: str(count) for name, (count, _) in kernels.items()} == {
            name: numbers[column] for name, numbers in documented(version[1]).items()
        }


# Data.


def exact(values: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(values) // 4}f", values))


def test_triad_is_exact() -> None:
    left, right, total = (exact(tile) for tile in gpubench.triad_tiles(random.Random(1)))
    # In 64 bits nothing of these is rounded: neither were they on the way to 32.
    assert [a + 3.0 * b for a, b in zip(left, right, strict=True)] == total


def test_chains_of_multiply_adds_are_exact_and_go_round() -> None:
    table, end = (exact(part) for part in gpubench.fma_tables(random.Random(1)))
    rows = [table[n * 256 : (n + 1) * 256] for n in range(12)]
    a, b, x = rows[:4], rows[4:8], rows[8:]

    for s in range(4):
        for n in range(256):
            assert a[s][n] * x[s][n] + b[s][n] == x[(s + 1) % 4][n]
            assert abs(b[s][n]) < 2**24 and abs(a[s][n]) >= 1024
    # Chain c begins at x[c % 4] and makes two steps more than whole rounds.
    assert [end[c * 256 : (c + 1) * 256] for c in range(8)] == [x[(c + 2) % 4] for c in range(8)]
    # A chain that did nothing would be seen.
    assert all(end[c * 256 + n] != x[c % 4][n] for c in range(8) for n in range(256))


@pytest.mark.parametrize("name", gpubench.TENSORS)
def test_every_sum_of_the_tensor_kernels_is_exact(name: str) -> None:
    """No partial sum reaches 2**24, where a float of 32 bits would begin to leave out integers."""
    kind = gpubench.TENSORS[name]
    last = 3 * kind.most + 1
    begin, product = 2**16, kind.depth * 127
    steps = max(3 * kind.most, last) * product
    grown = gpubench.MOST_ROUNDS * 127
    assert begin + steps + grown < 2**24
    # And each number fits its type: 8 bits of a bfloat16, -128 to 127 of a byte.
    assert last <= (127 if name == "int8" else 255)


@pytest.mark.parametrize("name", gpubench.TENSORS)
def test_tensor_steps_add_up_to_what_the_result_grows_by(name: str) -> None:
    kind = gpubench.TENSORS[name]
    warp = gpubench.tensor_warp(kind, random.Random(1))

    for right, growth in zip(warp.right, warp.growth, strict=True):
        product = [
            [sum(step[m][k] * right[k][n] for step in warp.steps for k in range(kind.depth)) for n in range(8)]
            for m in range(16)
        ]
        assert product == growth
        # One round more or less would be seen.
        assert any(value for row in growth for value in row)


@pytest.mark.parametrize("name", gpubench.TENSORS)
@pytest.mark.parametrize("by_column", [False, True], ids=["a", "b"])
def test_every_number_of_an_operand_is_in_one_register(name: str, by_column: bool) -> None:
    kind = gpubench.TENSORS[name]
    rows, columns = (kind.depth, 8) if by_column else (16, kind.depth)
    numbers = gpubench.Tensor(kind.depth, kind.packed, 0, "i", lambda values: tuple(values))  # type: ignore[arg-type]
    matrix = [[row * columns + column for column in range(columns)] for row in range(rows)]

    registers = gpubench.fragment(numbers, matrix, by_column)
    held = sorted(n for row in registers for packed in row for n in packed)  # type: ignore[attr-defined]
    assert held == list(range(rows * columns))


def test_memory_pattern_repeats_nowhere() -> None:
    """Words of one seed are all different within 16 GiB, so that one read from a wrong address is seen."""
    rng = random.Random(1)
    numbers = {rng.randrange(2**32) for _ in range(20000)}
    assert len({gpubench.word_of(number, 7, 0) for number in numbers}) == len(numbers)
    assert all(gpubench.word_of(n, 7, 0xFFFFFFFF) == gpubench.word_of(n, 7, 0) ^ 0xFFFFFFFF for n in range(100))
