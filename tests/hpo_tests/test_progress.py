"""What is shown while pictures are read."""

import io

import pytest

from hpo import progress
from hpo.progress import reading_bar


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        """Yes."""
        return True


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def test_a_terminal_shows_a_bar() -> None:
    stream = Terminal()
    with reading_bar(stream) as tell:
        for number in range(1, 4):
            tell("pictures", number, 3)
    assert "reading pictures" in stream.getvalue()
    assert "3/3" in stream.getvalue()


def test_without_a_terminal_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with reading_bar(stream) as tell:
        tell("pictures", 1, 5000)
    assert stream.getvalue() == ""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with reading_bar(stream) as tell:
        for number in (1233, 1234):
            tell("pictures", number, 5000)
    assert stream.getvalue() == "reading pictures: 1,234 of 5,000\n"


def test_nothing_is_shown_where_nothing_is_read() -> None:
    stream = Terminal()
    with reading_bar(stream):
        pass
    assert stream.getvalue() == ""


def test_a_dumb_terminal_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    stream = Terminal()
    with reading_bar(stream) as tell:
        for number in (1233, 1234):
            tell("pictures", number, 5000)
    assert stream.getvalue() == "reading pictures: 1,234 of 5,000\n"
