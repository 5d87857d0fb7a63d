"""What was said: searched, forked, renamed, deleted, exported, shown; and threads too long to look through by eye."""

import json
import re
import sqlite3
import time
import uuid
from contextlib import closing

import pytest

from conftest import status, text
from test_cli import ECHO, good, newest, one_line, prompts, tokens

BOLD, SEARCH = "\x1b[1m", "/api/v1/search"
MANY = 10_000


def word() -> str:
    """A word that no other test has said."""
    return f"w{uuid.uuid4().hex[:12]}"


def said(shared, content: str, **fields) -> list[dict]:
    """The messages of the thread that this message begins or goes on."""
    events = shared.send(content, **{"model": "openai/echo", **fields})
    deadline = time.monotonic() + 20
    while True:  # the Edge brings its own figure with the stored bundle
        found = messages(shared, events[0].data["thread_id"])
        if found[-1]["timing"]["edge_ttft_ms"] is not None or time.monotonic() > deadline:
            return found


def messages(shared, thread_id: str) -> list[dict]:
    return status(shared.api("GET", f"/api/v1/threads/{thread_id}/messages"), 200)["messages"]


def found(shared, query: str, key=None) -> list[str]:
    """Ids of the messages that a search finds, over the API."""
    request = shared.client.build_request("GET", SEARCH, params={"q": query})
    answer = shared.api("GET", str(request.url), key=key)
    return [one["message_id"] for one in status(answer, 200)["results"]]


def fork(shared, message: dict, **headers) -> dict:
    path = f"/api/v1/threads/{message['thread_id']}/fork"
    return status(shared.api("POST", path, {"message_id": message["id"]}, headers=headers), 201)


################ search


def test_search_names_thread_message_and_snippet(shared):
    unique = word()
    thread = said(shared, f"before {unique} after")
    out = good(shared.cli("search", unique.upper()))
    assert (
        all(one["id"][:8] in out for one in thread)
        and thread[0]["thread_id"][:8] in out
        and f"before {unique} after" in out
    )


def test_search_wants_all_the_words_in_any_order(shared):
    one, two = word(), word()
    assert len(said(shared, f"{one} between {two}")) == len(found(shared, f"{two} {one}")) == 2
    assert found(shared, f"{one} {word()}") == []


@pytest.mark.slow
def test_search_that_finds_nothing_is_one_line(shared):
    one_line(shared.cli("search", word()), 1, "nothing found")


@pytest.mark.parametrize(
    "query",
    ['"', "*", "NEAR(", "-x", "👍", "a AND", "(", "content:x", "^a", "'; drop table messages", "\x00", '""" OR'],
)
def test_any_input_is_a_plain_query(shared, query):
    assert isinstance(found(shared, query), list)


@pytest.mark.slow
@pytest.mark.parametrize("query", ['"', "NEAR(", "-x", "👍"])
def test_any_words_on_the_command_line_are_a_plain_query(shared, query):
    run = shared.cli("search", "--", query)
    assert run.returncode in (0, 1) and (run.returncode == 0 or "nothing found" in run.stderr), run.stderr


def test_operators_are_words_like_others(shared):
    unique = word()
    [user, _] = said(shared, f"{unique} near fog")
    assert user["id"] in found(shared, f"{unique} NEAR fog") and found(shared, f"{unique} OR sun") == []


def test_search_highlights_on_a_terminal_only(shared):
    unique = word()
    said(shared, unique)
    terminal = shared.terminal("search", unique)
    assert terminal.wait() == 0 and f"{BOLD}{unique}\x1b[0m" in terminal.screen
    assert "\x1b" not in good(shared.cli("search", unique))


@pytest.mark.slow
def test_no_color_turns_highlights_off(shared):
    unique = word()
    said(shared, unique)
    terminal = shared.terminal("search", unique, env={"NO_COLOR": "1"})
    assert terminal.wait() == 0 and unique in terminal.screen and "\x1b" not in terminal.screen


def test_search_finds_only_ones_own(shared):
    unique = word()
    said(shared, unique)
    user = status(shared.api("POST", "/api/v1/users", {"name": f"reader {unique}"}), 201)
    key = status(shared.api("POST", "/api/v1/keys", {"name": "k", "user_id": user["id"]}), 201)["secret"]
    assert found(shared, unique, key) == [] and len(found(shared, unique)) == 2


def test_search_forgets_a_deleted_thread(shared):
    unique = word()
    thread = said(shared, unique)
    assert found(shared, unique) != []
    assert good(shared.cli("delete", "-y", thread[0]["thread_id"])) == "deleted\n" and found(shared, unique) == []


def test_search_finds_what_a_cancelled_reply_had_said(shared):
    with shared.stream({"content": "stop me", "model": "openai/gate-20-5"}) as stream:
        start = next(iter(stream)).data
        shared.provider.wait_gate()
        status(shared.api("POST", f"/api/v1/messages/{start['message_id']}/cancel"), 200)
    assert newest(shared)[-1]["status"] == "cancelled" and start["message_id"] in found(shared, "t3 t4")


def test_search_finds_what_an_erroneous_reply_had_said(shared):
    reply = said(shared, "break off", model="openai/say-777-0-end@773")[-1]
    assert reply["status"] == "error" and reply["id"] in found(shared, "t772 t771")


@pytest.mark.slow
def test_search_finds_what_an_interrupted_reply_had_said(liminal):
    with liminal.stream({"content": "kill me", "model": "openai/gate-20-5"}) as stream:
        seen = ""
        for event in stream:
            seen += event.data["text"] if event.type == "text" else ""
            if seen == tokens(5):
                break
        deadline, sql = time.monotonic() + 20, "select position from messages where role = 'assistant'"
        while liminal.sql("messages.db", sql) != [(len(seen),)]:
            assert time.monotonic() < deadline
        liminal.kill("domain")
    liminal.start_domain()
    reply = newest(liminal)[-1]
    assert (
        reply["error"]["code"] == "interrupted" and reply["content"] == seen and reply["id"] in found(liminal, "t3 t4")
    )


################ fork


def test_fork_copies_the_way_with_new_ids(shared):
    old = said(shared, "root of it")
    thread = fork(shared, old[-1])
    new = messages(shared, thread["id"])
    own = {"id", "thread_id", "parent_id", "reactions"}
    strip = lambda found: [{name: value for name, value in one.items() if name not in own} for one in found]
    assert strip(new) == strip(old) and not {one["id"] for one in new} & {one["id"] for one in old}
    assert [one["parent_id"] for one in new] == [None, new[0]["id"]] and new[1]["usage"]["output_tokens"] == 3
    assert thread["forked_from"] == {"thread_id": old[0]["thread_id"], "message_id": old[-1]["id"]}


@pytest.mark.slow
def test_fork_copies_thinking_and_tool_parts(shared):
    asked = 'CALL liminal__file_list {"path": "."}'
    old = said(shared, asked, model="openai/echo")
    new = messages(shared, fork(shared, old[-1])["id"])
    assert {"tool_call", "tool_result"} <= {part["type"] for part in new[-1]["parts"]} and new[-1]["parts"] == old[-1][
        "parts"
    ]


def test_fork_leaves_the_original_untouched(shared):
    old = said(shared, "leave me be")
    thread = fork(shared, old[-1])
    said(shared, "only in the copy", thread_id=thread["id"])
    assert messages(shared, old[0]["thread_id"]) == old and len(messages(shared, thread["id"])) == 4


def test_a_repeated_fork_makes_one_thread(shared):
    [user, reply] = said(shared, "once only")
    first, second = (fork(shared, reply, **{"Idempotency-Key": user["id"]}) for _ in range(2))
    assert first == second and len(messages(shared, first["id"])) == 2
    threads = status(shared.api("GET", "/api/v1/threads?limit=200"), 200)["threads"]
    assert len([one for one in threads if (one["forked_from"] or {}).get("message_id") == reply["id"]]) == 1


def test_forking_a_branch_takes_only_its_way(shared):
    [user, first] = said(shared, "to be retried")
    shared.read(shared.stream({}, f"/api/v1/messages/{first['id']}/retry"))
    *_, second = messages(shared, user["thread_id"])
    assert second["parent_id"] == user["id"] and second["id"] != first["id"]
    new = messages(shared, fork(shared, second)["id"])
    assert [one["number"] for one in new] == [1, 2] and new[1]["completed_at"] == second["completed_at"]


def test_forking_a_running_reply_leaves_nothing_that_never_ends(shared):
    body = {"content": "still running", "model": "openai/gate-9-3", "background": True}
    reply = status(shared.api("POST", "/api/v1/messages", body), 202)
    shared.provider.wait_gate()
    path, copy = f"/api/v1/threads/{reply['thread_id']}/fork", {"message_id": reply["message_ids"][0]}
    code, answer = shared.api("POST", path, copy)
    shared.provider.open_gate()
    assert text(shared.attach(reply["message_ids"][0])) == tokens(9)
    states = [one["status"] for one in messages(shared, answer["id"])] if code == 201 else []
    assert code in (201, 409) and not {"pending", "streaming"} & set(states), states


def test_forking_a_message_of_another_thread_is_not_found(shared):
    [user, reply] = said(shared, "here")
    other = said(shared, "there")[0]
    status(
        shared.api("POST", f"/api/v1/threads/{other['thread_id']}/fork", {"message_id": reply["id"]}), 404, "not_found"
    )


def test_a_chat_goes_on_in_the_copy(shared):
    old = said(shared, "the first half")
    run = shared.cli("fork", old[-1]["id"][:8])
    thread_id = run.stdout.strip()
    assert run.returncode == 0 and f"liminal chat -t {thread_id[:8]}" in run.stderr
    assert good(shared.cli("chat", "-t", thread_id, "the other half", *ECHO)) == "the other half\n"
    assert [one for _, one in prompts(shared)] == ["the first half", "the first half", "the other half"]


def test_a_copy_is_searched_until_it_is_deleted(shared):
    unique = word()
    old = said(shared, unique)
    copy = fork(shared, old[-1])["id"]
    assert len(found(shared, unique)) == 4
    good(shared.cli("delete", "-y", copy))
    assert set(found(shared, unique)) == {one["id"] for one in old}


################ rename, delete


def test_rename_changes_the_title(shared):
    thread_id = said(shared, "old name")[0]["thread_id"]
    assert good(shared.cli("rename", thread_id[:8], "blue skies")) == f"{thread_id[:8]}  blue skies\n"
    assert "blue skies" in good(shared.cli("threads", "-n", "5"))


def test_delete_in_a_pipe_wants_yes_said(shared):
    thread_id = said(shared, "keep me")[0]["thread_id"]
    one_line(shared.cli("delete", thread_id, input="y\n"), 1, "-y")
    assert len(messages(shared, thread_id)) == 2


@pytest.mark.parametrize(
    "typed, code, left", [("y\r", 0, False), ("\r", 1, True), ("n\r", 1, True), ("\x03", 130, True), ("\x04", 1, True)]
)
def test_delete_asks_on_a_terminal(shared, typed, code, left):
    thread_id = said(shared, "shall I go?")[0]["thread_id"]
    terminal = shared.terminal("delete", thread_id[:8])
    terminal.expect(re.compile(rf"shall I go\?.*{thread_id[:8]}.*\[y/N\]"))
    terminal.send(typed)
    assert terminal.wait() == code and "Traceback" not in terminal.screen
    assert (shared.api("GET", f"/api/v1/threads/{thread_id}")[0] == 200) == left


@pytest.mark.slow
def test_what_is_not_there_cannot_be_deleted_or_renamed(shared):
    for words in (
        ["delete", "-y", "00000000"],
        ["rename", "00000000", "x"],
        ["fork", "00000000"],
        ["export", "00000000"],
    ):
        one_line(shared.cli(*words), 1, "00000000", "not_found")


################ export, show


def test_jsonl_lines_are_the_messages_of_the_api(shared):
    thread = said(shared, 'CALL liminal__file_list {"path": "."}', model="openai/echo")
    thread = said(shared, "ü 👍\nnext line \u2028", thread_id=thread[0]["thread_id"])
    out = good(shared.cli("export", thread[0]["thread_id"], "--format", "jsonl"))
    assert [json.loads(line) for line in out.removesuffix("\n").split("\n")] == thread and len(thread) == 4


def test_markdown_has_title_speakers_and_texts(shared):
    thread_id = said(shared, "a question")[0]["thread_id"]
    assert (
        good(shared.cli("export", thread_id))
        == "# a question\n\n## You\n\na question\n\n## openai/echo\n\na question\n"
    )


@pytest.mark.slow
def test_export_without_a_thread_is_the_newest(shared):
    thread = said(shared, "newest of all")
    assert json.loads(good(shared.cli("export", "--format", "jsonl")).splitlines()[0]) == thread[0]


def test_show_counts_replies_and_branches(shared):
    [user, first] = said(shared, "say it twice")
    shared.read(shared.stream({}, f"/api/v1/messages/{first['id']}/retry"))
    said(shared, "on from the first", thread_id=user["thread_id"], parent_id=first["id"])
    said(shared, "another way", thread_id=user["thread_id"], parent_id=first["id"])
    heads = [line for line in good(shared.cli("show", user["thread_id"])).splitlines() if line.startswith("── ")]
    places = [re.findall(r"(reply|branch) (\d of \d)", line) for line in heads]
    assert places == [
        [],
        [("reply", "1 of 2")],
        [("reply", "2 of 2")],
        [("branch", "1 of 2")],
        [],
        [("branch", "2 of 2")],
        [],
    ]
    assert f"to {user['id'][:8]}" in heads[2] and f"to {first['id'][:8]}" in heads[5]


################ Long threads


@pytest.fixture
def long(make_liminal):
    """An installation with one thread of 10,000 messages, written while it was stopped."""
    liminal = make_liminal().start()
    thread_id = liminal.send("zebra crossing", model="openai/echo")[0].data["thread_id"]
    for name in ("edge", "domain"):
        liminal.stop(name)
    with closing(sqlite3.connect(liminal.data / "messages.db")) as db, db:
        [(user_id, parent)] = db.execute("select user_id, id from messages where number = 2")
        for number in range(3, MANY + 1):
            role, message_id = ("user", "assistant")[number % 2 == 0], str(uuid.uuid4())
            db.execute(
                "insert into messages (id, thread_id, user_id, number, parent_id, role, model, status, position, created_at)"
                " values (?, ?, ?, ?, ?, ?, 'openai/echo', 'complete', 12, '2026-01-01T00:00:00.000Z')",
                (message_id, thread_id, user_id, number, parent, role),
            )
            parts = json.dumps([{"type": "text", "text": f"word n{number:06}"[:12]}])
            db.execute("insert into chunks values (?, 12, ?)", (message_id, parts))
            sql = "insert into message_texts (rowid, content) values ((select seq from messages where id = ?), ?)"
            db.execute(sql, (message_id, f"word n{number:06}"[:12]))
            parent = message_id
    liminal.thread_id = thread_id
    return liminal.start()


@pytest.mark.slow
def test_a_thread_of_ten_thousand_messages_is_listed_shown_and_searched(long):
    assert "zebra crossing" in good(long.cli("threads")) and "n009999" in good(long.cli("search", "n009999"))
    assert len(good(long.cli("export", "--format", "jsonl")).splitlines()) == MANY
    assert good(long.cli("chat", "-c", "go on", *ECHO)) == "go on\n"
    assert good(long.cli("show", long.thread_id)).count("\n── ") == MANY + 2
    assert good(long.cli("delete", "-y", long.thread_id)) == "deleted\n" and good(long.cli("threads")) == ""
