"""What the documents tell people to type is typed: README's shell blocks, commands within sentences, each --help's example.

Every line runs in a pseudo-terminal and a shell, in a folder in which `liminal` and `./run.sh` are this checkout's, against
a fake provider where the text names a real one; ids stand in for placeholders, and questions are answered.
"""

import re
import shlex
import sys
from contextlib import closing

import pytest

from conftest import ROOT, Terminal, answers, status
from provider import openai_stream
from test_manners import commands

README, AGENTS = ((ROOT / name).read_text() for name in ("README.md", "AGENTS.md"))
SKIPPED = {"./run.sh check": "installs packages, and runs these very tests"}
ANSWERS = {  # what a line asks for, and what a person types
    r"providers key": ("_KEY: ", "sk-test\r"),
    r"delete|--kill": ("[y/N] ", "y\r"),
    r"^(\./run\.sh|liminal)$": ("> ", "/quit\r"),
}
LINE = re.compile(r"(?:\./run\.sh|liminal)(?: .*)?")


def shell_lines(document: str) -> list[str]:
    """The lines of all shell blocks, without comments, in their order."""
    blocks = re.findall(r"(?ms)^```sh\n(.*?)^```$", document)
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not skipped(line)]


def inline_lines(document: str) -> list[str]:
    """The commands that stand in a sentence, but those that only show a form, as `liminal COMMAND` does."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```$", "", document))
    return [
        span for span in spans if LINE.fullmatch(span) and not re.search(r"\.\.\.|COMMAND", span) and not skipped(span)
    ]


def skipped(line: str) -> bool:
    return any(line.startswith(name) for name in SKIPPED)


def examples(liminal) -> list[str]:
    """The example of every command's --help."""
    found = [re.search("example: (.*)", liminal.cli(name, "--help").stdout) for name in commands()]
    return [one[1] for one in found]


@pytest.fixture
def reader(make_liminal, provider):
    """An installation as a reader has it; `reader.type(line)` runs a line in its folder and gives its terminal, ended."""
    urls = {"OLLAMA_HOST": provider.url, "ANTHROPIC_API_KEY": None, "OPENAI_API_KEY": None, "LIMINAL_URL": None}
    liminal = make_liminal(**urls, LIMINAL_MODEL="demo/guide")
    for path in (liminal.home / "run.sh", liminal.home / "liminal"):
        path.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(ROOT / "liminal.py")])} "$@"\n')
        path.chmod(0o755)
    (liminal.home / "data").symlink_to(liminal.data)
    liminal.env |= {"PATH": f"{liminal.home}:{liminal.env['PATH']}", "TERM": "xterm"}
    liminal.type = lambda line: type_line(liminal, line)
    return liminal


def prepared(liminal, line: str) -> str:
    """The line with addresses of this installation and ids of a fresh thread; what it needs is there."""
    liminal.provider.reset()
    for _ in range(5):
        liminal.provider.script(*openai_stream("the sky is blue"))
    if not answers(liminal.edge):
        assert liminal.cli("up").returncode == 0
    start = liminal.send("why is the sky blue?", model="demo/load-9-0")[0].data
    if " stop" in line:
        status(
            liminal.api("POST", "/api/v1/messages", {"content": "x", "model": "demo/load-900-20", "background": True}),
            202,
        )
    real = {"https://openrouter.ai/api/v1": liminal.provider.openai_url, "http://127.0.0.1:8765": liminal.edge}
    real |= {
        "3f2a": start["thread_id"][:8],
        "7be1": start["message_id"][:8],
        "THREAD": start["thread_id"],
        "MESSAGE": start["message_id"],
    }
    for word, value in real.items():
        line = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", value, line)
    return line


def type_line(liminal, line: str) -> Terminal:
    line = prepared(liminal, line)
    with closing(Terminal(["sh", "-c", line], liminal.env, liminal.home, (40, 200))) as terminal:
        for pattern, (question, answer) in ANSWERS.items():
            if re.search(pattern, line):
                terminal.expect(question, 20)
                terminal.send(answer)
        code = terminal.wait(60)
        assert code == 0 and "Traceback" not in terminal.screen, f"{line}: {code}\n{terminal.screen}"
        return terminal


@pytest.mark.slow
def test_every_line_of_readmes_shell_blocks_works(reader):
    lines = shell_lines(README)
    screens = {line.split()[0]: reader.type(line).screen for line in lines}
    assert len(lines) >= 8 and all(f"event: {kind}" in screens["curl"] for kind in ("start", "text", "done"))


@pytest.mark.slow
def test_every_command_within_a_sentence_works(reader):
    for line in dict.fromkeys(inline_lines(README) + inline_lines(AGENTS)):
        reader.type(line)


@pytest.mark.slow
def test_every_example_of_help_works(reader):
    lines = examples(reader)
    for line in lines:
        reader.type(line)
    assert len(lines) == len(commands())


def test_every_command_stands_in_readme():
    text = re.sub(r"(?ms)^```.*?^```$", "", README)
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`", text) + shell_lines(README))))
    assert set(commands()) <= words and len(commands()) > 20


def test_every_test_file_that_a_document_names_exists():
    names = re.findall(r"tests/test_\w+\.py", README + AGENTS)
    assert names and all((ROOT / name).exists() for name in names)
