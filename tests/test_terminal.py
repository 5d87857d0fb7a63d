"""The commands as a person uses them: in a real pseudo-terminal."""

import os
import re
import signal
import threading

import pytest

from conftest import status, text
from provider import openai_stream
from test_cli import newest, prompts, tokens

PROMPT, ECHO = "> ", ("-m", "openai/echo")
HOSTILE = "a\x1b[31mred\x1b]0;title\x07\x1b[6nb\x9b2Jc\x85d\u202etxt\u2066e\x7ff\rg\x08h"
CONTROLS = re.compile("\x1b\\[[0-9;?]*[a-zA-Z]|\r")  # what readline and the notes' grey colour write themselves


def plain(screen: str) -> str:
    """What a person reads, without the terminal's own sequences."""
    return CONTROLS.sub("", screen)


@pytest.fixture
def talk(shared):
    """The interactive chat, at its first prompt."""
    terminal = shared.terminal("chat", *ECHO)
    terminal.expect(PROMPT)
    yield terminal
    terminal.close()


def ask(terminal, message: str, reply: str):
    terminal.send(message + "\r")
    terminal.expect(reply + "\r\n")
    terminal.expect(PROMPT)


def test_messages_of_one_chat_share_a_thread(talk, shared):
    ask(talk, "first one", "\nfirst one")
    ask(talk, "second one", "\nsecond one")
    assert [said for _, said in prompts(shared)] == ["first one", "first one", "second one"]


def test_ctrl_d_at_the_prompt_leaves(talk):
    talk.send("\x04")
    assert talk.wait() == 0


def test_ctrl_c_at_the_prompt_leaves(talk):
    for _ in range(50):  # input() misses a signal in the instant before it reads: press again, as people do
        if talk.code is None:
            talk.send("\x03")
            talk.reaper.join(0.2)
    assert talk.wait() == 0 and "Traceback" not in talk.screen


def test_ctrl_d_after_a_reply_leaves(talk):
    ask(talk, "hi you", "\nhi you")
    talk.send("\x04")
    assert talk.wait() == 0


def test_an_empty_line_sends_nothing(talk, shared):
    talk.send("\r")
    talk.expect(PROMPT)
    talk.send("   \r")
    talk.expect(PROMPT)
    assert shared.provider.requests == []


def test_a_pasted_block_is_one_message(talk, shared):
    talk.send("one\rtwo\r\rthree\r")
    [request] = shared.provider.wait_requests(1, timeout=10)
    talk.expect(PROMPT)
    assert prompts(shared) == [("user", "one\ntwo\n\nthree")] and len(shared.provider.requests) == 1


def test_a_bracketed_paste_is_one_message(talk, shared):
    talk.send("\x1b[200~one\rtwo\r\rthree\x1b[201~")
    talk.send("\r")
    shared.provider.wait_requests(1, timeout=10)
    talk.expect(PROMPT)
    assert prompts(shared) == [("user", "one\ntwo\n\nthree")] and len(shared.provider.requests) == 1


def test_a_pasted_tab_stays_a_tab(talk, shared):
    talk.send("\x1b[200~a\tb\x1b[201~")
    talk.send("\r")
    shared.provider.wait_requests(1, timeout=10)
    talk.expect(re.compile("\na\\s+b"))
    talk.expect(PROMPT)
    assert prompts(shared) == [("user", "a\tb")]


@pytest.mark.parametrize("begin, end", [("", "\r"), ("\x1b[200~", "\x1b[201~\r")])
def test_a_long_pasted_block_is_one_message(talk, shared, begin, end):
    block = "\r".join(f"{number} " + "x" * 70 for number in range(200))
    typing = threading.Thread(target=talk.send, args=(begin + block + end,))
    typing.start()
    talk.expect("199 x", 20)
    shared.provider.wait_requests(1, timeout=10)
    typing.join()
    talk.expect(PROMPT)
    assert prompts(shared) == [("user", block.replace("\r", "\n"))] and len(shared.provider.requests) == 1


def test_a_hang_up_at_the_prompt_ends_the_chat(talk):
    talk.hang_up()
    talk.reaper.join(10)
    assert talk.code is not None


def test_ctrl_c_cancels_the_reply_and_the_chat_goes_on(shared):
    terminal = shared.terminal("chat", "-m", "openai/gate-20-5")
    terminal.expect(PROMPT)
    terminal.send("go on\r")
    terminal.expect("t4")
    terminal.send("\x03")
    terminal.expect(f"{len(tokens(5))} ")
    terminal.expect(PROMPT)
    shared.provider.wait_closed()
    assert newest(shared)[-1]["status"] == "cancelled" and "connection was lost" not in terminal.screen
    shared.provider.open_gate()
    ask(terminal, "and again", "t19")


@pytest.mark.parametrize("number", range(3))
def test_ctrl_c_in_a_fast_reply_leaves_a_chat_that_works(shared, number):
    terminal = shared.terminal("chat", "-m", "demo/load-400-300")
    terminal.expect(PROMPT)
    terminal.send("go on\r")
    terminal.expect(f"t{10 + number}")
    terminal.send("\x03")
    terminal.expect(PROMPT)
    assert "connection was lost" not in terminal.screen and newest(shared)[-1]["status"] == "cancelled"
    terminal.send("\x04")
    assert terminal.wait() == 0 and "Traceback" not in terminal.screen


def test_ctrl_c_in_a_single_question_leaves_with_130(shared):
    terminal = shared.terminal("chat", "a question", "-m", "openai/gate-20-5")
    terminal.expect("t4")
    terminal.send("\x03")
    assert terminal.wait() == 130 and newest(shared)[-1]["id"][:8] in terminal.screen


def test_a_hang_up_only_detaches(shared):
    terminal = shared.terminal("chat", "hi", "-m", "openai/gate-20-5")
    terminal.expect("t4")
    terminal.hang_up()
    terminal.reaper.join(10)
    assert not terminal.reaper.is_alive()
    shared.provider.open_gate()
    events = shared.attach(newest(shared)[-1]["id"])
    assert text(events) == tokens(20) and events[-1].data["status"] == "complete" and not shared.provider.closed


def test_what_a_model_says_cannot_command_the_terminal(shared):
    shared.provider.script(*openai_stream(*HOSTILE))
    terminal = shared.terminal("chat", "hi", *ECHO)
    assert terminal.wait() == 0
    assert (
        "a\\x1b[31mred\\x1b]0;title\\x07\\x1b[6nb\\x9b2Jc\\x85d\\u202etxt\\u2066e\\x7ff\\x0dg\\x08h" in terminal.screen
    )
    assert not set(HOSTILE) & set(terminal.screen.replace("\r\n", "\n")) - set(map(chr, range(32, 127)))


@pytest.mark.parametrize("words", [["show"], ["threads"]])
def test_what_was_said_cannot_command_the_terminal_later(shared, words):
    shared.send("evil\x1b[31m\x9b5mtitle", model="openai/echo")
    terminal = shared.terminal(*words)
    assert terminal.wait() == 0
    assert "evil\\x1b[31m\\x9b5mtitle" in terminal.screen and "\x1b[31m" not in terminal.screen


def test_an_error_cannot_command_the_terminal(shared):
    body = b'{"error": {"message": "no \\u001b[31mred\\u009b5m", "type": "x"}}'
    shared.provider.script(body, status=400, content_type="application/json")
    terminal = shared.terminal("chat", "hi", *ECHO)
    assert terminal.wait() == 1 and "no \\x1b[31mred\\x9b5m" in terminal.screen and "\x1b[31m" not in terminal.screen


def test_a_fast_reply_is_shown_whole(shared):
    terminal = shared.terminal("chat", "hi", "-m", "demo/load-2000-0", size=(24, 200))
    assert terminal.wait(20) == 0
    assert plain(terminal.screen) == tokens(2000) + "\n"


def test_a_steady_reply_is_shown_whole(shared):
    terminal = shared.terminal("chat", "hi", "-m", "demo/load-60-100")
    assert terminal.wait(20) == 0 and plain(terminal.screen) == tokens(60) + "\n"


def test_a_reply_is_shown_before_it_ends(shared):
    terminal = shared.terminal("chat", "hi", "-m", "openai/gate-20-7")
    terminal.expect(tokens(7))
    shared.provider.open_gate()
    terminal.expect(tokens(20, 7))
    assert terminal.wait() == 0


def test_a_provider_key_is_asked_for_without_echo(shared):
    url = shared.provider.openai_url
    shared.cli("providers", "add", "quiet", "--base-url", url, "--key-env", "QUIET_KEY", "--model", "echo")
    terminal = shared.terminal("providers", "key", "quiet")
    terminal.expect("QUIET_KEY")
    terminal.send("sk-unseen\r")
    assert terminal.wait() == 0 and "sk-unseen" not in terminal.screen
    assert "QUIET_KEY=sk-unseen" in (shared.data / "env").read_text().splitlines()
    assert shared.cli("chat", "hi", "-m", "quiet/echo").stdout == "hi\n"


def test_leaving_the_question_for_a_key_changes_nothing(shared):
    before = (shared.data / "env").read_text() if (shared.data / "env").exists() else None
    terminal = shared.terminal("providers", "key", "anthropic")
    terminal.expect("ANTHROPIC_API_KEY")
    terminal.send("\x04")
    assert terminal.wait() == 1 and "Traceback" not in terminal.screen
    assert before == ((shared.data / "env").read_text() if (shared.data / "env").exists() else None)


def test_without_arguments_a_chat_opens(shared):
    terminal = shared.terminal()
    terminal.expect(PROMPT)
    terminal.send("\x04")
    assert terminal.wait() == 0


def test_a_single_unknown_word_is_a_usage_error(shared):
    terminal = shared.terminal("statsu")
    assert terminal.wait() == 2 and "statsu" in terminal.screen and "threads" in terminal.screen


def test_continue_shows_the_last_turn(shared):
    shared.send("what was said last", model="openai/echo")
    terminal = shared.terminal("chat", "-c", *ECHO)
    terminal.expect("what was said last")
    terminal.expect("what was said last")
    terminal.expect(PROMPT)
    ask(terminal, "go on", "\ngo on")
    assert [said for _, said in prompts(shared)] == ["what was said last", "what was said last", "go on"]


def test_continue_attaches_to_a_running_reply(shared):
    body = {"content": "slow", "model": "openai/gate-9-3", "background": True}
    status(shared.api("POST", "/api/v1/messages", body), 202)
    terminal = shared.terminal("chat", "-c")
    terminal.expect(tokens(3))
    shared.provider.open_gate()
    terminal.expect(tokens(9, 3) + "\r\n")
    terminal.expect(PROMPT)


def test_an_error_does_not_end_the_chat(shared):
    terminal = shared.terminal("chat", "-m", "openai/echo-s500@0")
    terminal.expect(PROMPT)
    shared.provider.fail_times = 1
    terminal.send("this fails\r")
    terminal.expect("provider_error")
    ask(terminal, "this works", "\nthis works")


def test_a_refused_message_does_not_end_the_chat(shared):
    terminal = shared.terminal("chat", "-m", "nope/x")
    terminal.expect(PROMPT)
    for _ in range(2):
        terminal.send("hi there\r")
        terminal.expect("unknown_model")
        terminal.expect(PROMPT)


def test_a_server_that_is_away_does_not_end_the_chat(liminal):
    terminal = liminal.terminal("chat", *ECHO)
    terminal.expect(PROMPT)
    ask(terminal, "one here", "\none here")
    liminal.stop("edge")
    terminal.send("nobody hears\r")
    terminal.expect(re.compile("does not answer|reconnecting"))
    liminal.start_edge()
    terminal.expect(PROMPT, 20)
    terminal.send("back again\r")
    terminal.expect("\nback again\r\n")


def test_ctrl_c_while_the_server_is_away_is_no_traceback(liminal):
    terminal = liminal.terminal("chat", "hi", "-m", "openai/gate-20-5")
    terminal.expect("t4")
    liminal.stop("edge")
    terminal.expect("reconnecting")
    terminal.send("\x03")
    assert terminal.wait() in (3, 130) and "Traceback" not in terminal.screen
    assert "liminal: " in terminal.screen


def test_a_closed_terminal_leaves_servers_that_it_started(make_liminal):
    installed = make_liminal(LIMINAL_URL=None)
    terminal = installed.terminal()
    terminal.expect(PROMPT, 20)
    pids = [int((installed.data / f"{name}.lock").read_text()) for name in ("edge", "domain")]
    assert all(os.getsid(pid) == pid for pid in pids)
    os.killpg(os.getpgid(terminal.pid), signal.SIGHUP)
    terminal.hang_up()
    terminal.reaper.join(10)
    assert installed.cli("status").returncode == 0
