"""Faults that readers with fresh eyes found, each with the test that failed before."""

import json
import threading
import time

import pytest
from conftest import status, text

from provider import openai_stream

SEND, THREADS = "/api/v1/messages", "/api/v1/threads"


def settled(shared):
    """Wait until nothing waits for the Domain; what was left to it since the servers started."""
    deadline = time.monotonic() + 20
    while (found := status(shared.api("GET", "/api/v1/overflow"), 200))["waiting"]:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found["left_to_domain"]


@pytest.mark.parametrize(
    "arguments", ['{"n": 123456789012345678901}', '{"n": ' + "[" * 500 + "]" * 500 + "}"], ids=["big", "deep"]
)
def test_an_odd_tool_call_holds_up_no_other_reply(shared, arguments):
    shared.provider.script(*openai_stream(("tool", "liminal__file_list", arguments)))
    done = shared.send("call it", model="openai/any")[-1].data
    assert done["status"] == "error" and done["error"]["code"] == "provider_error"
    assert text(shared.send("hi there", model="openai/echo")) == "hi there"
    settled(shared)


def test_a_bundle_that_can_never_be_stored_is_left_alone(liminal):
    """As an older Edge may have left one in overflow.db."""
    message = liminal.send("hi", model="openai/echo")[0].data["message_id"]
    liminal.stop("edge")
    bundle = {"message_id": message, "position": 0, "parts": [{"type": "text", "text": ""}]}
    import sqlite3

    with sqlite3.connect(liminal.data / "overflow.db") as db:
        row = (1, message, json.dumps(bundle), 50, time.time(), 0)
        db.execute(
            "insert into overflow (id, message_id, bundle, bytes, created_at, tries) values (?, ?, ?, ?, ?, ?)", row
        )
    db.close()
    liminal.start_edge()
    assert text(liminal.send("again", model="openai/echo")) == "again"
    assert settled(liminal) == 1


@pytest.mark.parametrize("pasted", ["a" * 60_000, "read/" * 4_000], ids=["long word", "many reads"])
def test_a_long_message_to_the_demo_stops_nobody(shared, pasted):
    events = shared.send(f"please read {pasted}", model="demo/guide")
    assert events[-1].data["status"] == "complete" and events[-1].data["timing"]["domain_ttft_ms"] < 2_000


def test_deleting_a_thread_cancels_a_reply_that_is_just_being_begun(shared):
    for number in range(10):
        thread = status(shared.api("POST", THREADS, {}), 201)["id"]
        body = {"content": "x", "thread_id": thread, "model": "demo/load-2000-10", "background": True}
        sender = threading.Thread(target=shared.api, args=("POST", SEND, body))
        sender.start()
        assert shared.api("DELETE", f"{THREADS}/{thread}")[0] in (204, 404, 409)
        sender.join(20)
        assert status(shared.api("GET", "/api/v1/runs"), 200)["runs"] == []


def test_a_thread_can_be_deleted_after_a_send_that_was_refused(shared):
    thread = status(shared.api("POST", THREADS, {}), 201)["id"]
    senders = [
        threading.Thread(target=shared.api, args=("POST", SEND, {"content": "x" * 400_000, "thread_id": thread}))
        for _ in range(4)
    ]
    for sender in senders:
        sender.start()
    assert shared.api("DELETE", f"{THREADS}/{thread}")[0] in (204, 404)
    for sender in senders:
        sender.join(20)


def test_search_finds_the_end_of_a_long_reply(shared):
    shared.send("count", model="demo/load-6000-0")
    for word in ("t100", "t3300", "t5999"):
        assert status(shared.api("GET", f"/api/v1/search?q={word}"), 200)["results"], word


def test_search_gives_a_message_once_and_finds_words_far_apart(shared):
    shared.send("aardvark " + "walrus " * 6_000 + "platypus", model="demo/load-1-0")
    found = status(shared.api("GET", "/api/v1/search?q=aardvark%20platypus"), 200)["results"]
    assert len(found) == 1 and len(status(shared.api("GET", "/api/v1/search?q=walrus"), 200)["results"]) == 1


def test_a_key_used_for_another_fork_is_a_conflict(shared):
    first = shared.send("one", model="openai/echo")[0].data
    path, headers = f"{THREADS}/{first['thread_id']}/fork", {"Idempotency-Key": f"fork-{time.time_ns()}"}
    made = status(shared.api("POST", path, {"message_id": first["user_message_id"]}, headers=headers), 201)
    assert status(shared.api("POST", path, {"message_id": first["user_message_id"]}, headers=headers), 201) == made
    status(shared.api("POST", path, {"message_id": first["message_id"]}, headers=headers), 409, "conflict")


def test_permissions_that_are_no_list_allow_nothing(make_liminal):
    liminal = make_liminal()
    (liminal.data / "mcp.json").write_text('{"permissions": {"allow": "git__*"}}')
    found = status(liminal.start().api("GET", "/api/v1/tools"), 200)
    assert "permissions.allow" in found["why"]


def test_users_are_deleted_only_after_a_question(shared):
    status(shared.api("POST", "/api/v1/users", {"name": "grace"}), 201)
    assert shared.cli("users", "delete", "grace").returncode == 1
    assert shared.cli("users", "delete", "grace", "-y").returncode == 0 and "grace" not in shared.cli("users").stdout
