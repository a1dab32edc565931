"""Where the instrument that raises anywhere does not raise."""

from __future__ import annotations

import gc

from engine.testing.strikes import struck


def test_what_the_collector_calls_is_spared() -> None:
    seen: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        seen.append(phase)

    def collect() -> None:
        gc.collect()

    gc.callbacks.append(note)
    try:
        where = [struck(collect, place, ValueError()) for place in range(8)]
    finally:
        gc.callbacks.remove(note)
    assert seen
    assert where[0].endswith(" in collect") and where[-1] == ""
    assert not any(place.endswith(" in note") for place in where)


def test_what_an_object_does_at_its_end_is_spared() -> None:
    seen: list[str] = []

    class Noting:
        def __del__(self) -> None:
            self.note()

        def note(self) -> None:
            seen.append("end")

    def drop() -> None:
        Noting()

    where = [struck(drop, place, ValueError()) for place in range(8)]
    assert seen
    assert where[0].endswith(" in drop") and where[-1] == ""
    assert not any(place.endswith((" in __del__", " in note")) for place in where)
