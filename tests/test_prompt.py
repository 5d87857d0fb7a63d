"""The prompt: the way from the root of a thread's tree to the message answered, within its budget, in both formats.

Order: the tree, replies that did not end well, the budget, histories written into the databases of a stopped installation.
"""

import json
import sqlite3
import uuid
from contextlib import closing

import pytest

from conftest import Liminal, status, text, with_provider
from provider import Provider, text_of

both = pytest.mark.parametrize("kind", ["anthropic", "openai"])
BUDGET = 200  # tokens, of the small installation


def history(request: dict) -> list[tuple[str, str]]:
    """(role, text) of each message of a request, without the system text; texts of one message stand apart by `|`."""
    made = []
    for message in request["body"]["messages"]:
        content = message["content"] or ""
        blocks = [content] if isinstance(content, str) else [text_of([block]) for block in content]
        made.append((message["role"], "|".join(blocks).replace("\n\n", "|")))
    return [one for one in made if one[0] != "system"]


def ids(events: list) -> tuple[str, str, str]:
    """(thread, the user's message, the reply)"""
    return tuple(events[0].data[name] for name in ("thread_id", "user_message_id", "message_id"))


def last(liminal: Liminal) -> list[tuple[str, str]]:
    return history(liminal.provider.requests[-1])


def retry(liminal: Liminal, message_id: str, **body) -> list:
    return liminal.read(liminal.stream(body, f"/api/v1/messages/{message_id}/retry"))


################ The tree


@both
def test_parent_id_makes_a_branch_without_what_came_after(shared, kind):
    thread, _, first = ids(shared.send("one", model=f"{kind}/echo"))
    shared.send("two", thread_id=thread, model=f"{kind}/echo")
    shared.send("three", thread_id=thread, model=f"{kind}/echo", parent_id=first)
    assert last(shared) == [("user", "one"), ("assistant", "one"), ("user", "three")]


def test_later_turns_follow_the_newest_finished_message(shared):
    thread, _, first = ids(shared.send("one", model="openai/echo"))
    shared.send("two", thread_id=thread, model="openai/echo")
    shared.send("three", thread_id=thread, model="openai/echo", parent_id=first)
    shared.send("four", thread_id=thread, model="openai/echo")
    assert [said for role, said in last(shared) if role == "user"] == ["one", "three", "four"]


def test_a_message_may_hang_on_an_unanswered_one(shared):
    thread, said, _ = ids(shared.send("one", model="openai/echo"))
    shared.send("two", thread_id=thread, model="openai/echo", parent_id=said)
    assert last(shared) == [("user", "one|two")]


def test_a_parent_of_another_thread_is_not_found(shared):
    thread, *_ = ids(shared.send("one", model="openai/echo"))
    *_, other = ids(shared.send("two", model="openai/echo"))
    body = {"content": "three", "thread_id": thread, "parent_id": other}
    status(shared.api("POST", "/api/v1/messages", body), 404, "not_found")


@both
def test_a_retry_is_a_second_reply_to_the_same_message_with_the_same_prompt(shared, kind):
    thread, _, _ = ids(shared.send("one", model=f"{kind}/say-1-0", system="be brief"))
    _, said, reply = ids(shared.send("two", thread_id=thread))
    again = ids(retry(shared, reply))
    assert (again[0], again[1]) == (thread, said) and again[2] != reply
    first, second = [request["body"] for request in shared.provider.requests[1:]]
    assert first == second


def test_a_retry_stands_beside_the_first_reply(shared):
    thread, said, reply = ids(shared.send("one", model="openai/say-1-0"))
    retry(shared, reply, model="openai/say-2-0")
    messages = status(shared.api("GET", f"/api/v1/threads/{thread}/messages"), 200)["messages"]
    assert [(m["number"], m["parent_id"], m["content"]) for m in messages] == [
        (1, None, "one"),
        (2, said, " t0"),
        (3, said, " t0 t1"),
    ]


def test_a_retry_replaces_the_reply_in_later_prompts(shared):
    thread, _, reply = ids(shared.send("one", model="openai/say-1-0"))
    retry(shared, reply, model="openai/say-2-0")
    shared.send("two", thread_id=thread, model="openai/echo")
    assert last(shared) == [("user", "one"), ("assistant", " t0 t1"), ("user", "two")]


def test_a_retry_may_name_the_users_message(shared):
    _, said, _ = ids(shared.send("one", model="openai/say-1-0"))
    assert ids(retry(shared, said, model="openai/echo"))[1] == said and last(shared) == [("user", "one")]


################ Replies that did not end well


@both
def test_an_empty_reply_is_left_out_and_its_neighbours_are_joined(shared, kind):
    thread, *_ = ids(shared.send("one", model=f"{kind}/say-1-0-s500@0"))
    shared.send("two", thread_id=thread, model=f"{kind}/say-1-0")
    shared.send("three", thread_id=thread, model=f"{kind}/echo")
    assert last(shared) == [("user", "one|two"), ("assistant", " t0"), ("user", "three")]


@both
def test_a_reply_of_thinking_alone_is_left_out(shared, kind):
    thread, *_ = ids(shared.send("one", model=f"{kind}/think-4-0-cut@2"))
    shared.send("two", thread_id=thread, model=f"{kind}/echo")
    assert last(shared) == [("user", "one|two")]


@both
def test_a_failed_replys_partial_text_is_in_the_next_prompt(shared, kind):
    thread, *_ = ids(shared.send("one", model=f"{kind}/say-9-0-cut@2"))
    shared.send("two", thread_id=thread, model=f"{kind}/echo")
    assert last(shared) == [("user", "one"), ("assistant", " t0 t1"), ("user", "two")]


@both
def test_a_cancelled_replys_partial_text_is_in_the_next_prompt(shared, kind):
    with shared.stream({"content": "one", "model": f"{kind}/gate-9-2"}) as stream:
        events = iter(stream)
        thread, _, reply = ids([next(events)])
        shared.provider.wait_gate()
        while next(events).id != "6":
            pass
        status(shared.api("POST", f"/api/v1/messages/{reply}/cancel"), 200)
    shared.send("two", thread_id=thread, model=f"{kind}/echo")
    assert last(shared) == [("user", "one"), ("assistant", " t0 t1"), ("user", "two")]


################ The budget


@pytest.fixture(scope="module")
def small_liminal(tmp_path_factory):
    with closing(Provider()) as provider:
        settings = with_provider(provider, {"LIMINAL_CONTEXT": str(BUDGET)})
        with closing(Liminal(tmp_path_factory.mktemp("small") / "data", provider, **settings)) as liminal:
            yield liminal.start()


@pytest.fixture
def small(small_liminal):
    small_liminal.provider.reset()
    yield small_liminal
    small_liminal.check_logs()


@both
def test_the_oldest_turns_fall_out_whole(small, kind):
    fields = {"model": f"{kind}/echo", "system": "s" * 30}
    for letter in "abcd":
        thread, *_ = ids(small.send(letter * 90, **fields))  # a turn is 60 tokens, the last one 30, the system 10
        fields = {"model": f"{kind}/echo", "thread_id": thread}
    small.send("e" * 90, **fields)
    kept = [(role, letter * 90) for letter in "cd" for role in ("user", "assistant")]
    assert last(small) == [*kept, ("user", "e" * 90)]
    assert "s" * 30 in json.dumps(small.provider.requests[-1]["body"])


@both
def test_the_last_turn_stays_where_nothing_else_fits(small, kind):
    thread, *_ = ids(small.send("a" * 300, model=f"{kind}/say-1-0"))
    small.send("b" * 3 * BUDGET, thread_id=thread)
    assert last(small) == [("user", "b" * 3 * BUDGET)]


def test_the_budget_counts_bytes(small):
    small.send("é" * 300, model="openai/say-1-0")
    status(small.api("POST", "/api/v1/messages", {"content": "é" * 301, "model": "openai/say-1-0"}), 413, "too_large")


@pytest.mark.parametrize("content, system", [("a" * 603, None), ("a" * 300, "s" * 303)])
def test_a_last_turn_over_the_budget_is_refused_and_nothing_stored(small, content, system):
    counts = "select count(*) from messages", "select count(*) from threads"
    before = [small.sql("messages.db", counts[0]), small.sql("liminal.db", counts[1])]
    body = {"content": content, "model": "openai/say-1-0"} | ({"system": system} if system else {})
    error = status(small.api("POST", "/api/v1/messages", body), 413, "too_large")
    assert "201" in error["message"] and str(BUDGET) in error["message"] and "LIMINAL_CONTEXT" in error["message"]
    assert [small.sql("messages.db", counts[0]), small.sql("liminal.db", counts[1])] == before
    assert small.provider.requests == [] and status(small.api("GET", "/api/v1/runs"), 200)["runs"] == []


def test_a_refused_message_leaves_its_thread_as_it_was(small):
    thread, *_ = ids(small.send("one", model="openai/echo"))
    status(small.api("POST", "/api/v1/messages", {"content": "a" * 603, "thread_id": thread}), 413, "too_large")
    small.send("two", thread_id=thread, model="openai/echo")
    assert last(small) == [("user", "one"), ("assistant", "one"), ("user", "two")]


################ Histories written into a stopped installation's databases


def call(number: int) -> dict:
    return {"type": "tool_call", "tool_call_id": f"id-{number}", "name": "f", "arguments": {"n": number}}


def result(number: int) -> dict:
    return {"type": "tool_result", "tool_call_id": f"id-{number}", "name": "f", "text": f"r{number}", "is_error": False}


def say(words: str) -> dict:
    return {"type": "text", "text": words}


HISTORIES = {
    "whole": [say("let me see"), call(1), call(2), result(1), result(2), say("so")],
    "none": [say("let me see"), call(1)],
    "half": [call(1), call(2), result(2)],
    "rounds": [call(1), result(1), call(2), {"type": "thinking", "text": "hm"}],
    "long": None,
}
CALLED = {"name": "f", "arguments": '{"n":1}'}


@pytest.fixture(scope="module")
def past_liminal(tmp_path_factory):
    """An installation with a thread for each history, named in `threads`."""
    with closing(Provider()) as provider:
        settings = with_provider(provider, {})
        with closing(Liminal(tmp_path_factory.mktemp("past") / "data", provider, **settings)) as liminal:
            liminal.start()
            made = {name: status(liminal.api("POST", "/api/v1/threads", {"title": name}), 201) for name in HISTORIES}
            liminal.threads = {name: thread["id"] for name, thread in made.items()}
            for name in ("edge", "domain"):
                liminal.stop(name)
            for name, parts in HISTORIES.items():
                turns = [("user", [say("go")]), ("assistant", parts)]
                long = [("user" if n % 2 else "assistant", [say(f"m{n}")]) for n in range(1, 2001)]
                insert(liminal, liminal.threads[name], turns if parts else long)
            yield liminal.start()


@pytest.fixture
def past(past_liminal):
    past_liminal.provider.reset()
    yield past_liminal
    past_liminal.check_logs()


def insert(liminal: Liminal, thread_id: str, turns: list[tuple[str, list]]):
    """Messages of these parts, each hanging on the one before."""
    ((user_id,),) = liminal.sql("liminal.db", "select id from users")
    parent, time = None, "2026-01-01T00:00:00.000Z"
    with closing(sqlite3.connect(liminal.data / "messages.db")) as db, db:
        for number, (role, parts) in enumerate(turns, 1):
            message_id = str(uuid.uuid4())
            length = sum(len(part["text"]) if part["type"] in ("text", "thinking") else 1 for part in parts)
            row = (message_id, thread_id, user_id, number, parent, role, "complete", length, time, time)
            names = "id, thread_id, user_id, number, parent_id, role, status, position, created_at, completed_at"
            db.execute(f"insert into messages ({names}) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            db.execute("insert into chunks values (?, ?, ?)", (message_id, length, json.dumps(parts)))
            parent = message_id


def sent(liminal: Liminal, kind: str, name: str) -> list[dict]:
    """The messages that a provider gets after a history, between the first and the last; and back to where it was."""
    ((parent,),) = liminal.sql(
        "messages.db", "select id from messages where thread_id = ? and number = 2", liminal.threads[name]
    )
    events = liminal.send("next", thread_id=liminal.threads[name], parent_id=parent, model=f"{kind}/echo")
    assert events[-1].data["status"] == "complete", events[-1].data["error"]
    first, *between, newest = liminal.provider.requests[-1]["body"]["messages"]
    assert (text_of(first["content"]), text_of(newest["content"])[-4:]) == ("go", "next")
    return [*between, newest]


def use(number: int) -> dict:
    return {"type": "tool_use", "id": f"id-{number}", "name": "f", "input": {"n": number}}


def got(number: int, words=None) -> dict:
    block = {"type": "tool_result", "tool_use_id": f"id-{number}", "content": words or f"r{number}"}
    return {**block, "is_error": words is not None}


NEXT = {"type": "text", "text": "next", "cache_control": {"type": "ephemeral"}}
ANTHROPIC = {
    "whole": [
        ("assistant", [say("let me see"), use(1), use(2)]),
        ("user", [got(1), got(2)]),
        ("assistant", [say("so")]),
    ],
    "none": [("assistant", [say("let me see"), use(1)]), ("user", [got(1, "cancelled")])],
    "half": [("assistant", [use(1), use(2)]), ("user", [got(1, "cancelled"), got(2)])],
    "rounds": [
        ("assistant", [use(1)]),
        ("user", [got(1)]),
        ("assistant", [use(2)]),
        ("user", [got(2, "cancelled")]),
    ],
}


@pytest.mark.parametrize("name", ANTHROPIC)
def test_tool_calls_go_back_to_anthropic_as_blocks_each_with_its_result(past, name):
    """What the user says next may stand in a message of its own or behind the results: Anthropic joins them."""
    joined = []
    for message in sent(past, "anthropic", name):
        if joined and joined[-1][0] == message["role"]:
            joined[-1][1].extend(message["content"])
        else:
            joined.append((message["role"], list(message["content"])))
    expected = [(role, list(blocks)) for role, blocks in ANTHROPIC[name]]
    expected += [("user", [])] if expected[-1][0] == "assistant" else []
    expected[-1][1].append(NEXT)
    assert joined == expected


OPENAI = {
    "whole": ["let me see", (1, 2), ("id-1", "r1"), ("id-2", "r2"), "so"],
    "none": ["let me see", (1,), ("id-1", "cancelled")],
    "half": [(1, 2), ("id-1", "cancelled"), ("id-2", "r2")],
    "rounds": [(1,), ("id-1", "r1"), (2,), ("id-2", "cancelled")],
}


@pytest.mark.parametrize("name", OPENAI)
def test_tool_calls_go_back_to_openai_as_tool_calls_and_tool_messages(past, name):
    made = []
    for message in sent(past, "openai", name)[:-1]:
        if message["role"] == "tool":
            made.append((message["tool_call_id"], message["content"]))
            continue
        assert message["role"] == "assistant"
        made += [message["content"]] if message["content"] else []
        functions = [(call["type"], call["id"], call["function"]) for call in message.get("tool_calls", ())]
        numbers = tuple(json.loads(function["arguments"])["n"] for _, _, function in functions)
        assert functions == [
            ("function", f"id-{n}", {"name": "f", "arguments": json.dumps({"n": n}, separators=(",", ":"))})
            for n in numbers
        ]
        made += [numbers] if numbers else []
    assert made == OPENAI[name]


def test_a_prompt_of_2000_messages_is_built_without_noticeable_delay(past):
    """A whole second would be noticed on a quiet machine; this one may be busy."""
    events = past.send("next", thread_id=past.threads["long"], model="openai/say-1-0")
    assert [said for _, said in last(past)] == [*(f"m{n}" for n in range(1, 2001)), "next"]
    assert text(events) == " t0" and events[-1].data["timing"]["domain_ttft_ms"] < 3000
