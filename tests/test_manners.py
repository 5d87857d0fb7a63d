"""Manners of every command: help, errors, exit codes, colour, what may reach a terminal, closed pipes, start-up, status."""

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
import uuid
from contextlib import closing

import pytest

from conftest import ROOT, free_ports, status
from provider import openai_stream
from test_cli import ECHO, good, one_line, running

EVIL = "a\x1b[31mred\x1b]0;title\x07b\x9b2Jc\x85d\u202etxt\u2066e\x7ff\x08g"
SEEN = "a\\x1b[31mred\\x1b]0;title\\x07b\\x9b2Jc\\x85d\\u202etxt\\u2066e\\x7ff\\x08g"
OWN = re.compile(r"\x1b\[[012]?m|\r\n")  # bold, grey and their end; a line's end
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
LISTINGS = [
    "threads",
    "show",
    "search needle",
    "runs",
    "overflow",
    "stats",
    "models",
    "tools",
    "keys",
    "users",
    "providers",
    "status",
    "export",
]


def commands() -> list[str]:
    """The names in `liminal --help`."""
    run = subprocess.run([sys.executable, ROOT / "liminal.py", "--help"], capture_output=True, text=True, timeout=30)
    return re.findall(r"(?m)^    (\w+) ", run.stdout)


def shown(terminal, code=0) -> str:
    """All that a command wrote to its terminal, nothing of which may be a control but our own."""
    assert terminal.wait(20) == code, terminal.screen
    assert not CONTROL.search(OWN.sub("\n", terminal.screen)), ascii(terminal.screen)
    return terminal.screen


################ Help, errors, exit codes


@pytest.mark.slow
def test_every_commands_help_shows_an_example(shared):
    names = commands()
    for name in names:
        out = good(shared.cli(name, "--help"))
        assert re.search(rf"example: .*liminal {name}\b", out), out
    assert len(names) > 20


def test_a_commands_help_shows_an_example(shared):
    assert "example: liminal search blue sky" in good(shared.cli("search", "--help"))


@pytest.mark.slow
def test_help_documents_the_exit_codes(shared):
    out = good(shared.cli("--help"))
    assert re.search("0 .*1 .*2 .*3 .*130 ", out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    ["rename x", "delete", "search", "test", "test nothing", "export --format pdf", "chat -o key", "threads -n x"],
)
def test_wrong_usage_is_status_2(shared, words):
    run = shared.cli(*words.split())
    assert run.returncode == 2 and run.stdout == "" and "usage: liminal" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        *LISTINGS,
        "chat hi",
        "fork",
        "rename 0000 x",
        "delete -y 0000",
        "attach",
        "stop",
        "retry",
        "react 0000 👍",
        "test contract",
    ],
)
def test_no_server_is_status_3_for_every_command(shared, words):
    if words != "status":
        url = f"http://127.0.0.1:{free_ports(1)[0]}"
        one_line(shared.cli(*words.split(), env={"LIMINAL_URL": url}), 3, url, "liminal up")


@pytest.mark.slow
def test_stopping_nothing_is_one_line(shared):
    one_line(shared.cli("stop"), 1, "no reply")


################ What may reach a terminal, and colour


@pytest.fixture
def evil(shared):
    """A thread whose title, message and reply are full of controls."""
    shared.provider.script(*openai_stream(EVIL))
    thread_id = shared.send(f"needle {EVIL}", model="openai/echo")[0].data["thread_id"]
    status(shared.api("PATCH", f"/api/v1/threads/{thread_id}", {"title": f"{EVIL} title"}), 200)
    shared.thread_id = thread_id
    return shared


def test_a_search_passes_no_controls_on(evil):
    assert SEEN in shown(evil.terminal("search", "needle", size=(24, 200)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["threads -n 1", "show", "export", "export --format jsonl", "chat -c again -m openai/echo"]
)
def test_no_command_passes_controls_on(evil, words):
    evil.provider.script(*openai_stream(EVIL)) if "again" in words else None
    screen = shown(evil.terminal(*words.split(), size=(24, 200)))
    assert SEEN in screen or "jsonl" in words and "\\x9b2J" in screen


@pytest.mark.slow
def test_the_question_before_deleting_passes_no_controls_on(evil):
    terminal = evil.terminal("delete", evil.thread_id, size=(24, 200))
    terminal.expect("[y/N]")
    terminal.send("n\r")
    assert "\\x9b2Jc" in shown(terminal, 1) or "\\\\x9b2Jc" in terminal.screen


@pytest.mark.slow
def test_a_renamed_title_passes_no_controls_on(evil):
    assert SEEN in shown(evil.terminal("rename", evil.thread_id, EVIL, size=(24, 200)))


@pytest.mark.slow
def test_json_events_pass_no_controls_on(shared):
    shared.provider.script(*openai_stream(EVIL))
    assert "\\x9b2J" in shown(shared.terminal("chat", "hi", "--json", *ECHO, size=(24, 400)))


def test_a_built_in_tool_says_why_it_failed(shared):
    run = shared.cli("chat", 'CALL liminal__file_read {"path": "nowhere.txt"}', *ECHO)
    assert (
        run.returncode == 0 and "failed: " in run.stderr and "no such file" in run.stderr
    )  # and no traceback in a log


@pytest.mark.slow
def test_a_tools_failure_passes_no_controls_on(shared):
    shared.expect_traceback = True  # what is logged is another test's subject
    call = json.dumps({"path": EVIL.replace("\x1b", "\u009b")}, ensure_ascii=False)
    shared.provider.script(*openai_stream(("tool", "liminal__file_read", call)))
    shared.provider.script(*openai_stream("done"))
    assert "liminal__file_read" in shown(shared.terminal("chat", "hi", *ECHO, size=(24, 400)))


def test_an_error_in_mid_stream_passes_no_controls_on(shared):
    shared.provider.script(
        *openai_stream("begun", stop=None), f"data: {json.dumps({'error': {'message': EVIL}})}\n\n".encode()
    )
    assert "\\x9b2Jc" in shown(shared.terminal("chat", "hi", *ECHO, size=(24, 200)), 1)


@pytest.mark.slow
def test_models_and_providers_pass_no_controls_on(shared):
    fields = {"kind": "openai", "base_url": shared.provider.openai_url, "models": ["m\x9b2J\u202e"]}
    code, _ = shared.api("PUT", "/api/v1/providers/evil", fields)
    for words in ("models", "providers"):
        shown(shared.terminal(words, size=(24, 200)))
    assert code == 400 or status(shared.api("DELETE", "/api/v1/providers/evil"), 204) is None


@pytest.mark.slow
@pytest.mark.parametrize("words", ["search needle", "chat hi -u -m openai/echo", "show"])
def test_nothing_is_coloured_where_no_color_is_set(evil, words):
    assert "\x1b" not in evil.terminal(*words.split(), env={"NO_COLOR": "1"}).screen
    assert "\x1b" not in shown(evil.terminals[-1])


@pytest.mark.slow
def test_notes_are_grey_on_a_terminal_only(shared):
    assert "\x1b[2m" in shown(shared.terminal("chat", "hi", "-u", *ECHO))
    run = shared.cli("chat", "hi", "-u", *ECHO)
    assert "\x1b" not in run.stdout + run.stderr and "tokens in" in run.stderr


################ Pipes that close, start-up


@pytest.mark.slow
@pytest.mark.parametrize("words", LISTINGS)
def test_a_listing_into_head_is_quiet(shared, words):
    shared.send("needle in a haystack", model="openai/echo")
    with running(shared, *words.split(), stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(20), process.stderr.read()) == (0, b"")


@pytest.mark.slow
@pytest.mark.parametrize("words", ["threads", "search needle", "export --format jsonl"])
def test_a_closed_pipe_is_quiet(shared, words):
    shared.send("needle in a haystack", model="openai/echo")
    ends = os.pipe()
    os.close(ends[0])
    with os.fdopen(ends[1], "wb") as closed, running(shared, *words.split(), stdout=closed) as process:
        assert (process.wait(20), process.stderr.read()) == (0, b"")


def modules(*args: str, env: dict) -> set[str]:
    """The first names of all modules that a command imports, or tries to."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *args], env=env, capture_output=True, text=True, timeout=30
    )
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize("words", ["--help", "chat hi -m openai/echo"])
def test_a_command_imports_only_the_standard_library(shared, words):
    before = modules("-c", "import copy, pickle", env=shared.env)  # what the interpreter and its folder bring along
    found = modules(ROOT / "liminal.py", *words.split(), env=shared.env)
    assert "argparse" in found and not found - before - sys.stdlib_module_names
    assert not {"asyncio", "sqlite3"} & found


################ status


def rows(run) -> dict[str, str]:
    """The lines of `liminal status` by their first word."""
    return {line.split()[0]: line for line in run.stdout.splitlines()}


def test_status_is_one_screen_of_what_runs(shared):
    run = shared.cli("status")
    seen, version = rows(run), shared.cli("--version").stdout.split()[1]
    assert run.returncode == 0 and run.stderr == "" and len(run.stdout.splitlines()) <= 24
    assert all(part in seen["domain"] for part in (shared.domain, version)) and shared.edge in seen["edge"]
    assert all("ok" in seen[name] for name in ("liminal.db", "messages.db", "overflow.db"))
    assert "0 in overflow.db" in seen["queue"]


@pytest.mark.slow
def test_status_names_keys_that_are_set_and_no_values(shared):
    status(
        shared.api(
            "PUT",
            "/api/v1/providers/unset",
            {"kind": "openai", "base_url": "http://127.0.0.1:9", "key_env": "UNSET_KEY"},
        ),
        200,
    )
    seen = rows(run := shared.cli("status"))
    status(shared.api("DELETE", "/api/v1/providers/unset"), 204)
    assert "ANTHROPIC_API_KEY is set" in seen["anthropic"] and "liminal providers key unset" in seen["unset"]
    assert (
        shared.key not in run.stdout
        and shared.env["ANTHROPIC_API_KEY"] == "test"
        and not re.search(r"\btest\b", seen["anthropic"])
    )


def test_status_names_files_that_others_can_read_and_the_mend(shared):
    path = shared.data / "mcp.json.mine"
    path.write_text("{}")
    path.chmod(0o644)
    seen = rows(shared.cli("status"))["files"]
    assert path.name in seen
    subprocess.run(re.search("chmod .*", seen)[0], shell=True, check=True)
    assert "files" not in rows(shared.cli("status"))
    path.unlink()


@pytest.mark.slow
def test_status_names_an_open_data_folder(make_liminal):
    liminal = make_liminal().start()
    liminal.data.chmod(0o755)
    assert "chmod" in liminal.cli("status").stdout


@pytest.mark.slow
def test_status_of_a_member_tells_no_owners_things(shared):
    user = status(shared.api("POST", "/api/v1/users", {"name": f"reader {uuid.uuid4()}"}), 201)
    key = status(shared.api("POST", "/api/v1/keys", {"name": "k", "user_id": user["id"]}), 201)["secret"]
    seen = rows(run := shared.cli("status", env={"LIMINAL_API_KEY": key}))
    assert run.returncode == 0 and "queue" not in seen and "messages.db" not in seen


@pytest.mark.slow
def test_status_with_a_wrong_key_still_says_what_runs(shared):
    run = shared.cli("status", env={"LIMINAL_API_KEY": "lt_sk_wrong"})
    assert run.returncode == 1 and shared.domain in run.stdout and "key" in run.stderr


@pytest.mark.slow
def test_status_of_what_does_not_run_is_3_with_the_mend(make_liminal):
    run = make_liminal().cli("status")
    assert run.returncode == 3 and all("`liminal up`" in rows(run)[name] for name in ("domain", "edge"))


@pytest.mark.slow
def test_status_without_the_domain_is_3(make_liminal):
    liminal = make_liminal().start()
    liminal.stop("domain")
    seen = rows(run := liminal.cli("status"))
    assert run.returncode == 3 and "`liminal up`" in seen["domain"] and "well" in seen["edge"] and run.stderr == ""


@pytest.mark.slow
def test_status_says_what_waits_for_a_domain_that_is_away(liminal):
    with liminal.stream({"content": "hi", "model": "openai/say-3000-200"}) as stream:
        for event in stream:
            if event.type == "text" and "t100" in event.data["text"]:
                break
        liminal.kill("domain")
    deadline = time.monotonic() + 20
    while not any(
        (waits := status(liminal.api("GET", "/api/v1/overflow"), 200))[name] for name in ("queue", "overflow")
    ):
        assert time.monotonic() < deadline, waits
    run = liminal.cli("status")
    assert run.returncode == 3 and re.search(r"[1-9]\d* .*`liminal overflow`", run.stdout), run.stdout


def corrupt(liminal, name: str, table: str):
    """Overwrite the last page of a table of a stopped installation; the root page where SQLite cannot tell the others."""
    with closing(sqlite3.connect(liminal.data / name)) as db:
        [(size,)] = db.execute("pragma page_size")
        try:
            [(page,)] = db.execute("select max(pageno) from dbstat where name = ?", (table,))
        except sqlite3.OperationalError:
            [(page,)] = db.execute("select rootpage from sqlite_master where name = ?", (table,))
    with open(liminal.data / name, "r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xde\xad\xbe\xef" * (size // 4))


@pytest.mark.slow
@pytest.mark.parametrize("name, table", [("messages.db", "chunks"), ("liminal.db", "threads")])
def test_status_names_a_corrupt_database_in_one_line(liminal, name, table):
    for _ in range(40):
        status(liminal.api("POST", "/api/v1/threads", {"title": "t" * 200}), 201)
    liminal.send("a long message " * 2000, model="openai/echo")
    for server in ("edge", "domain"):
        liminal.stop(server)
    corrupt(liminal, name, table)
    seen = rows(run := liminal.start().cli("status"))
    liminal.expect_traceback = True  # it may report what it cannot read
    assert run.returncode == 1 and "backup" in run.stdout, run.stdout
    assert "backup" in seen[name] and set(seen) <= {
        "data",
        "domain",
        "edge",
        "anthropic",
        "openai",
        "liminal.db",
        "messages.db",
        "overflow.db",
        "queue",
    }
