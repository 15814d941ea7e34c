# SPDX-License-Identifier: MIT
"""Editors of what a node boots from: each adds words of ours, or takes them out again, and keeps everybody else's.

Pure. `edit_command_line` works on one line of words, the others on the files of our own that somebody may have changed
by hand: they take out what `written` (our last version) brought and leave the rest as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

#: A quoted value may hold spaces: module.option="a b".
_WORD = re.compile(r'(?:[^\s"]|"[^"\n]*"|")+')
_GRUB = re.compile(r'^(?P<head>\s*GRUB_CMDLINE_LINUX\w*=")(?P<words>.*)(?P<tail>"\s*)$')
_GRUB_SELF = re.compile(r"\$\{?GRUB_CMDLINE_LINUX\w*\}?")


def words_of(line: str) -> list[str]:
    """The words of a kernel command line."""
    return _WORD.findall(line)


def holds(words: Sequence[str], phrase: str) -> bool:
    """Do the words of `phrase` stand next to each other among `words`?"""
    return _place(words, phrase.split()) is not None


def _place(words: Sequence[str], phrase: Sequence[str]) -> int | None:
    length = len(phrase)
    places = (at for at in range(len(words) - length + 1) if list(words[at : at + length]) == list(phrase))
    return next(places, None)


def edit_command_line(line: str, add: Iterable[str], drop: Iterable[str] = ()) -> str:
    """The command line as one line, with the phrases of `add` and without those of `drop`; all other words are kept.

    A phrase is one word or several that stand next to each other. A line that is right already stays as it is, odd
    spacing included.
    """
    wanted = list(dict.fromkeys(add))
    words = words_of(line)
    edited = list(words)
    unwanted = [parts for phrase in drop if phrase not in wanted and (parts := phrase.split())]
    # Words of a phrase that stand apart come together when what is between them goes: look again after each.
    while found := next(((at, parts) for parts in unwanted if (at := _place(edited, parts)) is not None), None):
        at, parts = found
        del edited[at : at + len(parts)]
    for phrase in wanted:
        if not holds(edited, phrase):
            edited += phrase.split()
    if edited == words and len(line.splitlines()) == 1:
        return line
    return " ".join(edited) + "\n"


def grub_words(text: str) -> list[str]:
    """The words that a snippet of /etc/default/grub.d adds."""
    found = [match["words"] for line in text.splitlines() if (match := _GRUB.match(line))]
    return [word for words in found for word in words_of(_GRUB_SELF.sub("", words))]


def grub_without(text: str, written: str) -> str:
    """A snippet without our lines, and without our words in a line that was changed."""
    ours = grub_words(written)

    def stripped(line: str) -> str | None:
        match = _GRUB.match(line)
        if match is None:
            return line
        words = words_of(match["words"])
        rest = _less(words, ours)
        if rest == words:
            return line
        return match["head"] + " ".join(rest) + match["tail"] if _GRUB_SELF.sub("", " ".join(rest)).strip() else None

    return _lines(text, written, stripped)


def modprobe_without(text: str, written: str) -> str:
    """A file of modprobe.d without our lines, and without our parameters in an `options` line that was changed."""
    ours = [tuple(line.split()) for line in written.splitlines()]

    def stripped(line: str) -> str | None:
        words = line.split()
        if words[:1] != ["options"] or len(words) < 3:
            return line
        given = {parameter for entry in ours if entry[:2] == tuple(words[:2]) for parameter in entry[2:]}
        rest = [word for word in words[2:] if word not in given]
        if len(rest) == len(words) - 2:
            return line
        return " ".join([*words[:2], *rest]) if rest else None

    return _lines(text, written, stripped)


def lines_without(text: str, written: str) -> str:
    """A list without our lines."""
    return _lines(text, written, lambda line: line)


def _lines(text: str, written: str, stripped: Callable[[str], str | None]) -> str:
    """Our lines go, each as often as we wrote it; what is left goes through `stripped`."""
    ours = written.splitlines()
    left = []
    for line in text.splitlines(keepends=True):
        bare = line.rstrip("\n")
        if bare in ours:
            ours.remove(bare)
        elif (changed := stripped(bare)) is not None:
            left.append(line if changed == bare else changed + "\n")
    return "".join(left)


def _less(words: Sequence[str], others: Iterable[str]) -> list[str]:
    """`words` without `others`, each as often as it stands there, from the end."""
    rest = list(reversed(words))
    for word in others:
        if word in rest:
            rest.remove(word)
    return list(reversed(rest))
