"""What is kept of a worker's standard error."""

from __future__ import annotations

from engine.control.last_words import LastWords


def test_nothing_was_said() -> None:
    assert LastWords().told() == ""


def test_the_last_lines_are_kept() -> None:
    words = LastWords()
    for number in range(100):
        words.add(f"line {number}")
    assert words.told().splitlines() == ["; its last words:", *(f"line {number}" for number in range(80, 100))]


def test_long_lines_take_the_room_of_others() -> None:
    words = LastWords()
    for number in range(10):
        words.add(f"{number}" * 1000)
    assert [line[:1] for line in words.told().splitlines()[1:]] == ["6", "7", "8", "9"]
    words.add("x" * 100_000 + "the end")
    lines = words.told().splitlines()[1:]
    assert [len(line) for line in lines] == [4096]
    assert lines[0].endswith("xthe end")
    words.add("")
    words.add("short")
    assert words.told().splitlines()[1:] == ["", "short"]
