"""Parsing diagrams with mermaid itself, where .ci/run has installed it."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from readme_checks.parsing import Problem, Readme

DIRECTORY = Path(__file__).parents[2] / ".mermaid"

# Only DOMPurify, which cleans labels, would need a browser; how a diagram is built does not depend
# on it.
SCRIPT = """
import { readFileSync } from "node:fs";
import DOMPurify from "dompurify";
DOMPurify.addHook = () => {};
DOMPurify.sanitize = (text) => text;
const { default: mermaid } = await import("mermaid");
const problems = [];
for (const diagram of JSON.parse(readFileSync(0, "utf8"))) {
    problems.push(await mermaid.parse(diagram).then(() => "", (error) => error.message));
}
console.log(JSON.stringify(problems));
"""


def mermaid_is_missing() -> str | None:
    """Why diagrams cannot be parsed here, if they cannot."""
    if not shutil.which("node"):
        return "there is no node to parse mermaid with"
    if not (DIRECTORY / "node_modules" / "mermaid").exists():
        return f"mermaid is not installed in {DIRECTORY.name}; .ci/run does that"
    return None


def diagram_problems(readme: Readme) -> Iterator[Problem]:
    """The diagrams that mermaid cannot parse."""
    blocks = [block for block in readme.blocks if block.kind == "mermaid"]
    if not blocks:
        return
    answer = subprocess.run(
        ["node", "--input-type=module", "--eval", SCRIPT],
        cwd=DIRECTORY,  # where it looks for packages
        input=json.dumps(["\n".join(block.lines) for block in blocks]),
        check=True,
        capture_output=True,
        text=True,
    )
    for block, message in zip(blocks, json.loads(answer.stdout), strict=True):
        if message:
            lines = "\n".join(f"  {line}" for line in message.splitlines())
            yield readme.problem(block.line, f"mermaid cannot parse this\n{lines}")
