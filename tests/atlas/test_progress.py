"""What a run says on stderr."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from headwise.atlas import Atlas, Settings
from headwise.atlas.planning import plan
from headwise.atlas.progress import Shown, announcement, duration
from headwise.find.method import Method
from headwise.model.attached import AttachedModel
from headwise.probes.stream import Probe


def test_beforehand_it_says_what_will_run(model: AttachedModel, method: Callable[..., Method], short: Probe) -> None:
    planned = plan(model, Settings(items=16, controls=4), [short], [method("one")], None)
    said = "\n".join(announcement(planned, planned.cells))
    for part in (
        "small: 8 heads",
        "behaviours: repeat; off target: text",
        "methods: one",
        "16 items",
        "13 cells; about",
    ):
        assert part in said
    assert "8 are there already" in "\n".join(announcement(planned, planned.cells[8:]))
    assert "all 13 cells are there already" in announcement(planned, [])[-1]


def test_a_run_shows_itself_on_stderr_alone(
    run: Callable[..., Atlas], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwise.atlas.progress.EVERY", 0.0)
    run(tmp_path / "atlas", watching=None)
    told = capsys.readouterr()
    assert told.out == ""
    first, *_ = told.err.splitlines()
    assert first == "headwise: planning: writing and timing the items of 2 probes"
    assert "headwise: 16 cells; about" in told.err
    assert "headwise: 7 of 16 cells, about" in told.err


def test_on_a_terminal_the_probe_that_is_planned_is_shown_until_the_plan_is_there(
    model: AttachedModel,
    method: Callable[..., Method],
    short: Probe,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = Shown()
    with shown:
        planned = plan(model, Settings(items=16, controls=4), [short], [method("one")], None, shown.planning)
        assert shown.status is not None
        assert str(shown.status.status) == "planning: writing and timing the items of text, 2 of 2"
        shown.planned(planned, ())
        assert shown.status is None
        shown.planning("repeat", 0, 1)
    assert shown.status is None  # a plan that fails leaves no line behind
    assert "planning: writing and timing the items of" in capsys.readouterr().err  # the terminal is drawn now and then


def test_a_bar_on_a_terminal_is_taken_off_when_a_run_breaks(
    model: AttachedModel, method: Callable[..., Method], short: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    planned = plan(model, Settings(items=16, controls=4), [short], [method("one")], None)
    shown = Shown()
    assert shown.console.is_terminal

    def break_off() -> None:
        with shown:
            shown.planned(planned, planned.cells)
            shown.began(planned.cells[0])
            shown.finished(planned.cells[0], "")
            assert shown.bar is not None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert shown.bar is None


@pytest.mark.parametrize(("seconds", "said"), [(40, "40 s"), (90, "2 min"), (3600, "60 min"), (9000, "2.5 h")])
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
