"""The Edge's API: threads, messages, reactions, providers, users, keys, and every kind of input that it refuses."""

import json
import socket
import sqlite3
import uuid
from contextlib import closing
from urllib.parse import quote, urlsplit

import pytest
from conftest import ROOT, status, text
from prometheus_client.parser import text_string_to_metric_families

from provider import openai_stream

CONTRACT = json.loads((ROOT / "contracts.json").read_text())
LIMITS = CONTRACT["x-limits"]
NOBODY = "00000000-0000-4000-8000-000000000000"
ECHO = "openai/echo"
SEND, THREADS = "/api/v1/messages", "/api/v1/threads"


def make_thread(shared, **fields):
    return status(shared.api("POST", THREADS, fields), 201)


def exchange(shared, content="hello", **fields):
    """(user's message, reply) of a finished exchange."""
    start = shared.send(content, **{"model": ECHO, **fields})[0].data
    return tuple(status(shared.api("GET", f"{SEND}/{start[name]}"), 200) for name in ("user_message_id", "message_id"))


def untimed(message):
    """The message without its timing, to which the Edge adds its own part a moment after `done`."""
    return {name: value for name, value in message.items() if name != "timing"}


def messages_of(shared, thread_id, query=""):
    return status(shared.api("GET", f"{THREADS}/{thread_id}/messages{query}"), 200)["messages"]


def refused(shared, code, number, method="POST", path=SEND, body=None, raw=None, headers=None):
    return status(shared.api(method, path, body, raw=raw, headers=headers), number, code)


def plain(url, head, body=b""):
    """(status, JSON) of a request sent byte by byte, for what no HTTP library would send."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), 20) as connection:
        connection.sendall(head + b"\r\nHost: %s\r\nConnection: close\r\n\r\n" % place.netloc.encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    first, _, rest = answer.partition(b"\r\n\r\n")
    return int(first.split()[1]), json.loads(rest)


################ Threads


def test_thread_is_given_back_as_it_was_made(shared):
    thread = make_thread(shared, title="a title", system="be brief", model="demo/guide")
    assert [thread[name] for name in ("title", "system", "model")] == ["a title", "be brief", "demo/guide"]
    assert thread["forked_from"] is None and thread["created_at"] == thread["updated_at"]
    assert status(shared.api("GET", f"{THREADS}/{thread['id']}"), 200) == thread


def test_same_idempotency_key_makes_one_thread(shared):
    ids = {
        status(shared.api("POST", THREADS, {"title": "once"}, headers={"Idempotency-Key": "one-thread"}), 201)["id"]
        for _ in range(2)
    }
    assert len(ids) == 1


def test_threads_are_listed_newest_first(shared):
    made = [make_thread(shared)["id"] for _ in range(3)]
    exchange(shared, thread_id=made[0])
    names = [thread["id"] for thread in status(shared.api("GET", THREADS), 200)["threads"]]
    assert names[0] == made[0] and set(names[1:3]) == {made[1], made[2]}


def test_threads_page_by_before_without_loss(shared):
    [make_thread(shared) for _ in range(5)]
    whole = [thread["id"] for thread in status(shared.api("GET", f"{THREADS}?limit=1000"), 200)["threads"]]
    paged, before = [], ""
    while page := status(shared.api("GET", f"{THREADS}?limit=2{before}"), 200)["threads"]:
        assert len(page) <= 2
        paged += [thread["id"] for thread in page]
        before = f"&before={paged[-1]}"
    assert paged == whole


def test_thread_is_found_by_a_prefix(shared):
    thread = make_thread(shared)
    for length in (8, 13, 35, 36):
        assert status(shared.api("GET", f"{THREADS}/{thread['id'][:length]}"), 200)["id"] == thread["id"]


def test_prefix_of_three_characters_is_not_found(shared):
    refused(shared, "not_found", 404, "GET", f"{THREADS}/{make_thread(shared)['id'][:3]}")


def test_ambiguous_prefix_asks_for_more_characters(shared):
    owner, seen = uuid.UUID(status(shared.api("GET", "/api/v1/users"), 200)["users"][0]["id"]), {}
    for key in map(str, range(100_000)):
        prefix = str(uuid.uuid5(owner, key))[:4]
        if prefix in seen:
            break
        seen[prefix] = key
    for one in (key, seen[prefix]):
        status(shared.api("POST", THREADS, {}, headers={"Idempotency-Key": one}), 201)
    assert "more characters" in refused(shared, "invalid_request", 400, "GET", f"{THREADS}/{prefix}")["message"]


def test_wildcards_in_an_id_mean_nothing(shared):
    make_thread(shared)
    for ref in ("____", "%25%25%25%25", "****", "gggg", "----"):
        refused(shared, "not_found", 404, "GET", f"{THREADS}/{ref}")


def test_update_changes_only_what_is_named(shared):
    thread = make_thread(shared, title="old", system="be brief")
    changed = status(shared.api("PATCH", f"{THREADS}/{thread['id']}", {"title": "new"}), 200)
    assert (changed["title"], changed["system"]) == ("new", "be brief")
    assert status(shared.api("PATCH", f"{THREADS}/{thread['id']}", {"system": None}), 200)["system"] is None
    assert status(shared.api("GET", f"{THREADS}/{thread['id']}"), 200)["title"] == "new"


def test_deleted_thread_is_gone_with_its_messages(shared):
    said, reply = exchange(shared)
    status(shared.api("DELETE", f"{THREADS}/{said['thread_id']}"), 204)
    for path in (f"{THREADS}/{said['thread_id']}", f"{SEND}/{said['id']}", f"{SEND}/{reply['id']}"):
        refused(shared, "not_found", 404, "GET", path)
    ids = said["id"], reply["id"]
    assert shared.sql("messages.db", "select count(*) from messages where id in (?, ?)", *ids) == [(0,)]
    assert shared.sql("messages.db", "select count(*) from chunks where message_id in (?, ?)", *ids) == [(0,)]


def test_deleting_a_thread_cancels_its_running_reply_first(shared):
    with shared.stream({"content": "hello", "model": "openai/gate-10-2"}) as stream:
        events = iter(stream)
        start = next(events).data
        shared.provider.wait_gate()
        status(shared.api("DELETE", f"{THREADS}/{start['thread_id']}"), 204)
        shared.provider.wait_closed()
        assert list(events)[-1].data["status"] == "cancelled"
    refused(shared, "not_found", 404, "GET", f"{SEND}/{start['message_id']}")


def test_long_first_message_gives_its_first_words_as_title(shared):
    content = "  What is\n\nthe " + "remarkable " * 30
    thread = status(shared.api("GET", f"{THREADS}/{exchange(shared, content)[0]['thread_id']}"), 200)
    words = " ".join(content.split())
    assert 20 <= len(thread["title"]) <= 60 and words.startswith(thread["title"].rstrip("…"))


def test_short_first_message_is_the_whole_title(shared):
    said, _ = exchange(shared, "What is 漢字 👍🏽?")
    assert status(shared.api("GET", f"{THREADS}/{said['thread_id']}"), 200)["title"] == "What is 漢字 👍🏽?"


def test_untitled_thread_takes_its_title_at_its_first_message_only(shared):
    thread = make_thread(shared)
    exchange(shared, "first words", thread_id=thread["id"])
    exchange(shared, "second words", thread_id=thread["id"])
    shared.send("third", thread_id=thread["id"], model=ECHO)
    assert status(shared.api("GET", f"{THREADS}/{thread['id']}"), 200)["title"] == "first words"


def test_given_title_stays(shared):
    thread = make_thread(shared, title="mine")
    exchange(shared, thread_id=thread["id"])
    exchange(shared, thread_id=thread["id"])
    assert status(shared.api("GET", f"{THREADS}/{thread['id']}"), 200)["title"] == "mine"


################ Messages


def test_content_parts_and_position_agree(shared):
    content = "né́ 👨‍👩‍👧 漢字 𝒳"
    for message in exchange(shared, content):
        assert message["content"] == content and message["parts"] == [{"type": "text", "text": content}]
        assert message["position"] == len(content) and message["status"] == "complete"


def test_parts_are_maximal_runs_of_one_type(shared):
    shared.provider.script(*openai_stream(("thinking", "a"), ("thinking", "b"), "c", "d"))
    _, reply = exchange(shared)
    assert reply["parts"] == [{"type": "thinking", "text": "ab"}, {"type": "text", "text": "cd"}]
    assert (reply["content"], reply["position"]) == ("cd", 4)


def test_exchange_is_two_rows_numbered_from_one(shared):
    said, reply = exchange(shared)
    assert [(m["number"], m["role"]) for m in (said, reply)] == [(1, "user"), (2, "assistant")]
    assert (said["parent_id"], reply["parent_id"]) == (None, said["id"])
    assert (said["model"], reply["model"]) == (None, ECHO) and reply["speaker"] is None


def test_finished_reply_has_usage_timing_and_times(shared):
    _, reply = exchange(shared, "one two three")
    assert reply["usage"] == {
        "input_tokens": 12,
        "cached_tokens": 0,
        "output_tokens": 3,
        "cost": None,
        "estimated": False,
    }
    assert reply["timing"]["total_ms"] >= reply["timing"]["domain_ttft_ms"] >= reply["timing"]["provider_ttft_ms"] > 0
    assert reply["stop_reason"] == "end_turn" and reply["created_at"] <= reply["completed_at"]


def test_message_is_found_by_a_prefix(shared):
    _, reply = exchange(shared)
    assert untimed(status(shared.api("GET", f"{SEND}/{reply['id'][:12]}"), 200)) == untimed(reply)


def test_second_message_hangs_on_the_newest_finished_one(shared):
    said, reply = exchange(shared)
    second, _ = exchange(shared, thread_id=said["thread_id"][:12])
    assert second["parent_id"] == reply["id"] and second["number"] == 3


def test_named_parent_makes_a_branch(shared):
    said, reply = exchange(shared, "one")
    exchange(shared, "two", thread_id=said["thread_id"])
    branch, _ = exchange(shared, "three", thread_id=said["thread_id"], parent_id=reply["id"])
    assert branch["parent_id"] == reply["id"]
    prompt = shared.provider.requests[-1]["body"]["messages"]
    assert [message["content"] for message in prompt] == ["one", "one", "three"]


def test_messages_page_by_after(shared):
    said, _ = exchange(shared)
    exchange(shared, thread_id=said["thread_id"])
    assert [m["number"] for m in messages_of(shared, said["thread_id"], "?limit=3")] == [1, 2, 3]
    assert [m["number"] for m in messages_of(shared, said["thread_id"], "?limit=3&after=3")] == [4]
    assert messages_of(shared, said["thread_id"], "?after=4") == []


def test_list_gives_messages_as_get_does(shared):
    said, reply = exchange(shared)
    assert list(map(untimed, messages_of(shared, said["thread_id"]))) == [untimed(said), untimed(reply)]


def test_thread_of_1500_messages_pages_without_loss(liminal):
    thread_id = make_thread(liminal)["id"]
    owner = status(liminal.api("GET", "/api/v1/users"), 200)["users"][0]["id"]
    liminal.stop("domain")
    with closing(sqlite3.connect(liminal.data / "messages.db")) as db, db:
        ids = [str(uuid.uuid4()) for _ in range(1500)]
        sql = """insert into messages (id, thread_id, user_id, number, role, status, position, created_at)
                 values (?, ?, ?, ?, 'user', 'complete', 1, '2026-01-01T00:00:00.000Z')"""
        db.executemany(sql, [(one, thread_id, owner, number) for number, one in enumerate(ids, 1)])
        db.executemany("""insert into chunks values (?, 1, '[{"type":"text","text":"x"}]')""", [(one,) for one in ids])
    liminal.start("domain")
    seen = messages_of(liminal, thread_id, "?limit=1000")
    seen += messages_of(liminal, thread_id, f"?limit=1000&after={seen[-1]['number']}")
    assert [message["id"] for message in seen] == ids
    paged = []
    while page := messages_of(liminal, thread_id, f"?after={len(paged)}"):
        paged += [message["id"] for message in page]
    assert paged == ids


def test_retry_is_a_second_reply_to_the_same_message(shared):
    said, reply = exchange(shared)
    events = shared.read(shared.stream({}, f"{SEND}/{reply['id']}/retry"))
    again = status(shared.api("GET", f"{SEND}/{events[0].data['message_id']}"), 200)
    assert (again["parent_id"], again["number"], again["model"]) == (said["id"], 3, ECHO)
    assert again["content"] == reply["content"]
    assert untimed(status(shared.api("GET", f"{SEND}/{reply['id']}"), 200)) == untimed(reply)


def test_retry_of_the_users_message_takes_another_model(shared):
    said, _ = exchange(shared)
    assert text(shared.read(shared.stream({"model": "openai/say-2-0"}, f"{SEND}/{said['id']}/retry"))) == " t0 t1"


def test_retry_needs_no_body_and_keeps_the_replys_model(shared):
    _, reply = exchange(shared, model="openai/say-2-0")
    events = shared.read(shared.stream(None, f"{SEND}/{reply['id']}/retry"))
    assert (events[0].data["model"], text(events)) == ("openai/say-2-0", " t0 t1")


def test_stream_false_gives_the_finished_message(shared):
    body = {"content": "one two", "model": ECHO, "stream": False}
    message = status(shared.api("POST", SEND, body), 200)
    assert (message["status"], message["content"], message["role"]) == ("complete", "one two", "assistant")
    assert untimed(status(shared.api("GET", f"{SEND}/{message['id']}"), 200)) == untimed(message)


def test_stream_false_is_200_for_a_failed_reply_too(shared):
    body = {"content": "x", "model": "openai/say-5-0-end@2", "stream": False}
    message = status(shared.api("POST", SEND, body), 200)
    assert (message["status"], message["content"]) == ("error", " t0 t1")
    assert message["error"]["code"] == "provider_incomplete" and message["error"]["retriable"] is True


def test_background_gives_ids_and_the_reply_completes(shared):
    body = {"content": "x", "model": "openai/gate-3-1", "background": True}
    ids = status(shared.api("POST", SEND, body), 202)
    assert set(ids) == {"thread_id", "user_message_id", "message_ids"}
    shared.provider.open_gate()
    assert text(shared.attach(ids["message_ids"][0])) == " t0 t1 t2"
    assert status(shared.api("GET", f"{SEND}/{ids['message_ids'][0]}"), 200)["status"] == "complete"


def test_runs_lists_what_is_being_generated_now(shared):
    with shared.stream({"content": "x", "model": "openai/gate-3-1"}) as stream:
        events = iter(stream)
        start = next(events).data
        while next(events).id != "3":
            pass
        [run] = status(shared.api("GET", "/api/v1/runs"), 200)["runs"]
        assert {name: run[name] for name in ("message_id", "thread_id", "model", "position")} == {
            **{name: start[name] for name in ("message_id", "thread_id", "model")},
            "position": 3,
        }
        shared.provider.open_gate()
        assert [event.type for event in events][-1] == "done"
    assert status(shared.api("GET", "/api/v1/runs"), 200) == {"runs": []}


def test_running_message_is_read_as_far_as_it_has_come(shared):
    with shared.stream({"content": "x", "model": "openai/gate-3-2"}) as stream:
        events = iter(stream)
        message_id = next(events).data["message_id"]
        while next(events).id != "6":
            pass
        message = status(shared.api("GET", f"{SEND}/{message_id}"), 200)
        assert (message["status"], message["content"], message["position"]) == ("streaming", " t0 t1", 6)
        assert message["completed_at"] is None
        shared.provider.open_gate()
        list(events)


ODD = [
    "a\0b",
    "\0",
    "line\u2028paragraph\u2029next\x85el",
    "\ufeffbom",
    "\r\n\r tabs\t\v\f",
    "e\u0301\u0327 \u202eright to left\u202c",
    "\U0010ffff \ufffe \uffff \ue000",
    "\x7f\x1b[31mred\x1b[0m \x01\x1f",
    "data: x\n\nevent: done\ndata: {}\n\n",
    '\'; drop table messages; -- "quoted" \\u0000 \\ud800',
    " leading and trailing \n",
    "👨‍👩‍👧👍🏽🇩🇪 𝒳 漢字",
]


@pytest.mark.parametrize("content", ODD, ids=ascii)
def test_odd_text_comes_back_exactly(shared, content):
    said, reply = exchange(shared, content)
    assert said["content"] == reply["content"] == content
    assert shared.provider.requests[-1]["body"]["messages"][-1]["content"] == content
    assert messages_of(shared, said["thread_id"])[0]["content"] == content


################ Reactions


def react(shared, message_id, emoji):
    return status(shared.api("POST", f"{SEND}/{message_id}/reactions", {"emoji": emoji}), 200)["reactions"]


def test_reaction_added_twice_counts_once(shared):
    said, _ = exchange(shared)
    once = [{"emoji": "👍", "count": 1, "userReacted": True}]
    assert react(shared, said["id"], "👍") == once and react(shared, said["id"][:12], "👍") == once
    assert status(shared.api("GET", f"{SEND}/{said['id']}"), 200)["reactions"] == once


@pytest.mark.parametrize(
    "emoji", ["👍", "❤️", "👍🏽", "👨‍👩‍👧", "🇩🇪", "1️⃣", "#️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "☺️", ":+1:", ":party_parrot:"]
)
def test_reaction_of_every_form_is_added_and_taken_back(shared, emoji):
    _, reply = exchange(shared)
    assert react(shared, reply["id"], emoji) == [{"emoji": emoji, "count": 1, "userReacted": True}]
    path = f"{SEND}/{reply['id']}/reactions/{quote(emoji, safe='')}"
    assert status(shared.api("DELETE", path), 200) == {"reactions": []}
    assert status(shared.api("DELETE", path), 200) == {"reactions": []}


@pytest.mark.parametrize(
    "emoji", ["ok", "👍👍", "", " ", "👍 ", ":Not A Name:", "::", "a👍", "👍\n", "🇩", "1", "\u200d"]
)
def test_what_is_no_single_emoji_is_refused(shared, emoji):
    said, _ = exchange(shared)
    error = refused(shared, "invalid_request", 400, path=f"{SEND}/{said['id']}/reactions", body={"emoji": emoji})
    assert error["field"] == "emoji" and "emoji" in error["message"]


def test_emoji_in_the_path_is_checked_too(shared):
    said, _ = exchange(shared)
    error = refused(shared, "invalid_request", 400, "DELETE", f"{SEND}/{said['id']}/reactions/words")
    assert error["field"] == "emoji"


################ Providers, users, keys


def test_added_provider_is_used_listed_and_deleted(shared):
    body = {"kind": "openai", "base_url": shared.provider.openai_url, "models": ["say-2-0"], "prices": {"*": [1, 0, 2]}}
    made = status(shared.api("PUT", "/api/v1/providers/mine", body), 200)
    assert (made["built_in"], made["models"], made["key_set"]) == (False, ["say-2-0"], False)
    assert made in status(shared.api("GET", "/api/v1/providers"), 200)["providers"]
    reply = status(shared.api("POST", SEND, {"content": "x", "model": "mine/say-2-0", "stream": False}), 200)
    assert (reply["content"], reply["usage"]["cost"]) == (" t0 t1", pytest.approx((12 * 1 + 2 * 2) / 1e6))
    status(shared.api("DELETE", "/api/v1/providers/mine"), 204)
    refused(shared, "not_found", 404, "DELETE", "/api/v1/providers/mine")
    refused(shared, "unknown_model", 400, body={"content": "x", "model": "mine/say-2-0"})


def test_put_provider_replaces(shared):
    for address in ("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"):
        status(shared.api("PUT", "/api/v1/providers/moved", {"kind": "openai", "base_url": address}), 200)
    found = {one["name"]: one for one in status(shared.api("GET", "/api/v1/providers"), 200)["providers"]}
    assert found["moved"]["base_url"] == "http://127.0.0.1:2/v1"
    status(shared.api("DELETE", "/api/v1/providers/moved"), 204)


def test_built_in_provider_is_not_replaced(shared):
    refused(shared, "conflict", 409, "PUT", "/api/v1/providers/openai", {"kind": "demo"})


def test_no_answer_about_providers_holds_a_key(shared):
    answer = shared.client.send(shared.request("GET", "/api/v1/providers", None, None, None, None))
    assert {one["name"]: one["key_set"] for one in answer.json()["providers"]}["openai"] is True
    assert '"test"' not in answer.text


def test_provider_without_its_key_says_how_to_give_it(shared):
    body = {"kind": "openai", "base_url": shared.provider.openai_url, "key_env": "NO_SUCH_KEY"}
    status(shared.api("PUT", "/api/v1/providers/keyless", body), 200)
    error = refused(shared, "provider_auth", 400, body={"content": "x", "model": "keyless/echo"})
    assert "NO_SUCH_KEY" in error["message"] and "liminal providers key keyless" in error["message"]
    status(shared.api("DELETE", "/api/v1/providers/keyless"), 204)


def test_provider_that_is_not_there_is_named_with_its_address(shared):
    body = {"kind": "openai", "base_url": "http://127.0.0.1:9/v1"}
    status(shared.api("PUT", "/api/v1/providers/gone", body), 200)
    done = shared.send("x", model="gone/echo")[-1].data
    assert (done["status"], done["error"]["code"]) == ("error", "provider_error")
    assert "http://127.0.0.1:9/v1" in done["error"]["message"]
    status(shared.api("DELETE", "/api/v1/providers/gone"), 204)


def test_users_are_made_listed_and_deleted_with_all_that_is_theirs(shared):
    user = status(shared.api("POST", "/api/v1/users", {"name": "Zoë 🦊"}), 201)
    assert user["role"] == "member" and user in status(shared.api("GET", "/api/v1/users"), 200)["users"]
    key = status(shared.api("POST", "/api/v1/keys", {"name": "k", "user_id": user["id"]}), 201)
    with shared.stream({"content": "x", "model": ECHO}, key=key["secret"]) as stream:
        ids = next(iter(stream)).data
    assert status(shared.api("DELETE", f"/api/v1/users/{user['id']}"), 200) == user
    assert user not in status(shared.api("GET", "/api/v1/users"), 200)["users"]
    assert shared.sql("messages.db", "select count(*) from messages where thread_id = ?", ids["thread_id"]) == [(0,)]
    assert shared.sql("liminal.db", "select count(*) from api_keys where user_id = ?", user["id"]) == [(0,)]


def test_user_name_is_taken_once(shared):
    user = status(shared.api("POST", "/api/v1/users", {"name": "twin"}), 201)
    error = refused(shared, "conflict", 409, path="/api/v1/users", body={"name": "twin"})
    assert error["field"] == "name" and "twin" in error["message"]
    assert status(shared.api("DELETE", f"/api/v1/users/{user['id'][:8]}"), 200) == user


def test_owner_cannot_delete_themselves(shared):
    owner = next(one for one in status(shared.api("GET", "/api/v1/users"), 200)["users"] if one["name"] == "owner")
    refused(shared, "conflict", 409, "DELETE", f"/api/v1/users/{owner['id']}")


def test_key_shows_its_secret_once(shared):
    made = status(shared.api("POST", "/api/v1/keys", {"name": "phone"}), 201)
    assert made["secret"].startswith("lt_sk_") and made["secret"].startswith(made["prefix"])
    assert len(made["prefix"]) < 16 and made["last_used_at"] is None
    listed = {key["id"]: key for key in status(shared.api("GET", "/api/v1/keys"), 200)["keys"]}
    assert listed[made["id"]] == {name: value for name, value in made.items() if name != "secret"}
    status(shared.api("DELETE", f"/api/v1/keys/{made['id']}"), 200)


def test_last_used_at_is_noted(shared):
    made = status(shared.api("POST", "/api/v1/keys", {"name": "used"}), 201)
    status(shared.api("GET", THREADS, key=made["secret"]), 200)
    gone = status(shared.api("DELETE", f"/api/v1/keys/{made['id'][:12]}"), 200)
    assert gone["id"] == made["id"] and gone["last_used_at"] >= made["created_at"]


################ The servers themselves


def test_health_needs_no_key_and_names_version_and_instance(shared):
    edge, domain = (status(shared.api("GET", f"{url}/health", key=""), 200) for url in (shared.edge, shared.domain))
    assert (edge["status"], edge["domain"], domain["status"]) == ("ok", "ok", "ok")
    assert all(edge[name] == domain[name] != "" for name in ("version", "instance"))


@pytest.mark.parametrize("server", ["edge", "domain"])
def test_metrics_are_prometheus_text(shared, server):
    shared.send("x", model="openai/say-3-0")
    answer = shared.client.get(f"{getattr(shared, server)}/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(answer.text))
    assert all(family.name.startswith("liminal_") and family.documentation for family in families)
    assert sum(sample.value for family in families for sample in family.samples) > 0


@pytest.mark.parametrize("server", ["edge", "domain"])
def test_metrics_named_total_are_counters(shared, server):
    types = [line.split()[2:] for line in shared.client.get(f"{getattr(shared, server)}/metrics").text.split("\n")]
    assert [one for one in types if len(one) == 2 and one[0].endswith("_total") and one[1] != "counter"] == []


def test_contract_is_served_as_it_stands_in_the_file(shared):
    assert status(shared.api("GET", "/contracts.json", key=""), 200) == CONTRACT


################ Refused


BODIES = {
    "not JSON": (b"{", None),
    "empty": (b"", None),
    "no object": (b"[]", None),
    "text behind the object": (b'{"content": "x"} x', None),
    "single quotes": (b"{'content': 'x'}", None),
    "not UTF-8": (b'{"content": "\xff"}', None),
    "UTF-16": ('{"content": "x"}'.encode("utf-16"), None),
    "duplicate keys": (b'{"content": "x", "content": "y"}', "twice"),
    "duplicate keys deep down": (b'{"content": "x", "options": {"a": [{"b": 1, "b": 2}]}}', "twice"),
    "NaN": (b'{"content": "x", "temperature": NaN}', "NaN"),
    "Infinity": (b'{"content": "x", "options": {"a": -Infinity}}', "Infinity"),
    "1e999": (b'{"content": "x", "temperature": 1e999}', "1e999"),
    "lone surrogate": (b'{"content": "\\ud800"}', "UTF-8"),
    "lone surrogate in a key": (b'{"content": "x", "options": {"\\udfff": 1}}', "UTF-8"),
    "deep nesting": (b'{"content": "x", "options": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", "deep"),
    "integer of 65 bits": (b'{"content": "x", "options": {"a": 18446744073709551616}}', "integer"),
    "integer of 5000 digits": (b'{"content": "x", "max_tokens": ' + b"9" * 5000 + b"}", "integer"),
    "a control character": (b'{"content": "a\nb"}', None),
}


@pytest.mark.parametrize("name", BODIES)
def test_malformed_body_is_refused_with_a_reason(shared, name):
    raw, word = BODIES[name]
    error = refused(shared, "invalid_request", 400, raw=raw)
    assert "body" in error["message"] and (word is None or word in error["message"])


FIELDS = {
    "content": [None, 1, "", " \n\t ", ["x"], {"text": "x"}],
    "thread_id": [None, 1, ""],
    "parent_id": [1, ""],
    "model": [None, 1, "", "a b", "x" * 201],
    "system": [1, ["x"], "x" * 200_001],
    "max_tokens": [0, -1, 1.5, "9", True],
    "temperature": ["0", -0.1, 2.1, True],
    "options": [1, "x", []],
    "tools": [True, "x", [1]],
    "allow": ["git__*", [""]],
    "stream": ["yes", 0, None],
    "background": [1, "true"],
    "unknown": [1],
    "Content": ["x"],
}


@pytest.mark.parametrize("field", FIELDS)
def test_wrong_field_is_refused_by_its_name(shared, field):
    for value in FIELDS[field]:
        error = refused(shared, "invalid_request", 400, body={"content": "x", field: value})
        assert error["field"].split(".")[0] == field and field in error["message"], value


def test_missing_content_is_named(shared):
    error = refused(shared, "invalid_request", 400, body={"model": ECHO})
    assert error["field"] == "content" and "missing" in error["message"]


@pytest.mark.parametrize(
    "method, path, body, field",
    [
        ("POST", THREADS, {"titel": "x"}, "titel"),
        ("POST", THREADS, {"title": ""}, "title"),
        ("POST", "/api/v1/users", {}, "name"),
        ("POST", "/api/v1/users", {"name": "x", "role": "king"}, "role"),
        ("POST", "/api/v1/users", {"name": "a\nb"}, "name"),
        ("POST", "/api/v1/keys", {"name": ""}, "name"),
        ("PUT", "/api/v1/providers/mine", {"kind": "other"}, "kind"),
        ("PUT", "/api/v1/providers/mine", {"kind": "openai"}, "base_url"),
        ("PUT", "/api/v1/providers/mine", {"kind": "openai", "base_url": "ftp://x"}, "base_url"),
        ("PUT", "/api/v1/providers/mine", {"kind": "openai", "base_url": "http://x", "key_env": "lower"}, "key_env"),
        ("PUT", "/api/v1/providers/mine", {"kind": "demo", "prices": {"*": [1, 2]}}, "prices.*"),
        ("PUT", "/api/v1/providers/Not%20A%20Name", {"kind": "demo"}, "name"),
    ],
)
def test_wrong_field_elsewhere_is_named(shared, method, path, body, field):
    error = refused(shared, "invalid_request", 400, method, path, body)
    assert error["field"] == field and field in error["message"]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=-1", "limit=x", "limit=", "limit=1.5", "limit=1_0", "limit=%D9%A3"]
)
def test_bad_limit_is_refused(shared, query):
    thread_id = make_thread(shared)["id"]
    for path in (THREADS, f"{THREADS}/{thread_id}/messages"):
        assert refused(shared, "invalid_request", 400, "GET", f"{path}?{query}")["field"] == "limit"


@pytest.mark.parametrize("value", ["-1", "x", "", "1.5", "99999999999999999999", "1_0", "%D9%A3"])
def test_bad_after_is_refused(shared, value):
    path = f"{THREADS}/{make_thread(shared)['id']}/messages?after={value}"
    assert refused(shared, "invalid_request", 400, "GET", path)["field"] == "after"


def test_unknown_before_is_not_found(shared):
    refused(shared, "not_found", 404, "GET", f"{THREADS}?before={NOBODY}")


@pytest.mark.parametrize("key", ["", "x" * 201, "with space", "tab\t!"])
def test_bad_idempotency_key_is_refused(shared, key):
    error = refused(shared, "invalid_request", 400, body={"content": "x"}, headers={"Idempotency-Key": key})
    assert error["field"] == "Idempotency-Key"


def test_idempotency_key_of_bytes_that_are_no_text_is_refused(shared):
    head = b"POST /api/v1/messages HTTP/1.1\r\nAuthorization: Bearer %s\r\nIdempotency-Key: \xff\xfe\r\n" % (
        shared.key.encode()
    )
    error = status(plain(shared.edge, head + b"Content-Length: 16", b'{"content": "x"}'), 400, "invalid_request")
    assert error["field"] == "Idempotency-Key"


@pytest.mark.parametrize(
    "path", [b"/\xff\xfe", b"/api/v1/threads/%ff%00%ed%a0%80", b"/api/v1/threads/\xff\xfe\xfd\xfc"]
)
def test_path_of_bytes_that_are_no_text_gets_the_one_error_shape(shared, path):
    head = b"GET %s HTTP/1.1\r\nAuthorization: Bearer %s" % (path, shared.key.encode())
    number, body = plain(shared.edge, head)
    assert number in (400, 404) and status((number, body), number)["request_id"]


def test_unknown_ids_are_not_found(shared):
    thread_id = make_thread(shared)["id"]
    for method, path, body in [
        ("GET", f"{SEND}/{NOBODY}", None),
        ("GET", f"{SEND}/{NOBODY}/stream", None),
        ("POST", f"{SEND}/{NOBODY}/cancel", None),
        ("POST", f"{SEND}/{NOBODY}/retry", {}),
        ("POST", SEND, {"content": "x", "thread_id": NOBODY}),
        ("POST", SEND, {"content": "x", "thread_id": thread_id, "parent_id": NOBODY}),
        ("GET", f"{THREADS}/{NOBODY}/messages", None),
        ("DELETE", f"/api/v1/users/{NOBODY}", None),
        ("DELETE", f"/api/v1/keys/{NOBODY}", None),
        ("DELETE", "/api/v1/providers/nobody", None),
    ]:
        assert "there is no" in refused(shared, "not_found", 404, method, path, body)["message"]


def test_parent_of_another_thread_is_not_found(shared):
    (said, _), thread_id = exchange(shared), make_thread(shared)["id"]
    refused(shared, "not_found", 404, body={"content": "x", "thread_id": thread_id, "parent_id": said["id"]})


def test_parent_without_thread_is_refused(shared):
    error = refused(shared, "invalid_request", 400, body={"content": "x", "parent_id": NOBODY})
    assert error["field"] == "parent_id" and "thread_id" in error["message"]


def test_users_message_has_no_stream_and_no_cancel(shared):
    said, _ = exchange(shared)
    refused(shared, "invalid_request", 400, "GET", f"{SEND}/{said['id']}/stream")
    refused(shared, "invalid_request", 400, "POST", f"{SEND}/{said['id']}/cancel")


@pytest.mark.parametrize("model", ["nope", "nope/x", "demo/nope", "demo/load-x-1", "/", "openai/", "demo/load-1-1/x"])
def test_unknown_model_is_refused_and_nothing_is_stored(shared, model):
    before = shared.sql("messages.db", "select count(*) from messages")
    error = refused(shared, "unknown_model", 400, body={"content": "x", "model": model})
    assert error["field"] == "model" and ("provider/model" in error["message"] or "model" in error["message"])
    assert shared.sql("messages.db", "select count(*) from messages") == before


def test_body_over_the_limit_is_too_large_and_names_the_limit(shared):
    raw = b'{"content": "%s"}' % (b"x" * LIMITS["body_bytes"])
    error = refused(shared, "too_large", 413, raw=raw)
    assert str(LIMITS["body_bytes"]) in error["message"]


def test_message_over_the_prompts_budget_is_too_large_and_names_size_and_limit(shared):
    error = refused(shared, "too_large", 413, body={"content": "x" * 300_010, "model": ECHO})
    assert "100000" in error["message"] and "100004" in error["message"] and error["field"] == "content"


@pytest.mark.parametrize(
    "method, path", [("PUT", SEND), ("DELETE", THREADS), ("POST", "/health"), ("PATCH", "/metrics")]
)
def test_wrong_method_is_405_and_says_which_are_right(shared, method, path):
    answer = shared.client.send(shared.request(method, path, {}, None, None, None))
    error = status((answer.status_code, answer.json()), 405, "method_not_allowed")
    assert method in error["message"] and answer.headers["allow"]


@pytest.mark.parametrize(
    "path", ["/", "/api/v1", "/api/v2/threads", "/api/v1/threads/", "/domain/threads", "/favicon.ico"]
)
def test_unknown_path_is_404_and_points_to_the_contract(shared, path):
    assert "/contracts.json" in refused(shared, "not_found", 404, "GET", path)["message"]


def test_header_of_the_contracts_limit_is_taken(shared):
    headers = {"x-filler": "x" * (LIMITS["header_bytes"] - 2000)}
    status(shared.api("GET", THREADS, headers=headers), 200)


def test_headers_over_the_limit_get_the_one_error_shape(shared):
    head = b"GET /health HTTP/1.1\r\nx-filler: " + b"x" * (4 * LIMITS["header_bytes"])
    number, body = plain(shared.edge, head)
    assert 400 <= number < 500 and set(body) == {"error"}


def test_each_error_has_a_request_id_of_its_own(shared):
    ids = {refused(shared, "not_found", 404, "GET", f"{SEND}/{NOBODY}")["request_id"] for _ in range(3)}
    assert len(ids) == 3


def test_request_id_of_the_client_is_given_back(shared):
    error = refused(shared, "not_found", 404, "GET", f"{SEND}/{NOBODY}", headers={"x-request-id": "trace-42"})
    assert error["request_id"] == "trace-42"
