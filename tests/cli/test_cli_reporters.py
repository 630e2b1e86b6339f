"""Progress off a terminal is a few plain lines; on one it is a live display that leaves nothing behind."""

from __future__ import annotations

import io

from rich.console import Console

from perpend.cli.reporters import EVERY, Lines, Live, per_second
from perpend.progress import bars, reporting, standing, track


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_short_task_is_two_lines():
    lines, clock = [], Clock()
    with reporting(Lines(lines.append, clock)):
        for _ in track(range(4), "generate"):
            clock.now += 0.5
    assert lines == ["generate: 4 to do", "generate: 4 in 2.0 s"]


def test_a_long_task_says_rate_and_time_left_at_most_every_fifteen_seconds():
    lines, clock = [], Clock()
    with reporting(Lines(lines.append, clock)):
        for _ in track(range(100), "generate"):
            clock.now += 1
    assert lines[1] == "generate: 15 of 100, 1.0/s, 1 min 25 s left"
    assert len(lines) == 2 + 100 // EVERY


def test_tasks_inside_a_task_are_silent_unless_they_are_long():
    lines, clock = [], Clock()
    with reporting(Lines(lines.append, clock)):
        for _ in track(range(3), "trials"):
            for _ in track(range(5), "score"):
                clock.now += 1
    assert [line for line in lines if line.startswith("score")] == [
        "score: 5 of 5, 1.0/s, 0 ms left",
        "score: 5 in 5.0 s",
    ]
    assert next(line for line in lines if line.startswith("trials")) == "trials: 3 to do"


def test_a_task_that_was_broken_off_says_so():
    lines, clock = [], Clock()
    with reporting(Lines(lines.append, clock)):
        for step in track(range(10), "fit"):
            if step == 4:
                break
    assert lines[-1].startswith("fit: stopped at 4 of 10")


def test_a_task_of_unknown_length_and_batches_count_right():
    lines, clock = [], Clock()
    with reporting(Lines(lines.append, clock)):
        for _ in track(iter([[1, 2], [3]]), "read", size=len):
            clock.now += 10
    assert lines == ["read: started", "read: 3, 9.0/min", "read: 3 in 20.0 s"]


def test_rates_read_well():
    assert [per_second(r) for r in (120.4, 3.21, 0.1, 0)] == ["120/s", "3.2/s", "6.0/min", "0.0/s"]


def test_bytes_have_their_unit_in_lines_and_in_the_live_display():
    lines, clock, stream = [], Clock(), io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, no_color=True)
    for reporter in (Lines(lines.append, clock), Live(console, clock)):
        with reporting(reporter):
            for part in track([200_000, 11_143], "export", total=211_143, size=int, unit="B"):
                clock.now += 16 if part > 100_000 else 1
                if isinstance(reporter, Live):
                    reporter._progress.refresh()
    assert lines == [
        "export: 211 kB to do",
        "export: 200 kB of 211 kB, 12 kB/s, 891 ms left",
        "export: 211 kB in 17.0 s",
    ]
    shown = stream.getvalue()
    assert "200 kB/211 kB" in shown
    assert "export: 211 kB in 17.0 s" in shown
    assert "211143" not in shown
    with reporting(Lines(lines.append, clock)):
        for _ in track([5_000_000] * 2, "upload", total=20_000_000, size=int, unit="B"):
            pass
    assert lines[-1].startswith("upload: stopped at 10.0 MB of 20.0 MB")


def test_the_live_display_leaves_one_line_per_long_task_and_a_visible_cursor():
    stream, clock = io.StringIO(), Clock()
    live = Live(Console(file=stream, force_terminal=True, width=80, no_color=True), clock)
    with reporting(live):
        for _ in track(range(3), "long [bold]"):
            for _ in track(range(2), "inner"):
                clock.now += 1
        for _ in track(range(3), "short"):
            pass
        live.note("a note \x1b[2J")
    text = stream.getvalue()
    assert "long [bold]: 3 in 6.0 s" in text
    assert "short: 3" not in text
    assert "a note \\x1b[2J" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_handle_that_was_closed_is_ignored():
    clock = Clock()
    for reporter in (Lines(lambda line: None, clock), Live(Console(file=io.StringIO()), clock)):
        task = reporter.start("x", 2)
        reporter.finish(task)
        reporter.advance(task)
        reporter.finish(task)


def test_how_things_stand_is_told_at_most_every_fifteen_seconds_and_at_the_end():
    lines, clock = [], Clock()
    with reporting(Lines(lines.append, clock)):
        for k in track(range(5), "trials"):
            clock.now += 6
            standing(f"front {k}\nbest \x1b{k}")
    stood = [line for line in lines if "front" in line]
    assert stood == [f"front {k}\nbest \\x1b{k}" for k in (0, 3, 4)]
    assert lines[-1] == "trials: 5 in 30.0 s"


def test_the_live_display_shows_how_things_stand_in_place_and_keeps_the_last():
    stream, clock = io.StringIO(), Clock()
    live = Live(Console(file=stream, force_terminal=True, width=80, no_color=True), clock)
    live.standing("of no task")
    with reporting(live):
        for k in track(range(3), "trials"):
            standing(f"front {k}\nbest \x1b{k}")
            shown = stream.getvalue()
            assert f"front {k}" in shown
            assert f"best \\x1b{k}" in shown
    assert "of no task" not in stream.getvalue()
    text = stream.getvalue()
    assert text.rindex("front 2") > text.rindex("\x1b[?25h")  # stays when the display is gone
    assert "\x1b[2K" in text  # and what was shown before is wiped


def test_bars_of_another_library_are_lines_of_ours():
    lines, clock = [], Clock()
    with reporting(Lines(lines.append, clock)), bars(lambda said: {"Reading": "read"}.get(said, "")) as tqdm:
        for _ in tqdm(range(40), desc="Reading", unit="file", disable=False):
            clock.now += 1
        for _ in tqdm(range(40), desc="Sorting"):
            clock.now += 1
        with tqdm(total=4, desc="Reading") as bar:
            clock.now += 2
            bar.set_postfix_str("fast")
            bar.update(4)
    assert lines == [
        "read: 40 to do",
        "read: 15 of 40, 1.0/s, 25.0 s left",
        "read: 30 of 40, 1.0/s, 10.0 s left",
        "read: 40 in 40.0 s",
        "read: 4 to do",
        "read: 4 in 2.0 s",
    ]


def test_a_bar_that_another_library_never_closed_ends_with_the_block():
    lines, clock = [], Clock()
    with reporting(Lines(lines.append, clock)):
        with bars(str) as tqdm:
            tqdm(total=4, desc="read").update(3)
        for _ in track(range(2), "next"):
            pass
    assert lines == ["read: 4 to do", "read: stopped at 3 of 4 in 0 ms", "next: 2 to do", "next: 2 in 0 ms"]
