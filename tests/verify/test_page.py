# SPDX-License-Identifier: MIT
"""The page of a recorded run, as a reader sees it; and what a page has to be whatever it tells."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from html5lib.html5parser import ParseError

from tests.verify.page import fetches, parsed, text
from verify.report import history
from verify.report.page import answer, html
from verify.report.run import Figure, Run
from verify.verdicts import Result, Severity, Verdict

RECORDED = Path(__file__).parent / "recorded"


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def recorded(name: str) -> Run:
    return Run.from_json(json.loads((RECORDED / f"{name}.json").read_text()))


def page() -> str:
    before, now = recorded("before"), recorded("now")
    return html(now, history.changes(before, now), history.failing_since(now, [before]))


def test_page_says_what_it_said_of_the_recorded_run() -> None:
    expected, found = (RECORDED / "page.txt").read_text(), text(parsed(page()))

    # What a page that was changed on purpose says is put there by hand.
    assert found == expected, "\n".join(difflib.unified_diff(expected.splitlines(), found.splitlines(), lineterm=""))


def test_page_is_valid_and_fetches_nothing() -> None:
    for html_ in (page(), html(recorded("before")), html(replace(recorded("now"), results=[], facts={}))):
        assert fetches(parsed(html_)) == []
        assert "<script" not in html_ and "url(" not in html_ and "@import" not in html_


@pytest.mark.parametrize(
    ("rule", "replaced", "by"),
    [
        ("an element that is not closed", "</section>", ""),
        ("an attribute that stands twice", "<header ", '<header class="odd" '),
        ("an id that stands twice", 'id="gpu01"', 'id="pve1"'),
        ("a bare ampersand", "</h1>", "&odd;</h1>"),
    ],
)
def test_page_that_breaks_a_rule_is_not_valid(rule: str, replaced: str, by: str) -> None:
    html_ = page()
    assert replaced in html_

    with pytest.raises((ParseError, ValueError)):
        parsed(html_.replace(replaced, by, 1))


def test_page_follows_the_readers_colours_and_width() -> None:
    style = page().partition("<style>")[2].partition("</style>")[0]

    assert "@media (prefers-color-scheme: dark)" in style
    assert "@media (max-width: " in style
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page()


def test_links_of_the_first_screen_lead_to_checks_that_are_not_folded_away() -> None:
    tree = parsed(page())
    places = {element.get("id") for element in tree.iter()}
    links = [element.get("href", "") for element in tree.iter("a")]
    folded = {
        row.get("id") for details in tree.iter("details") if details.get("open") is None for row in details.iter("tr")
    }

    assert len(links) > 3 and all(link.removeprefix("#") in places for link in links)
    assert not folded & {link.removeprefix("#") for link in links}


def test_text_of_a_host_is_no_markup() -> None:
    odd = '<b>&"odd"</b>\x00\x1b[31m'
    result = Result("a.b", "gpu01", "a", Severity.MAJOR, Verdict.FAIL, odd, odd, title=odd, promise=odd, waiver=odd)

    page = html(replace(recorded("now"), results=[result], facts={"gpu01": {odd: odd}}, revision=odd))

    assert "<b>" not in page and "&lt;b&gt;" in page
    parsed(page)


def test_figures_have_a_section_when_there_are_any() -> None:
    svg = '<svg viewBox="0 0 10 10"><title>A line</title><path d="M0 0L10 10"></path></svg>'
    run = replace(recorded("now"), figures=[Figure("Copy", svg, "GB/s of the last runs")])

    shown = html(run)

    assert "Benchmarks" not in page()
    assert svg in shown and "GB/s of the last runs" in text(parsed(shown))


def test_run_comes_back_from_its_own_file() -> None:
    run = recorded("now")

    assert Run.from_json(json.loads(json.dumps(run.as_json()))) == run


def one(severity: Severity, verdict: Verdict, **keys: bool) -> Result:
    return Result("a.b", "gpu01", "a", severity, verdict, **keys)  # type: ignore[arg-type]


CRITICAL, MAJOR, MINOR = Severity


@pytest.mark.parametrize(
    ("status", "results", "said"),
    [
        (0, [one(MAJOR, Verdict.PASS)], "every promise that counts is kept."),
        (0, [one(MINOR, Verdict.FAIL)], "every promise that counts is kept; 1 minor check failed."),
        (0, [one(MAJOR, Verdict.WAIVED)] * 2, "every promise that counts is kept; 2 failures are waived."),
        (0, [one(MAJOR, Verdict.NOT_RUN, expected=True)], "every promise that counts is kept; 1 check can't run here."),
        (1, [one(MAJOR, Verdict.FAIL), one(MINOR, Verdict.FAIL)], "1 major check failed or can't tell."),
        (
            1,
            [one(CRITICAL, Verdict.FAIL), one(MAJOR, Verdict.INCONCLUSIVE)],
            "1 critical and 1 major checks failed or can't tell.",
        ),
        (2, [one(MAJOR, Verdict.NOT_RUN)], "not known: 1 check that counts was not run."),
        (2, [], "not known: nothing was checked."),
    ],
)
def test_first_line_answers_whether_the_lab_is_all_right(status: int, results: list[Result], said: str) -> None:
    run = replace(recorded("now"), exit_status=status, results=results)

    assert answer(run) == said[0].upper() + said[1:]
    assert answer(replace(run, selection="-k vm")) == f"Of what was chosen (-k vm): {said}"
