"""The checks of the READMEs, on READMEs of a little repository, most of which are wrong."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from readme_checks import consoles, snippets
from readme_checks.consoles import parse_console, scripts
from readme_checks.diagrams import diagram_problems, mermaid_is_missing
from readme_checks.masking import compare
from readme_checks.parsing import Readme, read_readme, slugs
from readme_checks.snippets import ledger_problems, snippet_problems
from readme_checks.structure import HEADINGS, link_problems, structure_problems
from readme_checks.whole import whole_problems
from readmes import ROOT, refresh, script_problems

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git tells which files there are")

README = "lessons/02-b/README.md"
OLD = """\
class Worker:
    def start(self):
        poll()
        sleep(1)
        return 1
"""
NEW = """\
class Worker:
    def start(self):
        poll()
        sleep(2)
        wake()
        return 1
"""
OLD_SQL = "-- name: get\nSELECT 1;\n"
NEW_SQL = "-- name: get_it\nSELECT 1;\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with two lessons."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name, worker, sql in [("01-a", OLD, OLD_SQL), ("02-b", NEW, NEW_SQL)]:
        lesson = tmp_path / "lessons" / name
        lesson.mkdir(parents=True)
        (lesson / "README.md").write_text("# Title\n\n## Run it\n")
        (lesson / "worker.py").write_text(worker)
        (lesson / "queries.sql").write_text(sql)
    return tmp_path


def write(root: Path, text: str, name: str = README) -> Readme:
    (root / name).write_text(text)
    return read_readme(root, name)


def block(info: str, *lines: str) -> str:
    return "\n".join([f"```{info}", *lines, "```", ""])


def answer(*blocks: str) -> str:
    return "\n".join(["<details>", "<summary>Answer</summary>", "", *blocks, "</details>", "", ""])


@pytest.mark.parametrize(
    "text",
    [
        block("python", "    def start(self):", "        poll()"),
        block("python", "def start(self):", "    ...", "    wake()", "    return 1"),
        block("python", "...", "wake()", "..."),
        block("python wrong", "anything"),
        answer(block("sql typed", "anything")),
    ],
)
def test_code_that_is_right(text: str, root: Path) -> None:
    assert not list(snippet_problems(write(root, text)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (block("python", "def start(self):", "    poll(1)"), "see 'poll(1)'"),
        (block("python", "sleep(1)"), "see 'sleep(1)'"),  # of the lesson before
        (block("python", "def start(self):", "        poll()"), "see the piece"),
        (block("python", "poll()", "wake()"), "see the piece"),
        (block("python", "wake()", "...", "poll()"), "not all in this order"),
        (block("python", "poll()", "...", "sleep(2)"), "not all in this order"),
        (block("python", "poll()", "...", "", "...", "wake()"), "nothing stands between"),
        (block("python", "rt(self):"), "see 'rt(self):'"),
        (block("python", "..."), "nothing"),
        (block("python", "# Title"), "see '# Title'"),
        (answer(block("python", "anything")), "see 'anything'"),
        (block("python typo", "poll()"), "no kind of block"),
        (block("bash", "ls"), "no kind of block"),
        ("```python\npoll()\n", "not closed"),
        ("<details>\n```python\npoll()\n```\n</details>\n", "blank line"),
        ("<details>\n", "not closed"),
        ("</details>\n", "at the wrong place"),
        ("<details>\n\n<details>\n\n</details>\n", "at the wrong place"),
        ("> ```text\n> a\n> ```\n", "on a line of its own"),
    ],
)
def test_code_that_is_wrong(text: str, message: str, root: Path) -> None:
    (problem,) = snippet_problems(write(root, text))
    assert message in problem.text


HEADER = ["--- lessons/01-a/worker.py", "+++ lessons/02-b/worker.py"]


@pytest.mark.parametrize(
    "lines",
    [
        [" poll()", "-sleep(1)", "+sleep(2)", "+wake()", " return 1"],
        ["-        sleep(1)", "+        sleep(2)", "...", "         return 1"],
        [*HEADER, "@@ -4 +4,2 @@ class", "-        sleep(1)", "+        sleep(2)"],
        ["--- name: get", "+-- name: get_it", " SELECT 1;"],
    ],
)
def test_diffs_that_are_right(lines: list[str], root: Path) -> None:
    assert not list(snippet_problems(write(root, block("diff", *lines))))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["-sleep(3)", "+sleep(2)"], "no file of the two lessons"),
        ([*HEADER, "-sleep(3)", "+sleep(2)"], "not those of lessons/01-a"),
        ([*HEADER, "-sleep(1)", "+sleep(3)"], "not those of lessons/02-b"),
        ([*HEADER, " poll()", "+sleep(2)", " return 1"], "not those of lessons/01-a"),
        ([*HEADER, " def start(self):", "+    poll()"], "in both files"),
        ([*HEADER, "+poll()"], "in both files"),
        ([*HEADER, " poll()"], "without any line"),
        ([*HEADER, "sleep(1)", "+sleep(2)"], "each line of a diff"),
        ([HEADER[0].replace("01", "00"), HEADER[1], "-sleep(1)"], "are not this lesson's"),
        ([*reversed(HEADER), "-sleep(1)"], "no file of the two lessons"),
    ],
)
def test_diffs_that_are_wrong(lines: list[str], message: str, root: Path) -> None:
    (problem,) = snippet_problems(write(root, block("diff", *lines)))
    assert message in problem.text


def test_the_list_of_unchecked_blocks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = root / "ledger"
    monkeypatch.setattr(snippets, "LEDGER", ledger)
    readme = write(root, block("sql wrong", "x") + block("", "y") + block("console no-run", "$ z"))
    entries = [f"{README} | sql wrong | x", f"{README} |  | y", f"{README} | console no-run | $ z"]
    ledger.write_text("\n".join(entries))
    assert not list(ledger_problems(readme))
    ledger.write_text("\n".join([*entries[1:], f"{README} | text | gone", "README.md | text | a"]))
    missing, surplus = ledger_problems(readme)
    assert missing.text.endswith(f"not in ledger: {entries[0]}")
    assert surplus.text.endswith("text | gone")


@pytest.mark.parametrize(
    ("shown", "output"),
    [
        ("01:15:15.140 INFO  worker vm:9637", "23:00:00.001 INFO  worker vm:1"),
        ("2026-11-23 01:15:28.206325+00 | x", "2027-01-01 01:15:28+00 | x"),
        ("took 12 ms or 1.5 s", "took 3.2 ms or 0.7 s"),
        ("Postgres  18.4", "Postgres  18.6 (Debian 18.6-1.pgdg13+2)"),
        ("Python    3.11.7", "Python    3.14.0rc2+"),
        ("Seq Scan (cost=0.1..2 rows=3 width=4)", "Seq Scan (cost=0.2..3 rows=9 width=9)"),
        ("(actual time=0.1..0.2 rows=100.00 loops=1)", "(actual time=3..4 rows=100 loops=1)"),
        (" a |  b \n---+----", " a | b \n---+---"),
        ("vm:1 starts\nkilled process 1", "vm:7 starts\nkilled process 7"),
        ("a\n...\nc", "a\nb\nb\nc"),
        ("a\n...\nc", "a\nc"),
        ("...\nvm:1 a\nvm:2 b\nvm:1 c", "vm:8 a\nvm:9 b\nvm:9 a\nvm:8 b\nvm:9 c"),
    ],
)
def test_outputs_that_are_the_same(shown: str, output: str) -> None:
    assert compare(shown.split("\n"), output.split("\n")).is_same


@pytest.mark.parametrize(
    ("shown", "output"),
    [
        ("task 1: RUNNING", "task 2: RUNNING"),
        ("waited for 5 s", "waited for 6 s"),
        ("Index Scan (actual time=1..2 rows=1 loops=1)", "Seq Scan (actual time=1..2 rows=1)"),
        ("(actual time=1..2 rows=1 loops=1)", "(actual time=1..2 rows=2 loops=1)"),
        ("  ->  Sort", "->  Sort"),
        ("vm:1 starts\nkilled process 1", "vm:7 starts\nkilled process 8"),
        ("vm:1 starts\nvm:2 starts", "vm:7 starts\nvm:7 starts"),
        ("a", "a\nb"),
        ("a\n...", "b\na"),
        ("...\nb", "b\na"),
        ("a\n...\nb\n...", "b\na"),
        ("a", ""),
    ],
)
def test_outputs_that_differ(shown: str, output: str) -> None:
    comparison = compare(shown.split("\n"), output.split("\n"))
    assert not comparison.is_same
    assert any(line.startswith(("+", "-")) for line in comparison.report())


def test_outputs_in_any_order() -> None:
    def same(shown: str, output: str) -> bool:
        return compare(shown.split(), output.split(), unordered=True).is_same

    assert same("a b b", "b a b")
    assert same("b ... a", "a c b")
    assert not same("a b b", "a b")
    assert not same("a b", "a b b")
    assert not same("a d ...", "a b c")
    assert not same("a a ...", "a b")


def test_commands_of_a_block(root: Path) -> None:
    readme = write(
        root,
        block(
            "console", "$ a \\", "  b", "out", "", '$ c "', '$ d"', "$ e <<'X'", "f", "X", "", "g"
        )
        + block("console", "what", "$ a")
        + block("console", '$ a "'),
    )
    commands = [(command.text, command.shown) for command in parse_console(readme.blocks[0])]
    assert commands == [("a \\\n  b", ["out"]), ('c "\n$ d"', []), ("e <<'X'\nf\nX", ["g"])]
    for wrong in readme.blocks[1:]:
        with pytest.raises(ValueError, match="command"):
            parse_console(wrong)


bash_only = pytest.mark.skipif(sys.platform == "win32", reason="the commands are for bash")


def run(readme: Readme, server_url: str) -> Iterator[str]:
    """What is wrong with a README's commands."""
    for script in scripts(readme):
        yield from (problem.text for problem in script_problems(script, server_url))


@bash_only
def test_commands_that_do_as_shown(root: Path, server_url: str) -> None:
    readme = write(
        root,
        block("console", "$ echo 1 > /tmp/note", "$ cat /tmp/note; ls /tmp/*", "1", "/tmp/note")
        + block("console", "$ kill -9 $$", "Killed", "$ sleep 300 & echo $((1 + 1))", "2")
        + block("console", "$ diff -u lessons/01-a/worker.py lessons/02-b/worker.py")
        + block("console", "$ pwd; echo $DATABASE_URL", "/repo", "...", "$ cat /tmp/note", "1")
        + block("console no-run", "$ false")
        + block("console", "$ nowhere", "bash: nowhere: command not found")
        + block(
            "console", "$ python -c 'import sys; print(1); print(2, file=sys.stderr); print(3)'"
        )
        + block("console", "$ psql \"$DATABASE_URL\" -c '\\dn'; true"),
    )
    assert not list(run(readme, server_url))


@bash_only
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["$ false"], "ended with 1"),
        (["$ exit 3", "..."], "ended with 3"),
        (["$ echo 1; nowhere", "1", "..."], "ended with 127"),
        (["$ diff nothing nowhere"], "ended with 2"),
        (["$ echo 2", "1"], "  - 1\n  + 2"),
        (["$ true", "1"], "  - 1"),
        (["$ echo 1 >&2; echo 2", "2"], "  + 1"),
        (["1"], "without a command"),
    ],
)
def test_commands_that_do_not(lines: list[str], message: str, root: Path, server_url: str) -> None:
    (problem,) = run(write(root, block("console", *lines)), server_url)
    assert message in problem


@bash_only
def test_a_command_that_hangs(root: Path, server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "DEADLINE", 0.5)
    mark = root / "mark"
    readme = write(root, block("console", f"$ cd /; sleep 600; touch .{mark}", "$ echo 1", "2"))
    first, second = run(readme, server_url)
    assert "the rest is not run" in first
    assert "did not end within 0.5 seconds" in second
    deadline = time.monotonic() + 60
    while any(str(mark) in argument for argument in arguments_of_processes()):
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.02)


def arguments_of_processes() -> Iterator[str]:
    for process in psutil.process_iter(["cmdline"]):
        yield from process.info["cmdline"] or []


PATCH = ["--- a/worker.py", "+++ b/worker.py", "@@ -4,1 +4,1 @@", "-        sleep(2)"]


@bash_only
def test_answers(root: Path, server_url: str) -> None:
    look = block("console", "$ grep 3 lessons/02-b/worker.py", "        sleep(3)")
    good = answer(block("diff", *PATCH, "+        sleep(3)"), look)
    unseen = block("console", "$ grep -c 3 lessons/02-b/worker.py", "0")
    assert not list(run(write(root, good + unseen), server_url))
    unpatched = answer(block("diff", *PATCH[:3], "-        sleep(9)", "+        sleep(3)"), look)
    (problem,) = run(write(root, unpatched), server_url)
    assert "Hunk #1 FAILED" in problem
    (problem,) = run(write(root, answer(block("diff", *PATCH, "+        sleep(3)"))), server_url)
    assert "no console block after this diff" in problem


@bash_only
def test_an_answer_has_the_files_of_its_exercise(root: Path, server_url: str) -> None:
    written = block("console", "$ cat > /tmp/note <<'X'", "a note", "X")
    taken = block("console", "$ sed 's/a/the/' /tmp/note > /tmp/other")
    run_too = block("console", "$ cat /tmp/note > /tmp/copy", "$ cat /tmp/copy", "a note")
    look = answer(block("console", "$ cat /tmp/other; ls /tmp/", "the note", "note", "other"))
    exercise = f"### One\n\n{written}{taken}{run_too}{look}"
    another = f"### Two\n\n{answer(block('console', '$ ls /tmp/ | wc -l', '0'))}"
    assert not list(run(write(root, exercise + another), server_url))


@bash_only
def test_refresh(root: Path, server_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    stale = block("console", "$ echo old is 1; echo; echo b", "old is 0", "$ echo $$; echo b", "b")
    partly = block("console", "$ seq 5; echo 0.2 s", "0", "...", "3", "...", "0.1 s")
    listed = "- Item:\n\n  ```console\n  $ echo 1\n  2\n  ```\n\n"
    kept = block("console", "$ echo process $$", "process 0")
    readme = write(root, stale + partly + listed + kept)
    assert refresh([readme], server_url) == 1  # the line that is not in the output
    text = (root / README).read_text()
    assert "```console\n$ echo old is 1; echo; echo b\nold is 1\n\nb\n$ echo $$" in text
    assert "0\n...\n3\n...\n0.2 s\n" in text
    assert text.endswith(listed.replace("2", "1") + kept)
    assert f"{README}:11: $ seq 5" in capsys.readouterr().out
    refresh([read_readme(root, README)], server_url)
    assert (root / README).read_text().count("0.2 s\n```") == 1


@bash_only
def test_refresh_does_not_undo_what_was_edited_meanwhile(root: Path, server_url: str) -> None:
    readme = write(root, block("console", "$ echo 1", "2"))
    (root / README).write_text("edited")
    with pytest.raises(SystemExit, match="edited meanwhile"):
        refresh([readme], server_url)
    assert (root / README).read_text() == "edited"


def test_form(root: Path) -> None:
    exercise = ["### One", "", answer()]
    sections = [f"## {heading}\n" for heading in HEADINGS]
    sections[7:8] = ["## Exercises\n", *exercise * 3]
    right = "\n".join(["# Title", "", *sections, *["filler"] * 120])
    assert not list(structure_problems(write(root, right)))
    folded = right.replace("## Building it\n", f"## Building it\n\n### More\n\n{answer()}")
    assert not list(structure_problems(write(root, folded)))
    long = right.replace("</details>", "filler\n" * 600 + "</details>", 1)
    assert not list(structure_problems(write(root, long)))
    for wrong, message in [
        (right.replace("## The idea", "## Idea"), "the headings"),
        (right.replace("## Run it\n\n## Diff it", "## Diff it\n\n## Run it"), "the headings"),
        (right.replace("# Title", "Title"), "a title"),
        (right.replace("filler\n", ""), "lines, not 150"),
        (right + "\nfiller" * 900, "lines, not 150"),
        (long + "\nfiller" * 600, "lines, not 150"),
        (right.replace("### One\n", "", 1), "<details> is for the answer"),
        (right.replace("## Run it\n", f"## Run it\n\n{answer()}"), "<details> is for the answer"),
        (right.replace("<details>", "").replace("</details>", ""), "0 <details>"),
        (right.replace("\n".join(exercise), "", 1), "2 exercises"),
    ]:
        assert message in "\n".join(map(str, structure_problems(write(root, wrong)))), wrong[:99]


def test_what_is_new_stands_whole(root: Path) -> None:
    worker = root / "lessons/02-b/worker.py"
    worker.write_text(NEW + "\n    def stop(self):\n        wake()\n")
    function = ["def stop(self):", "    wake()"]
    statement = ["-- name: get_it", "SELECT 1;"]
    whole = block("python", *function) + block("sql", *statement)
    assert not list(whole_problems(write(root, whole)))
    for wrong, name in [
        (block("sql", *statement) + block("python", "def stop(self):", "    ..."), "stop"),
        (block("python", *function) + block("sql", "-- name: get_it"), "get_it"),
    ]:
        (problem,) = whole_problems(write(root, wrong))
        assert name in problem.text


def test_links(root: Path) -> None:
    targets = ["../01-a/README.md#run-it", "worker.py", "../../lessons", "#a-b-1", "worker.py#L6"]
    titles = "# A `b`\n\n## A b\n\n"
    right = titles + " ".join(f"[x]({target})" for target in [*targets, "https://nowhere.invalid"])
    assert not list(link_problems(write(root, right)))
    targets = ["../01-a/README.md#rum-it", "Worker.py", "../03-c", "#a-b-2", "worker.py#L7", "/x"]
    wrong = titles + " ".join(f"![x]({target})" for target in targets)
    problems = list(link_problems(write(root, wrong + '\n<img src="none.svg">')))
    assert len(problems) == len(targets) + 1
    assert {problem.line for problem in problems} == {5, 6}


def test_slugs_are_those_of_github(root: Path) -> None:
    readme = write(root, "# What's `SKIP LOCKED`, then?\n\n## a_b-c: [d](e) & f\n\n## Run it\n")
    assert slugs(readme) == {"whats-skip-locked-then", "a_b-c-d--f", "run-it"}


@pytest.mark.skipif(mermaid_is_missing() is not None, reason=str(mermaid_is_missing()))
def test_a_diagram_that_is_wrong(root: Path) -> None:
    right = block("mermaid", "stateDiagram-v2", "    [*] --> QUEUED: create_task")
    wrong = block("mermaid", "flowchart LR", "    a[x --> b")
    (problem,) = diagram_problems(write(root, right + wrong))
    assert problem.line == 6


PROGRAM = ROOT / "tests" / "readmes.py"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["check", PROGRAM], 2, "is not a README of this repository"),
        (["check", ROOT / "README.md"], 1, "There is no Postgres at TEST_DATABASE_URL."),
    ],
    ids=["no README", "no server"],
)
def test_wrong_arguments_are_one_clear_line(
    arguments: list[str | Path], status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_DATABASE_URL", "nonsense")
    result = subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True)
    assert result.returncode == status
    assert message in result.stderr.splitlines()[-1]
