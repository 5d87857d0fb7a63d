"""The everyday chat: what goes in, what comes out on which output, and talking on in a terminal."""

import json
import re
import signal
import stat

import pytest

from conftest import status
from provider import openai_stream
from test_cli import ECHO, good, newest, one_line, prompts, running, tokens
from test_terminal import PROMPT, ask, plain, talk  # noqa: F401: `talk` is a fixture

CTRL_C, UP = "\x03", "\x1b[A"


def lines_of(run) -> list[dict]:
    return [json.loads(line) for line in good(run).splitlines()]


@pytest.fixture
def partial(shared):
    """A provider `partial` with two models of its own; gives what adds it to a command."""
    fields = {"kind": "openai", "base_url": shared.provider.openai_url, "models": ["say-7-0", "say-71-0"]}
    status(shared.api("PUT", "/api/v1/providers/partial", fields), 200)
    yield shared
    status(shared.api("DELETE", "/api/v1/providers/partial"), 204)


################ What goes in


def test_input_then_files_then_argument(shared):
    for name in ("a.txt", "b.txt"):
        (shared.home / name).write_text(f"inside {name}\n")
    good(shared.cli("chat", "-f", "a.txt", "-f", "b.txt", "the argument", *ECHO, input="piped\n"))
    [(role, said)] = prompts(shared)
    wanted = ["piped", "a.txt", "inside a.txt", "b.txt", "inside b.txt", "the argument"]
    places = [said.index(word) for word in wanted]
    assert role == "user" and places == sorted(places) and said.startswith("piped") and said.endswith("the argument")


@pytest.mark.slow
def test_a_file_alone_is_a_message(shared):
    (shared.home / "only.txt").write_text("ünïcode 👍")
    good(shared.cli("chat", "-f", "only.txt", *ECHO))
    assert "only.txt" in prompts(shared)[0][1] and "ünïcode 👍" in prompts(shared)[0][1]


@pytest.mark.parametrize("content", [None, b"\x89PNG\r\n\xff\xfe", b"\x7fELF\x02\x01\x00\x00\x00"])
def test_a_file_that_is_no_text_is_one_line(shared, content):
    path = shared.home / "no-text"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    one_line(shared.cli("chat", "-f", "no-text", "look", *ECHO), 1, "no-text")
    assert shared.provider.requests == []


@pytest.mark.slow
def test_a_folder_as_a_file_is_one_line(shared):
    one_line(shared.cli("chat", "-f", ".", "look", *ECHO), 1, "directory")


def test_a_part_of_a_models_name_will_do(partial):
    assert good(partial.cli("chat", "hi", "-m", "say-71")) == tokens(71) + "\n"


@pytest.mark.slow
def test_a_whole_model_name_beats_longer_ones(partial):
    assert good(partial.cli("chat", "hi", "-m", "say-7-0")) == tokens(7) + "\n"


def test_a_part_of_several_names_lists_them(partial):
    one_line(partial.cli("chat", "hi", "-m", "say-7"), 1, "partial/say-7-0", "partial/say-71-0", "unknown_model")
    assert partial.provider.requests == []


@pytest.mark.slow
def test_a_part_of_no_name_is_one_line(shared):
    one_line(shared.cli("chat", "hi", "-m", "nonesuch"), 1, "nonesuch", "liminal models", "unknown_model")


@pytest.mark.slow
def test_retry_takes_a_part_of_a_models_name_too(partial):
    good(partial.cli("chat", "hi", *ECHO))
    assert good(partial.cli("retry", "-m", "say-71")) == tokens(71) + "\n"


def test_options_reach_the_provider_as_json_or_words(shared):
    pairs = (
        "-o",
        "seed",
        "7",
        "-o",
        "user",
        "ada",
        "-o",
        "stop",
        '["x"]',
        "-o",
        "top_p",
        "0.5",
        "-o",
        "logprobs",
        "false",
    )
    good(shared.cli("chat", "hi", *pairs, *ECHO))
    sent = shared.provider.requests[-1]["body"]
    wanted = {"seed": 7, "user": "ada", "stop": ["x"], "top_p": 0.5, "logprobs": False}
    assert {name: sent.get(name) for name in wanted} == wanted


@pytest.mark.slow
def test_an_option_of_no_finite_number_is_one_line(shared):
    one_line(shared.cli("chat", "hi", "-o", "top_p", "NaN", *ECHO), 1)


################ What comes out


@pytest.mark.slow
def test_no_stream_prints_the_whole_reply(shared):
    assert good(shared.cli("chat", "hi", "--no-stream", "-m", "openai/say-9-0")) == tokens(9) + "\n"


@pytest.mark.slow
def test_no_stream_reports_a_failed_reply(shared):
    run = shared.cli("chat", "hi", "--no-stream", "-m", "openai/say-9-0-end@4")
    assert (run.returncode, run.stdout) == (1, tokens(4) + "\n")
    assert run.stderr.startswith("liminal: ") and "provider_incomplete" in run.stderr


@pytest.mark.slow
def test_ctrl_c_without_a_stream_cancels_the_reply_too(shared):
    with running(shared, "chat", "hi", "--no-stream", "-m", "openai/gate-20-5") as process:
        shared.provider.wait_gate(timeout=20)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    shared.provider.wait_closed()
    assert process.returncode == 130 and newest(shared)[-1]["status"] == "cancelled"


def test_json_gives_the_events(shared):
    start, *texts, done = lines_of(shared.cli("chat", "hi", "--json", "-m", "openai/say-9-0"))
    assert (start["type"], done["type"], done["status"]) == ("start", "done", "complete")
    assert "".join(event["text"] for event in texts) == tokens(9)


@pytest.mark.slow
def test_json_of_a_failed_reply_ends_with_its_error(shared):
    run = shared.cli("chat", "hi", "--json", "-m", "openai/say-9-0-end@4")
    assert json.loads(run.stdout.splitlines()[-1])["error"]["code"] == "provider_incomplete" and run.returncode == 1


def test_json_without_a_stream_gives_the_message(shared):
    [message] = lines_of(shared.cli("chat", "hi", "--json", "--no-stream", "-m", "openai/say-9-0"))
    assert {**message, "timing": 0} == {**newest(shared)[-1], "timing": 0} and message["content"] == tokens(9)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--json"], ["--no-stream"]], ids=" ".join)
def test_usage_is_on_standard_error_only(shared, more):
    fields = {"kind": "openai", "base_url": shared.provider.openai_url, "prices": {"*": [1000, 100, 10000]}}
    status(shared.api("PUT", "/api/v1/providers/priced", fields), 200)
    run = shared.cli("chat", "hi", "-u", *more, "-m", "priced/say-5-100")
    said = run.stdout if not more or more == ["--no-stream"] else ""
    assert run.returncode == 0 and said in ("", tokens(5) + "\n")
    for wanted in ("12 tokens in", "5 out", r"\$0\.062", r"first token after [\d.]+ ms", r"[\d.]+ tokens/s"):
        assert re.search(wanted, run.stderr), (wanted, run.stderr)


def test_background_prints_an_id_that_attach_shows(shared):
    message_id = good(shared.cli("chat", "hi", "--background", "-m", "openai/gate-9-3")).strip()
    shared.provider.wait_gate()
    assert newest(shared)[-1]["id"] == message_id and newest(shared)[-1]["status"] in ("pending", "streaming")
    shared.provider.open_gate()
    assert good(shared.cli("attach", message_id[:8])) == tokens(9) + "\n"


@pytest.mark.slow
def test_background_as_json_names_thread_and_messages(shared):
    [made] = lines_of(shared.cli("chat", "hi", "--background", "--json", *ECHO))
    assert set(made) == {"thread_id", "user_message_id", "message_ids"}
    assert made["user_message_id"] == newest(shared)[0]["id"]


################ Talking on in a terminal


def command(terminal, line: str, wanted: str | re.Pattern):
    """Type a line and wait for what it answers, behind its own echo, and for the next prompt."""
    terminal.send(line + "\r")
    terminal.expect(line.rstrip("\r") + "\r\n")
    terminal.expect(wanted)
    terminal.expect(PROMPT)


def test_help_lists_every_slash_command(talk):
    talk.send("/help\r")
    for word in "/model /system /retry /fork /react /tools /quit".split():
        talk.expect(re.compile(rf"\n{word}\s+\S+"))


@pytest.mark.slow
def test_quit_leaves(talk):
    talk.send("/quit\r")
    assert talk.wait() == 0


def test_an_unknown_slash_command_is_not_sent(talk, shared):
    command(talk, "/nonsense please", "/help")
    assert shared.provider.requests == []


@pytest.mark.slow
def test_a_path_is_a_message(talk, shared):
    ask(talk, "/etc/passwd is what?", "\n/etc/passwd is what?")


@pytest.mark.slow
def test_model_changes_what_answers(talk, shared):
    command(talk, "/model", "openai/echo")
    command(talk, "/model openai/say-3-0", "openai/say-3-0")
    ask(talk, "hi there", " t0 t1 t2")


@pytest.mark.slow
def test_a_model_that_is_not_there_keeps_the_old_one(talk):
    command(talk, "/model nonesuch", "unknown_model")
    command(talk, "/model", "openai/echo")


@pytest.mark.slow
def test_system_text_is_sent_from_then_on(talk, shared):
    command(talk, "/system Be brief.", "system: Be brief.")
    ask(talk, "hi you", "\nhi you")
    assert prompts(shared)[0] == ("system", "Be brief.")


def test_retry_gives_another_reply_with_another_model(talk, shared):
    ask(talk, "say it", "\nsay it")
    command(talk, "/retry openai/say-3-0", " t0 t1 t2")
    replies = [one for one in newest(shared) if one["role"] == "assistant"]
    assert [one["content"] for one in replies] == ["say it", " t0 t1 t2"] and len(newest(shared)) == 3


@pytest.mark.slow
def test_retry_before_any_reply_is_one_line(talk):
    command(talk, "/retry", "liminal: there is no reply yet")


@pytest.mark.slow
def test_retry_after_continue_means_the_reply_that_was_shown(shared):
    shared.send("what was said", model="openai/echo")
    terminal = shared.terminal("chat", "-c", *ECHO)
    terminal.expect(PROMPT)
    command(terminal, "/retry openai/say-3-0", " t0 t1 t2")


def test_fork_goes_on_in_a_copy(talk, shared):
    ask(talk, "first one", "\nfirst one")
    before = newest(shared)
    command(talk, "/fork", "copy")
    ask(talk, "second one", "\nsecond one")
    after = newest(shared)
    assert after[0]["thread_id"] != before[0]["thread_id"] and [one["content"] for one in after][::2] == [
        "first one",
        "second one",
    ]
    found = status(shared.api("GET", f"/api/v1/threads/{before[0]['thread_id']}/messages"), 200)["messages"]
    assert [(one["id"], one["content"]) for one in found] == [(one["id"], one["content"]) for one in before]


@pytest.mark.slow
def test_retry_after_fork_retries_in_the_copy(talk, shared):
    ask(talk, "first one", "\nfirst one")
    original = newest(shared)[0]["thread_id"]
    command(talk, "/fork", "copy")
    command(talk, "/retry openai/say-3-0", " t0 t1 t2")
    assert len(status(shared.api("GET", f"/api/v1/threads/{original}/messages"), 200)["messages"]) == 2


@pytest.mark.slow
def test_react_marks_the_last_reply(talk, shared):
    ask(talk, "hi you", "\nhi you")
    command(talk, "/react :tada:", "1")
    assert newest(shared)[-1]["reactions"] != []


@pytest.mark.slow
def test_react_to_what_is_no_emoji_is_one_line(talk):
    ask(talk, "hi you", "\nhi you")
    command(talk, "/react nonsense", "liminal: ")


@pytest.mark.slow
def test_tools_are_offered_or_not(talk, shared):
    command(talk, "/tools off", "tools: off")
    ask(talk, "without them", "\nwithout them")
    command(talk, "/tools liminal__file_read", "liminal__file_read")
    ask(talk, "with one", "\nwith one")
    command(talk, "/tools on", "all")
    ask(talk, "with all", "\nwith all")
    none, one, every = [len(request["body"].get("tools") or ()) for request in shared.provider.requests]
    assert (none, one) == (0, 1) and every >= 4


def test_a_backslash_goes_on_in_the_next_line(talk, shared):
    talk.send("one\\\r")
    talk.expect("… ")
    talk.send("two\r")
    talk.expect(re.compile("\none\r\ntwo\r\n"))
    talk.expect(PROMPT)
    assert prompts(shared) == [("user", "one\ntwo")]


def test_history_is_kept_over_sessions_in_a_private_file(shared):
    for said, key in (("a line to remember", "a line to remember"), ("a line to remember", UP)):
        terminal = shared.terminal("chat", *ECHO)
        terminal.expect(PROMPT)
        terminal.send(key)
        terminal.expect(said)
        terminal.send("\r")
        terminal.expect(f"\n{said}\r\n")
        terminal.expect(PROMPT)
        terminal.send("\x04")
        assert terminal.wait() == 0 and prompts(shared)[-1] == ("user", said)
        assert stat.S_IMODE((shared.data / "chat_history").stat().st_mode) == 0o600


def test_a_second_ctrl_c_leaves(shared):
    terminal = shared.terminal("chat", "-m", "openai/gate-20-5")
    terminal.expect(PROMPT)
    terminal.send("go on\r")
    terminal.expect("t4")
    terminal.send(CTRL_C)
    terminal.expect(re.compile("stopped: .* kept"))
    terminal.expect(PROMPT)
    for _ in range(50):  # input() misses a signal in the instant before it reads: press again, as people do
        if terminal.code is None:
            terminal.send(CTRL_C)
            terminal.reaper.join(0.2)
    assert terminal.wait() == 0 and "Traceback" not in terminal.screen


@pytest.mark.slow
def test_two_ctrl_c_at_once_are_no_traceback(shared):
    terminal = shared.terminal("chat", "hi", "-m", "openai/gate-20-5")
    terminal.expect("t4")
    terminal.send(CTRL_C)
    terminal.send(CTRL_C)
    assert terminal.wait() == 130 and "Traceback" not in terminal.screen


@pytest.mark.slow
def test_the_typewriter_shows_the_whole_text(shared):
    said = "".join(f"{number} wörter 👍 " for number in range(400))
    shared.provider.script(*openai_stream(said, said))
    terminal = shared.terminal("chat", "hi", *ECHO, size=(24, 200))
    assert terminal.wait() == 0 and plain(terminal.screen) == said + said + "\n"
