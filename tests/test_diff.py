"""python -m shared diff: two lessons side by side."""

import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lesson_loader import all_lessons
from programs import run_program
from shared.diff import WIDTH, compare
from shared.lessons import find_lesson

SIDES = ["left", "right"]


def unfolded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for row in rows for each in (row["rows"] if row["kind"] == "fold" else [row])]


def text_of(rows: list[dict[str, Any]], side: str) -> list[str]:
    """One side of a file, put together again."""
    lines = [row[side] for row in unfolded(rows) if row[side]]
    assert [line["n"] for line in lines] == list(range(1, len(lines) + 1))
    return ["".join(text for text, _, _ in line["spans"]) for line in lines]


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("old", "new"),
    list(pairwise(all_lessons())),
    ids=[path.name[:2] for path in all_lessons()[1:]],
)
def test_nothing_is_lost_or_invented(old: Path, new: Path) -> None:
    result = compare(old, new)
    names = {path.name for lesson in (old, new) for path in lesson.glob("*.[ps][yq]*")}
    assert {file["name"] for file in result["files"]} | set(result["same"]) == names
    for file in result["files"]:
        assert text_of(file["rows"], "left") == lines_of(old / file["name"])
        assert text_of(file["rows"], "right") == lines_of(new / file["name"])
        for row in unfolded(file["rows"]):
            texts = [
                "".join(s[0] for s in (row[side] or {"spans": []})["spans"])
                for side in row
                if side in ("left", "right")
            ]
            assert (texts[0] == texts[1] and bool(row["left"]) == bool(row["right"])) == (
                row["kind"] == "same"
            )
    for name in result["same"]:
        assert lines_of(old / name) == lines_of(new / name)


def test_the_order_is_that_of_the_readme() -> None:
    result = compare(find_lesson("06"), find_lesson("07"))
    names = [file["name"] for file in result["files"]]
    # durable_context.py and `append` (in event_log.py), children.py, worker.py, rerun.py
    expected = ["durable_context.py", "event_log.py", "children.py", "worker.py", "rerun.py"]
    assert names[: len(expected)] == expected
    assert names[-1] == "main.py"
    states = {file["name"]: file["state"] for file in result["files"]}
    assert states["children.py"] == "added"
    assert states["worker.py"] == "changed"
    assert "slots.py" in result["same"] or "slots.py" in states


def small(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "worker.py").write_text(text, encoding="utf-8")
    return path


def test_words_that_changed_are_marked_and_the_rest_is_folded(tmp_path: Path) -> None:
    same = "".join(f"line_{number} = {number}\n" for number in range(20))
    old = small(tmp_path / "01-old", same + "answer = compute(41)\ngone()\n")
    new = small(tmp_path / "02-new", same + "answer = compute(42)\n")
    (file,) = compare(old, new)["files"]
    assert [row["kind"] for row in file["rows"]] == ["fold", *3 * ["same"], "changed", "removed"]
    assert len(file["rows"][0]["rows"]) == 17
    changed = file["rows"][4]
    assert [s[0] for s in changed["left"]["spans"] if s[2]] == ["41"]
    assert [s[0] for s in changed["right"]["spans"] if s[2]] == ["42"]
    assert ("compute", "n") in [(text, kind) for text, kind, _ in changed["right"]["spans"]]


@pytest.mark.parametrize(
    "text", ["", "\n", "a\n\n", "a\x0c\x0b\x1c\u2028b\nc", "\r\n\ra\r"], ids=ascii
)
def test_only_newlines_end_lines(text: str, tmp_path: Path) -> None:
    old, new = small(tmp_path / "01-old", text), small(tmp_path / "02-new", text + "x")
    (file,) = compare(old, new)["files"]
    text = (old / "worker.py").read_text(encoding="utf-8")
    assert text_of(file["rows"], "left") == (text.removesuffix("\n").split("\n") if text else [])
    assert text_of(file["rows"], "right") == (text + "x").split("\n")


CODE = "from shared.__main__ import main; main(['diff', *sys.argv[1:]])"


def test_it_keeps_its_width_and_its_colours_for_a_pager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")  # a dumb one has no colours
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = run_program(CODE, "06", "07").stdout.splitlines()
    assert any("\x1b[" in line for line in lines)
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines) == WIDTH


def test_the_command_prints_it_and_refuses_in_one_line() -> None:
    outcome = run_program(CODE, "06", "07")
    assert outcome.status == 0
    assert "children.py (added)" in outcome.stdout
    assert "There is no lesson 99" in run_program(CODE, "06", "99").sole_error_line()
    assert "There is no directory xx" in run_program(CODE, "06", 300 * "x").sole_error_line()


DIFF = [sys.executable, "-m", "shared", "diff", "06", "07"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_ctrl_c_ends_it_without_a_traceback() -> None:
    # More than fits in a pipe, so it is not at its end.
    with subprocess.Popen(DIFF, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert (process.returncode, stderr) == (130, b"")


def test_an_encoding_without_its_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    result = subprocess.run(DIFF, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"main.py (changed)" in result.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_a_full_disk_is_one_clear_line() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(DIFF, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (1, "Cannot write the output: disk full\n")
