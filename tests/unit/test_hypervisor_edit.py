# SPDX-License-Identifier: MIT
"""The editors of boot files: others' words survive, twice is once, and taking out is the inverse of adding."""

from __future__ import annotations

import base64
from pathlib import Path

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from operations import files
from operations.hypervisor import edit, goal
from operations.hypervisor.facts import KERNEL_CMDLINE, NodeState

word = st.text(st.characters(codec="ascii", exclude_characters='"', categories=["L", "N", "P", "S"]), min_size=1)
quoted = word.map(lambda value: f'module.option="{value} {value}"')
OURS = ["intel_iommu=on", "iommu=pt", "hugepagesz=1G hugepages=8"]
OUR_WORDS = {word for phrase in OURS for word in phrase.split()}
other = st.one_of(word, quoted).filter(lambda value: value not in OUR_WORDS)
line = st.lists(st.one_of(other, st.sampled_from(sorted(OUR_WORDS)))).map(" ".join)
phrases = st.lists(st.sampled_from(OURS), unique=True)


@example("hugepagesz=1G intel_iommu=on hugepages=8", [], ["hugepagesz=1G hugepages=8", "intel_iommu=on"], "")
@given(line, phrases, phrases, st.sampled_from(["", "\n"]))
def test_command_line_keeps_the_words_of_others_and_settles(
    text: str, add: list[str], drop: list[str], end: str
) -> None:
    edited = edit.edit_command_line(text + end, add, drop)

    assert len(edited.splitlines()) <= 1
    before, after = edit.words_of(text), edit.words_of(edited)
    assert [word for word in after if word not in OUR_WORDS] == [word for word in before if word not in OUR_WORDS]
    assert all(edit.holds(after, phrase) for phrase in add)
    assert not any(edit.holds(after, phrase) for phrase in drop if phrase not in add)
    assert edit.edit_command_line(edited, add, drop) == edited


@given(st.lists(other), phrases)
def test_taking_words_out_of_a_command_line_is_the_inverse_of_adding_them(words: list[str], add: list[str]) -> None:
    line = " ".join(words) + "\n"

    back = edit.edit_command_line(edit.edit_command_line(line, add), [], add)

    assert edit.words_of(back) == edit.words_of(line)


def record(*versions: str) -> NodeState:
    """A node whose command line went through these versions: found, written, found, written, …, and is the last now."""
    entries = [{"content": base64.b64encode(text.encode()).decode(), "mode": 0o644, "mtime": 1.0} for text in versions]
    found, written = entries[0::2], entries[1::2]
    kept = {"original": entries[0], "found": found[: len(written)], "written": written, "current": entries[-1]}
    state = yaml.safe_load((Path(__file__).parents[1] / "hosts/pve1.yaml").read_text())
    return NodeState.of({**state, "kept": {KERNEL_CMDLINE: {**kept, "touched": 1.0}}})


@given(st.lists(other, min_size=1), phrases, phrases)
def test_rollback_of_a_command_line_is_byte_for_byte(words: list[str], first: list[str], second: list[str]) -> None:
    original = "  ".join(words)
    one = edit.edit_command_line(original, first)
    two = edit.edit_command_line(edit.edit_command_line(one, [], first), second)

    back = goal.as_before(record(original, one, one, two)).files[KERNEL_CMDLINE]

    assert back is not None and back.content == original


@given(st.lists(other, min_size=1), phrases.filter(bool), phrases, st.lists(other, min_size=1), st.booleans())
def test_rollback_of_a_command_line_keeps_what_was_added_by_hand(
    words: list[str], first: list[str], second: list[str], added: list[str], last: bool
) -> None:
    """Between two writes, or after the last one."""
    original = " ".join(words) + "\n"
    one = edit.edit_command_line(original, first)
    by_hand = " ".join([one.strip(), *added]) + "\n"
    two = edit.edit_command_line(by_hand, second)
    versions = [original, one, by_hand] if last else [original, one, by_hand, two]

    back = goal.as_before(record(*versions)).files[KERNEL_CMDLINE]

    assert back is not None
    assert edit.words_of(back.content) == [
        *edit.words_of(original),
        *(word for line in added for word in edit.words_of(line)),
    ]


def test_command_line_that_is_right_stays_byte_for_byte() -> None:
    assert edit.edit_command_line("root=ZFS=rpool  iommu=pt", ["iommu=pt"]) == "root=ZFS=rpool  iommu=pt"


def test_command_line_of_several_lines_becomes_one() -> None:
    """Only the first line of /etc/kernel/cmdline would count."""
    assert edit.edit_command_line("root=/dev/sda2\nquiet\n", []) == "root=/dev/sda2 quiet\n"


def test_words_of_a_phrase_stand_next_to_each_other() -> None:
    """`hugepages=8` alone belongs to the page size before it."""
    line = "root=x hugepagesz=2M hugepages=8 hugepagesz=1G"
    assert edit.edit_command_line(line, ["hugepagesz=1G hugepages=8"]) == f"{line} hugepagesz=1G hugepages=8\n"


MODULES = ("vfio_pci", "vfio_iommu_type1", "kvm", "nouveau")
parameter = st.builds("{}={}".format, st.sampled_from("abcdef"), st.integers(0, 9))
statement = st.one_of(
    st.builds("options {} {}".format, st.sampled_from(MODULES), st.lists(parameter, min_size=1).map(" ".join)),
    st.builds("blacklist {}".format, st.sampled_from(MODULES)),
    st.sampled_from(["", "# a remark", "softdep kvm pre: vfio", "  options kvm  x=1"]),
)  # fmt: skip
OPTIONS = [
    "options vfio_pci disable_idle_d3=1",
    "options vfio_iommu_type1 allow_unsafe_interrupts=1",
    "blacklist nvidia",
]


def modprobe(statements: list[str]) -> str:
    return files.render("hypervisor/modprobe.d/gpulab-vfio.conf.j2", statements=statements)


@given(st.lists(st.sampled_from(OPTIONS), unique=True, min_size=1), st.lists(statement), st.lists(statement))
def test_modprobe_file_loses_our_lines_alone(ours: list[str], above: list[str], below: list[str]) -> None:
    written = modprobe(ours)
    current = "".join(f"{line}\n" for line in above) + written + "".join(f"{line}\n" for line in below)

    left = edit.modprobe_without(current, written)

    assert left == "".join(f"{line}\n" for line in above + below)
    assert edit.modprobe_without(left, written) == left
    assert edit.modprobe_without(written, written) == ""


@given(st.lists(parameter, min_size=1), st.booleans())
def test_modprobe_line_that_was_changed_loses_our_parameter_alone(theirs: list[str], first: bool) -> None:
    written = modprobe(OPTIONS)
    parameters = ["disable_idle_d3=1", *theirs] if first else [*theirs, "disable_idle_d3=1"]
    current = written.replace("disable_idle_d3=1", " ".join(parameters))

    assert edit.modprobe_without(current, written) == f"options vfio_pci {' '.join(theirs)}\n"


@given(phrases.filter(bool), st.lists(other.filter(lambda value: "$" not in value and "\\" not in value)))
def test_grub_snippet_loses_our_words_alone(ours: list[str], theirs: list[str]) -> None:
    written = files.render("hypervisor/default/grub.d/gpulab.cfg.j2", words=ours)
    plain = [value for value in theirs if '"' not in value]
    tail = ours[-1] + '"'
    current = written.replace(tail, " ".join([ours[-1], *plain]) + '"')

    assert edit.grub_words(written) == [word for phrase in ours for word in phrase.split()]
    left = edit.grub_without(current, written)
    assert edit.grub_words(left) == plain
    assert bool(left) == bool(plain)
    assert edit.grub_without(left, written) == left


@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"])), max_size=8))
def test_list_of_modules_loses_our_lines_alone(theirs: list[str]) -> None:
    written = files.render("hypervisor/modules-load.d/gpulab-vfio.conf.j2")
    theirs = [line for line in theirs if not line.startswith("vfio")]
    current = written + "".join(f"{line}\n" for line in theirs)

    assert edit.lines_without(current, written) == "".join(f"{line}\n" for line in theirs)
