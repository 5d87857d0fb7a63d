"""The commands as a script uses them: piped, without a terminal. What stands on which output, exit codes, signals."""

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading

import pytest

from conftest import ROOT, free_ports, status, text
from provider import openai_stream

ECHO, COMMANDS = ("-m", "openai/echo"), [
    "chat",
    "threads",
    "show",
    "models",
    "keys",
    "providers",
    "up",
    "down",
    "status",
]


def tokens(stop, start=0):
    return "".join(f" t{i}" for i in range(start, stop))


def one_line(run, code, *words):
    """Assert a failure as every command reports it: one line on standard error, nothing on standard output."""
    assert run.returncode == code, (run.returncode, run.stdout, run.stderr)
    assert "Traceback" not in run.stderr and len(run.stderr.splitlines()) == 1, run.stderr
    assert run.stderr.startswith("liminal: ") and run.stdout == "", (run.stdout, run.stderr)
    assert all(word in run.stderr for word in words), run.stderr


def good(run) -> str:
    assert (run.returncode, run.stderr) == (0, ""), (run.returncode, run.stderr)
    return run.stdout


@contextlib.contextmanager
def running(liminal, *args, **options):
    """A command that goes on beside the test, its outputs in pipes."""
    command = [sys.executable, ROOT / "liminal.py", *args]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen(command, env=liminal.env, cwd=liminal.home, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(pipe, wanted: bytes) -> bytes:
    data = b""
    while wanted not in data:
        piece = os.read(pipe.fileno(), 65536)
        assert piece, f"{wanted!r} never came: {data!r}"
        data += piece
    return data


def newest(liminal) -> list[dict]:
    """The messages of the newest thread."""
    thread = status(liminal.api("GET", "/api/v1/threads?limit=1"), 200)["threads"][0]
    return status(liminal.api("GET", f"/api/v1/threads/{thread['id']}/messages"), 200)["messages"]


def prompts(liminal) -> list[tuple]:
    """What the provider was asked last, as (role, text)."""
    return [(one["role"], one["content"]) for one in liminal.provider.requests[-1]["body"]["messages"]]


################ chat


def test_chat_prints_the_reply_and_nothing_else(shared):
    assert good(shared.cli("chat", "hello", "there", *ECHO)) == "hello there\n"


def test_chat_takes_piped_input(shared):
    assert good(shared.cli("chat", *ECHO, input="from a pipe\n")) == "from a pipe\n"


def test_piped_input_comes_before_the_argument(shared):
    shared.cli("chat", "sum it up", *ECHO, input="first\nsecond\n")
    assert prompts(shared) == [("user", "first\nsecond\n\nsum it up")]


def test_a_question_with_a_space_needs_no_command(shared):
    assert good(shared.cli("a question", *ECHO)) == "a question\n"


def test_options_before_a_question_mean_chat(shared):
    assert good(shared.cli(*ECHO, "hi")) == "hi\n"


def test_an_option_with_an_equals_sign_means_chat_too(shared):
    assert good(shared.cli("--model=openai/echo", "hi there")) == "hi there\n"


def test_a_word_with_piped_input_means_chat(shared):
    assert good(shared.cli("translate", *ECHO, input="bonjour")) == "bonjour\n\ntranslate\n"


def test_a_single_unknown_word_is_a_usage_error(shared):
    with running(shared, "statsu") as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, b"") and b"statsu" in err
    assert all(name in err.decode() for name in COMMANDS), err


def test_a_wrong_option_is_a_usage_error(shared):
    run = shared.cli("chat", "hi", "--modle", "x")
    assert run.returncode == 2 and run.stdout == "" and "--modle" in run.stderr


def test_help_names_commands_and_settings(shared):
    out = good(shared.cli("--help"))
    assert all(word in out for word in [*COMMANDS, "LIMINAL_DATA", "LIMINAL_URL", "ANTHROPIC_API_KEY", "OLLAMA_HOST"])


def test_version_is_that_of_the_servers(shared):
    known = status(shared.api("GET", "/health", key=""), 200)["version"]
    assert good(shared.cli("--version")) == f"liminal {known}\n"


def test_system_text_reaches_the_provider(shared):
    shared.cli("chat", "hi", "-s", "be brief", *ECHO)
    assert prompts(shared) == [("system", "be brief"), ("user", "hi")]


def test_continue_goes_on_with_the_newest_thread(shared):
    shared.cli("chat", "one", *ECHO)
    assert good(shared.cli("chat", "-c", "two", *ECHO)) == "two\n"
    assert prompts(shared) == [("user", "one"), ("assistant", "one"), ("user", "two")]


def test_thread_takes_a_prefix(shared):
    shared.cli("chat", "older", *ECHO)
    thread_id = newest(shared)[0]["thread_id"]
    shared.cli("chat", "newer", *ECHO)
    assert good(shared.cli("chat", "-t", thread_id[:8], "more", *ECHO)) == "more\n"
    assert [said for _, said in prompts(shared)] == ["older", "older", "more"]


def test_piped_replies_are_exact_to_the_byte(shared):
    hostile = "a\x1b[31m\x07\x00\x9b\r\nü😀\u202e\u2028\tend\n"
    shared.provider.script(*openai_stream(*hostile))
    with running(shared, "chat", "hi", *ECHO) as process:
        out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == (hostile.encode(), b"", 0)


def test_piped_input_is_exact_to_the_byte(shared):
    said = "a\r\nb\tü😀\x1b[31m"
    with running(shared, "chat", *ECHO, stdin=subprocess.PIPE) as process:
        process.communicate(said.encode(), timeout=20)
    assert prompts(shared) == [("user", said)]


def test_thinking_does_not_reach_standard_output(shared):
    assert good(shared.cli("chat", "hi", "-m", "anthropic/think-6-0")) == tokens(6, 3) + "\n"


def test_a_fast_long_reply_is_whole(shared):
    assert good(shared.cli("chat", "hi", "-m", "demo/load-2000-0")) == tokens(2000) + "\n"


################ threads, show, react, models


def test_threads_lists_the_newest_first(shared):
    for said in ("the older one", "the newer one"):
        shared.cli("chat", said, *ECHO)
    newer, older = good(shared.cli("threads", "-n", "2")).splitlines()
    assert newer.endswith("the newer one") and older.endswith("the older one")
    assert newer.startswith(newest(shared)[0]["thread_id"][:8])


def test_show_ends_with_usage(shared):
    shared.cli("chat", "show me", *ECHO)
    lines = good(shared.cli("show", newest(shared)[0]["thread_id"][:6])).splitlines()
    assert "show me" in lines[0] and lines.count("show me") == 2
    assert "12 tokens in" in lines[-1] and "2 out" in lines[-1] and "$" not in lines[-1]


def test_show_without_a_thread_shows_the_newest(shared):
    shared.cli("chat", "the very newest", *ECHO)
    assert "the very newest" in good(shared.cli("show")).splitlines()[0]


def test_show_adds_up_the_cost_of_a_thread(shared):
    fields = {"kind": "openai", "base_url": shared.provider.openai_url, "prices": {"*": [1000, 100, 10000]}}
    status(shared.api("PUT", "/api/v1/providers/priced", fields), 200)
    shared.cli("chat", "one", "-m", "priced/say-5-0")
    shared.cli("chat", "-c", "two", "-m", "priced/say-5-0")
    last = good(shared.cli("show")).splitlines()[-1]
    assert "24 tokens in" in last and "10 out" in last and "$0.124" in last  # 24 x 0.001 + 10 x 0.01


def test_show_tells_why_a_reply_failed(shared):
    assert shared.cli("chat", "hi", "-m", "openai/say-9-0-end@4").returncode == 1
    out = good(shared.cli("show"))
    assert tokens(4) in out and "error" in out and newest(shared)[-1]["error"]["message"] in out


def test_react_and_take_it_back(shared):
    shared.cli("chat", "hi", *ECHO)
    message_id = newest(shared)[-1]["id"]
    assert good(shared.cli("react", message_id[:8], "👍")) == "👍 1\n"
    assert "👍" in good(shared.cli("show"))
    assert "👍" not in good(shared.cli("react", message_id[:8], "👍", "--remove"))
    assert newest(shared)[-1]["reactions"] == []


def test_models_names_what_works_and_why_not(shared):
    lines = good(shared.cli("models")).splitlines()
    [default] = [line for line in lines if line.startswith("*")]
    [ollama] = [line for line in lines if "ollama/" in line]
    assert "anthropic/" in default and "no: cannot reach" in ollama and any("openai/say-20-0" in line for line in lines)


################ keys, users, providers


def test_a_created_key_works_until_it_is_revoked(shared):
    run = shared.cli("keys", "create", "my phone")
    key = {"LIMINAL_API_KEY": run.stdout.strip()}
    assert run.returncode == 0 and re.fullmatch(r"lt_sk_\S+\n", run.stdout)
    [row] = [line for line in good(shared.cli("keys")).splitlines() if "my phone" in line]
    assert shared.cli("threads", env=key).returncode == 0
    assert "my phone" in good(shared.cli("keys", "revoke", row.split()[0]))
    one_line(shared.cli("threads", env=key), 1, "unauthorized")


def test_a_key_is_listed_without_its_secret(shared):
    secret = shared.cli("keys", "create", "tablet").stdout.strip()
    out = good(shared.cli("keys", "list"))
    assert "tablet" in out and secret[:10] in out and secret not in out


def test_a_user_of_their_own_sees_their_own_threads(shared):
    user_id = shared.cli("users", "create", "ada").stdout.split()[0]
    key = {"LIMINAL_API_KEY": shared.cli("keys", "create", "ada's", "--user", user_id[:8]).stdout.strip()}
    assert "ada" in good(shared.cli("users")) and good(shared.cli("threads", env=key)) == ""
    one_line(shared.cli("show", env=key), 1, "no thread", "liminal chat")
    one_line(shared.cli("users", env=key), 1, "owner", "forbidden")
    assert good(shared.cli("users", "delete", user_id[:8], "-y")) == "deleted\n" and "ada" not in good(shared.cli("users"))


def test_a_provider_is_added_used_and_deleted(shared):
    add = ("providers", "add", "mine", "--base-url", shared.provider.openai_url, "--model", "say-3-0")
    assert "mine" in good(shared.cli(*add)) and "mine" in good(shared.cli("providers"))
    assert good(shared.cli("chat", "hi", "-m", "mine/say-3-0")) == " t0 t1 t2\n"
    assert good(shared.cli("providers", "delete", "mine")) == "deleted\n"
    assert "mine" not in good(shared.cli("providers", "list"))


@pytest.fixture
def keyed(shared):
    """A provider `keyed` that needs KEYED_KEY, which nobody has set yet."""
    (shared.data / "env").unlink(missing_ok=True)
    url = shared.provider.openai_url
    shared.cli("providers", "add", "keyed", "--base-url", url, "--key-env", "KEYED_KEY", "--model", "echo")
    yield shared
    shared.cli("providers", "delete", "keyed")


def test_providers_key_is_used_by_the_next_message(keyed):
    assert "sk-secret-1" not in good(keyed.cli("providers", "key", "keyed", input="sk-secret-1\n"))
    assert good(keyed.cli("chat", "hi", "-m", "keyed/echo")) == "hi\n"
    assert keyed.provider.requests[-1]["headers"]["authorization"] == "Bearer sk-secret-1"


def test_providers_key_replaces_its_own_line_only(keyed):
    path = keyed.data / "env"
    path.write_text("# mine\nexport KEYED_KEY=old\nOTHER_KEY='a b'\n#KEYED_KEY=note\n")
    good(keyed.cli("providers", "key", "keyed", input="sk-new\n"))
    assert sorted(path.read_text().splitlines()) == sorted(
        ["# mine", "OTHER_KEY='a b'", "#KEYED_KEY=note", "KEYED_KEY=sk-new"]
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("secret", ["", "two words", "a'b"])
def test_what_is_no_key_changes_nothing(keyed, secret):
    (keyed.data / "env").write_text("KEYED_KEY=old\n")
    one_line(keyed.cli("providers", "key", "keyed", input=secret + "\n"), 1, "nothing was changed")
    assert (keyed.data / "env").read_text() == "KEYED_KEY=old\n"


def test_a_provider_without_its_key_says_how_to_set_it(keyed):
    one_line(keyed.cli("chat", "hi", "-m", "keyed/echo"), 1, "KEYED_KEY", "liminal providers key keyed")


def test_a_provider_that_takes_no_key_is_named(shared):
    one_line(shared.cli("providers", "key", "demo", input="x\n"), 1, "demo", "anthropic", "openai")


def test_a_key_that_the_servers_lack_is_noted(keyed):
    run = keyed.cli("chat", "hi", *ECHO, env={"KEYED_KEY": "x"})
    assert run.stdout == "hi\n" and "KEYED_KEY" in run.stderr and "liminal providers key keyed" in run.stderr


def test_the_only_key_of_an_environment_is_noted_too(keyed):
    run = keyed.cli("chat", "hi", *ECHO, env={"KEYED_KEY": "x", "ANTHROPIC_API_KEY": "", "OPENAI_API_KEY": ""})
    assert run.stdout == "hi\n" and "KEYED_KEY" in run.stderr


################ Errors: one line, what to do, no traceback


@pytest.mark.parametrize(
    "args, input, words",
    [
        (["chat"], "", ["give a message"]),
        (["chat", "  \n "], " \n", ["give a message"]),
        (["chat", "hi", "-m", "nope/x"], "", ["nope/x", "openai", "unknown_model"]),
        (["chat", "hi", "-m", "demo/x"], "", ["load-", "unknown_model"]),
        (["chat", "hi", "-m", "openai/nothing"], "", ["liminal models", "unknown_model"]),
        (["chat", "hi", "-m", "openai/echo-s401@0"], "", ["OPENAI_API_KEY", "provider_auth"]),
        (["chat", "hi", "-m", "openai/echo-html@0"], "", ["provider"]),
        (["chat", "hi", "-t", "0000"], "", ["thread", "0000", "not_found"]),
        (["chat", *ECHO], "x" * 400_000, ["too_large", "100000"]),
        (["chat", *ECHO], "x" * 9_000_000, ["too_large", "8388608"]),
        (["chat", *ECHO], "bad \udcff byte", ["UTF-8"]),
        (["show", "0000"], "", ["thread", "0000", "not_found"]),
        (["show", "../../health"], "", ["not_found"]),
        (["threads", "-n", "0"], "", ["limit"]),
        (["react", "0000", "👍"], "", ["message", "0000"]),
        (["keys", "create"], "", ["name"]),
        (["keys", "revoke", "0000"], "", ["key", "0000"]),
        (["users", "delete", "0000"], "", ["user", "0000"]),
        (["providers", "delete", "nope"], "", ["nope"]),
        (["providers", "add", "bare"], "", ["base_url"]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_an_error_is_one_line(shared, args, input, words):
    with running(shared, *args, stdin=subprocess.PIPE) as process:
        out, err = process.communicate(input.encode("utf-8", "surrogateescape"), timeout=20)
    one_line(subprocess.CompletedProcess(args, process.returncode, out.decode(), err.decode()), 1, *words)


def test_an_argument_that_is_not_text_is_one_line(shared):
    with running(shared, "chat", b"bad \xff byte", *ECHO) as process:
        out, err = process.communicate(timeout=20)
    one_line(subprocess.CompletedProcess([], process.returncode, out.decode(), err.decode()), 1, "UTF-8")


def test_a_provider_that_is_not_there_is_one_line(shared):
    port = free_ports(1)[0]
    shared.cli("providers", "add", "gone", "--base-url", f"http://127.0.0.1:{port}/v1")
    one_line(shared.cli("chat", "hi", "-m", "gone/x"), 1, f"127.0.0.1:{port}", "provider_error")


def test_a_provider_that_ends_too_early_keeps_what_came(shared):
    run = shared.cli("chat", "hi", "-m", "openai/say-9-0-end@4")
    assert (run.returncode, run.stdout) == (1, tokens(4) + "\n")
    assert run.stderr.startswith("liminal: ") and "provider_incomplete" in run.stderr


def test_no_server_is_status_3(shared):
    env = {"LIMINAL_URL": f"http://127.0.0.1:{free_ports(1)[0]}"}
    one_line(shared.cli("chat", "hi", env=env), 3, env["LIMINAL_URL"], "liminal up")
    assert shared.cli("status", env=env).returncode == 3


@pytest.mark.parametrize("key", ["lt_sk_wrong", "schlüssel→", "two words\nand a line"])
def test_a_wrong_key_is_one_line(shared, key):
    one_line(shared.cli("threads", env={"LIMINAL_API_KEY": key}), 1, "key", "unauthorized")


def test_no_key_at_all_is_one_line(shared, tmp_path):
    one_line(shared.cli("threads", env={"LIMINAL_DATA": str(tmp_path)}), 1, "LIMINAL_API_KEY", "cli.key")


@pytest.mark.parametrize("name, value", [("EDGE_PORT", "no"), ("EDGE_PORT", "70000"), ("QUEUE_SIZE", "-1")])
def test_a_setting_that_makes_no_sense_is_one_line(shared, name, value):
    one_line(shared.cli("threads", env={f"LIMINAL_{name}": value}), 1, name, value)


@pytest.mark.parametrize("url", ["127.0.0.1:8765", "localhost:8765", "http://127.0.0.1:port", "ftp://127.0.0.1:1"])
def test_an_address_that_makes_no_sense_is_one_line(shared, url):
    run = shared.cli("threads", env={"LIMINAL_URL": url})
    one_line(run, run.returncode or -1, "LIMINAL_URL")


def test_an_env_file_that_is_no_text_is_one_line(shared, tmp_path):
    (tmp_path / "env").write_bytes(b"NAME=\xff\xfe\n")
    run = shared.cli("threads", env={"LIMINAL_DATA": str(tmp_path), "LIMINAL_API_KEY": shared.key})
    assert "Traceback" not in run.stderr and (run.returncode == 0 or str(tmp_path / "env") in run.stderr)


@pytest.mark.parametrize("words", ["models", "chat hi -m openai/echo"])
def test_an_output_that_cannot_be_written_is_one_line(shared, words):
    with open("/dev/full", "wb") as full, running(shared, *words.split(), stdout=full) as process:
        err = process.communicate(timeout=20)[1].decode()
    one_line(subprocess.CompletedProcess(words, process.returncode, "", err), 1, "space")


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_closed_standard_stream_is_no_traceback(shared, closed):
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, ROOT / "liminal.py", "chat", "hi", *ECHO]
    run = subprocess.run(command, env=shared.env, capture_output=True, text=True, timeout=20)
    assert (run.returncode, run.stderr) == (0, "") and run.stdout == ("hi\n" if closed == "<&-" else "")


def test_a_data_folder_that_is_a_file_is_one_line(shared, tmp_path):
    (tmp_path / "data").write_text("no folder")
    run = shared.cli("threads", env={"LIMINAL_DATA": str(tmp_path / "data")})
    one_line(run, run.returncode or -1, str(tmp_path / "data"))


@contextlib.contextmanager
def web_server(code: int, body: bytes, kind="text/html"):
    """Some other program's web server; gives its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


STRANGERS = [(404, b"<h1>no</h1>"), (200, b"<!doctype html><title>Hello</title>"), (200, b'{"a": 1}'), (200, b"[]")]


@pytest.mark.parametrize("code, body", STRANGERS)
def test_a_server_that_is_not_liminal_is_one_line(shared, code, body):
    with web_server(code, body) as port:
        url = f"http://127.0.0.1:{port}"
        one_line(shared.cli("chat", "hi", env={"LIMINAL_URL": url}), 3, "not Liminal")
        seen = shared.cli("status", env={"LIMINAL_URL": url})
    assert seen.returncode == 3 and url in seen.stdout and seen.stderr == ""


def test_a_server_that_speaks_no_http_is_one_line(shared):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet():
            with server.accept()[0] as client:
                client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                client.recv(1000)

        threading.Thread(target=greet, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        one_line(shared.cli("threads", env={"LIMINAL_URL": url}), 3, url)


################ Going away early


def test_a_reader_that_has_enough_ends_it_quietly(shared):
    with running(shared, "chat", "hi", "-m", "openai/gate-3000-5") as process:
        read_until(process.stdout, b" t4")
        process.stdout.close()
        shared.provider.open_gate()
        assert (process.wait(20), process.stderr.read()) == (0, b"")
    assert text(shared.attach(newest(shared)[-1]["id"])) == tokens(3000)


def test_a_listing_into_a_closed_pipe_ends_quietly(shared):
    ends = os.pipe()
    os.close(ends[0])
    with os.fdopen(ends[1], "wb") as closed, running(shared, "models", stdout=closed) as process:
        assert (process.wait(20), process.stderr.read()) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_only_detaches(shared, number):
    with running(shared, "chat", "hi", "-m", "openai/gate-20-5") as process:
        read_until(process.stdout, b" t4")
        process.send_signal(number)
        process.wait(20)
        assert b"Traceback" not in process.stderr.read()
    shared.provider.open_gate()
    events = shared.attach(newest(shared)[-1]["id"])
    assert text(events) == tokens(20) and events[-1].data["status"] == "complete" and not shared.provider.closed


def test_ctrl_c_cancels_and_shows_the_receipt(shared):
    with running(shared, "chat", "hi", "-m", "openai/gate-20-5") as process:
        read_until(process.stdout, b" t4")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    shared.provider.wait_closed()
    message = newest(shared)[-1]
    assert process.returncode == 130 and message["status"] == "cancelled" and message["content"] == tokens(5)
    assert f"{len(tokens(5))} " in err.decode() and message["id"][:8] in err.decode() and b"Traceback" not in err


def test_ctrl_c_before_the_first_token_cancels_too(shared):
    with running(shared, "chat", "hi", "-m", "openai/gate-20-0") as process:
        shared.provider.wait_gate()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    shared.provider.wait_closed()
    assert (process.returncode, out) == (130, b"") and newest(shared)[-1]["status"] == "cancelled", err


def test_continue_attaches_to_the_running_reply_first(shared):
    fields = {"content": "slow", "model": "openai/gate-9-3", "background": True}
    status(shared.api("POST", "/api/v1/messages", fields), 202)
    with running(shared, "chat", "-c", "and now", *ECHO) as process:
        begun = read_until(process.stdout, b" t2")
        shared.provider.open_gate()
        out, err = process.communicate(timeout=20)
    assert begun + out == f"{tokens(9)}\nand now\n".encode() and b"still being generated" in err
    assert prompts(shared)[1:] == [("assistant", tokens(9)), ("user", "and now")]


@pytest.mark.core
def test_a_chat_outlives_the_kill_of_the_edge(liminal):
    with running(liminal, "chat", "hi", "-m", "openai/gate-60-25") as process:
        begun = read_until(process.stdout, b" t24")
        liminal.kill("edge")
        assert b"reconnecting" in process.stderr.readline()
        liminal.start_edge().provider.open_gate()
        out, err = process.communicate(timeout=20)
    assert ((begun + out).decode(), err, process.returncode) == (tokens(60) + "\n", b"", 0)


def test_a_client_gone_before_the_start_is_no_error(shared):
    body, port = {"content": "hi", "model": "openai/echo"}, int(shared.edge.rpartition(":")[2])
    data, key = json.dumps(body).encode(), {"Idempotency-Key": "gone-before-the-start"}
    head = f"POST /api/v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {shared.key}\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        head += f"Idempotency-Key: {key['Idempotency-Key']}\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert text(shared.read(shared.stream(body, headers=key))) == "hi"  # and no traceback in a log, as always
    assert len(shared.provider.requests) == 1


################ up, down, status; the default address


@pytest.fixture
def plain(make_liminal):
    """An installation as people have it: no LIMINAL_URL, nothing running."""
    return make_liminal(LIMINAL_URL=None, ANTHROPIC_API_KEY=None, OPENAI_API_KEY=None, OPENAI_BASE_URL=None)


def process_of(liminal, name) -> int:
    return int((liminal.data / f"{name}.lock").read_text())


def test_the_first_chat_starts_servers_that_outlive_it(plain):
    run = plain.cli("chat", "hi", "-m", "demo/load-3-0")
    assert (run.returncode, run.stdout) == (0, " t0 t1 t2\n"), run.stderr
    pids = [process_of(plain, name) for name in ("edge", "domain")]
    assert all(os.getsid(pid) == pid != os.getsid(0) for pid in pids)
    assert good(plain.cli("chat", "again", "-m", "demo/load-2-0")) == " t0 t1\n"
    assert pids == [process_of(plain, name) for name in ("edge", "domain")]


@pytest.mark.core
def test_up_status_and_down(plain):
    assert plain.cli("status").returncode == 3
    assert plain.edge in good(plain.cli("up")) and plain.edge in good(plain.cli("up"))
    lines = good(plain.cli("status")).splitlines()
    assert str(plain.data) in lines[0] and str(process_of(plain, "domain")) in lines[1] and plain.edge in lines[2]
    assert "older" not in "".join(lines) and "another" not in "".join(lines)
    assert "edge" in good(plain.cli("down")) and plain.cli("status").returncode == 3
    assert good(plain.cli("down")) == "nothing was running\n"


def test_what_servers_write_is_private(plain):
    good(plain.cli("up"))
    plain.cli("chat", "hi", "-m", "demo/load-3-0")
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in plain.data.iterdir()}
    assert "edge.log" in modes and set(modes.values()) == {"0o600"}, modes


def test_the_first_demo_reply_says_how_to_set_a_key(plain):
    out = plain.cli("chat", "hi").stdout
    assert "demo" in out and "providers key anthropic" in out
    run = plain.cli("chat", "hi", "-m", "demo/load-1-0", env={"ANTHROPIC_API_KEY": "x"})
    assert "ANTHROPIC_API_KEY" in run.stderr and "liminal providers key anthropic" in run.stderr


def test_older_servers_are_noted(plain, tmp_path):
    plain.start()
    for path in (*ROOT.glob("*.py"), ROOT / "contracts.json", ROOT / "schema.sql"):
        shutil.copy(path, tmp_path)
    with open(tmp_path / "liminal_edge.py", "a") as file:
        file.write("# changed\n")
    command = [sys.executable, tmp_path / "liminal.py"]
    for words, wanted in ((["chat", "hi", "-m", "demo/load-1-0"], "older than the files"), (["status"], "older")):
        run = subprocess.run([*command, *words], env=plain.env, input="", capture_output=True, text=True, timeout=30)
        assert run.returncode == 0 and wanted in run.stdout + run.stderr and "liminal down" in run.stdout + run.stderr


def test_servers_of_another_data_folder_are_noted(plain, tmp_path):
    plain.start()
    shutil.copy(plain.data / "cli.key", tmp_path)
    run = plain.cli("threads", env={"LIMINAL_DATA": str(tmp_path)})
    assert run.returncode == 0 and "another data folder" in run.stderr and "LIMINAL_EDGE_PORT" in run.stderr
    assert "another data folder" in plain.cli("status", env={"LIMINAL_DATA": str(tmp_path)}).stdout


@pytest.mark.parametrize("code, body", STRANGERS[1:3])
def test_a_port_taken_by_something_else_is_one_line(plain, code, body):
    with web_server(code, body) as port:
        run = plain.cli("threads", env={"LIMINAL_EDGE_PORT": str(port)})
    notes = [line for line in run.stderr.splitlines() if not line.startswith("starting")]
    assert run.returncode == 3 and run.stdout == "" and len(notes) == 1 and notes[0].startswith("liminal: "), run.stderr
    assert "LIMINAL_EDGE_PORT" in notes[0]


def test_a_domain_port_taken_by_something_deaf_is_one_line(plain):
    with socket.create_server(("127.0.0.1", 0)) as taken:  # it takes connections and never answers
        run = plain.cli("up", env={"LIMINAL_DOMAIN_PORT": str(taken.getsockname()[1])}, timeout=25)
    one_line(run, 3, "LIMINAL_DOMAIN_PORT")


def test_a_domain_that_was_killed_is_started_again(plain):
    good(plain.cli("up"))
    os.kill(process_of(plain, "domain"), signal.SIGKILL)
    run = plain.cli("chat", "hi", "-m", "demo/load-3-0")
    assert (run.returncode, run.stdout) == (0, " t0 t1 t2\n"), run.stderr
