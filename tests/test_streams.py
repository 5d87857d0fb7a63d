"""A reply's stream: its form, positions and resume, bundles, cancel, repeats, and what survives the end of a server."""

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from threading import Barrier, Thread
from urllib.parse import urlsplit

import httpx2
import pytest
from conftest import status, text
from prometheus_client.parser import text_string_to_metric_families

from provider import GATE, anthropic_stream, openai_stream

SEND = "/api/v1/messages"
MIXED = [("thinking", "🤔e\u0301"), ("thinking", "h"), "né 👨‍👩‍👧", "漢字𝒳", "\n\0"]
FLAT = [(kind, one) for kind, said in [("thinking", "🤔e\u0301h"), ("text", "né 👨‍👩‍👧漢字𝒳\n\0")] for one in said]
RESUME = pytest.mark.parametrize("by_header", [True, False], ids=["Last-Event-ID", "after"])


def numbered(n, start=0):
    return "".join(f" t{i}" for i in range(start, n))


def flat(events):
    """[(type, code point)] of the text and thinking of a stream."""
    return [(event.type, one) for event in events if event.type in ("text", "thinking") for one in event.data["text"]]


def get(shared, message_id):
    return status(shared.api("GET", f"{SEND}/{message_id}"), 200)


def eventually(look, seconds=15):
    """The first true answer of `look`; for what has no event that a client could wait for."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
    return found


def timed(shared, message_id):
    """The message, once the Edge has brought its own part of the timing, and with it all that it queued before."""
    return eventually(lambda: (found := get(shared, message_id))["timing"]["edge_ttft_ms"] and found)


def open_after(shared, message_id, after, by_header=True):
    path, headers = f"{SEND}/{message_id}/stream", {"last-event-id": str(after)} if by_header else {}
    return shared.stream(None, path if by_header else f"{path}?after={after}", "GET", headers)


def until(events, position):
    """The events up to the one at this position."""
    found = []
    while not found or found[-1].id != str(position):
        found.append(next(events))
    return found


@contextmanager
def running(shared, model="openai/gate-10-2", position=6, **fields):
    """(start's data, the stream's other events) of a reply that stands at its gate, its first tokens received."""
    with shared.stream({"content": "x", "model": model, **fields}) as stream:
        events = iter(stream)
        start = next(events).data
        until(events, position)
        yield start, events


def stored(shared, message_id):
    """A reply's events as the rows of its bundles hold them, after checking that these join without a hole."""
    rows = shared.sql("messages.db", "select position, parts from chunks where message_id = ? order by 1", message_id)
    parts = [json.loads(row[1]) for row in rows]
    ends = accumulate(sum(len(part["text"]) for part in some) for some in parts)
    assert list(ends) == [row[0] for row in rows]
    return [(part["type"], one) for some in parts for part in some for one in part["text"]]


################ The form


def test_headers_are_as_designed(shared):
    with shared.stream({"content": "x", "model": "openai/say-1-0"}) as stream:
        headers = stream.response.headers
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["cache-control"] == "no-cache, no-transform" and headers["x-accel-buffering"] == "no"


def test_retry_comes_first_and_once(shared):
    lines = list(shared.stream_lines({"content": "x", "model": "openai/say-40-0"}))
    assert lines[0] == "retry: 2000" and sum(line.startswith("retry") for line in lines) == 1


def test_start_comes_first_without_id(shared):
    lines = list(shared.stream_lines({"content": "x", "model": "openai/say-1-0"}))
    assert lines[2] == "event: start" and lines[3].startswith("data: ")
    start = json.loads(lines[3][6:])
    assert set(start) == set("type message_id thread_id user_message_id speaker model position".split())
    assert (start["type"], start["speaker"], start["model"], start["position"]) == ("start", None, "openai/say-1-0", 0)


def test_done_comes_last_and_once(shared):
    with shared.stream({"content": "x", "model": "openai/say-40-0"}) as stream:
        events = list(stream)
    assert [event.type for event in events].count("done") == 1 and events[-1].type == "done"
    done = events[-1].data
    assert set(done) == set("type status position stop_reason usage timing error".split())
    assert (done["status"], done["stop_reason"], done["error"]) == ("complete", "end_turn", None)
    assert events[-1].id == str(done["position"]) == str(len(numbered(40)))


@pytest.mark.parametrize("wire", ["openai", "anthropic"])
def test_ids_count_code_points(shared, wire):
    shared.provider.script(*{"openai": openai_stream, "anthropic": anthropic_stream}[wire](*MIXED))
    events = shared.send("x", model=f"{wire}/scripted")
    assert flat(events) == FLAT
    assert [int(e.id) for e in events[1:-1]] == list(accumulate(len(e.data["text"]) for e in events[1:-1]))
    assert events[-1].data["position"] == len(FLAT)


def test_surrogate_halves_are_joined_and_lone_ones_replaced(shared):
    shared.provider.script(*openai_stream("a\ud83d", "\ude00b", "\udc00c", "\ud83d"))
    assert text(shared.send("x", model="openai/scripted")) == "a😀b\ufffdc\ufffd"


def test_data_is_one_line_whatever_it_holds(shared):
    said = "a\nb\r\nc\u2028d\x85e\n\nevent: done\ndata: {}\n\n"
    shared.provider.script(*openai_stream(said))
    lines = list(shared.stream_lines({"content": "x", "model": "openai/scripted"}))
    data = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert "".join(one.get("text", "") for one in data) == said
    assert all(line.partition(":")[0] in ("event", "id", "data", "retry", "") for line in lines)
    assert [line[7:] for line in lines if line.startswith("event: ")] == [one["type"] for one in data]


def test_reply_of_nothing_is_start_and_done(shared):
    assert [event.type for event in shared.send("x", model="openai/say-0-0")] == ["start", "done"]


################ Bundles


def test_first_token_leaves_though_more_are_held_back(shared):
    with running(shared, "openai/gate-40-1", position=3) as (_, events):
        shared.provider.open_gate()
        assert numbered(1) + text(list(events)) == numbered(40)


def test_start_leaves_before_the_provider_answers(shared):
    with shared.stream({"content": "x", "model": "openai/gate-2-0"}) as stream:
        events = iter(stream)
        assert next(events).type == "start"
        shared.provider.open_gate()
        assert text(list(events)) == " t0 t1"


def buckets(shared, name):
    """{le: count} of a histogram of the Edge, its sum as "sum"."""
    families = text_string_to_metric_families(shared.client.get("/metrics").text)
    samples = [sample for family in families if family.name == name for sample in family.samples]
    return {one.labels.get("le", "sum"): one.value for one in samples if one.name.endswith(("_bucket", "_sum"))}


def test_client_bundles_hold_at_most_16_tokens_and_count_each_once(shared):
    before = buckets(shared, "liminal_client_bundle_tokens")
    events = shared.send("x", model="openai/say-500-0")
    after = buckets(shared, "liminal_client_bundle_tokens")
    grown = {name: after[name] - before[name] for name in after}
    assert grown["sum"] == 500 and grown["16.0" if "16.0" in grown else "16"] == grown["+Inf"]
    assert all(event.data["text"].count("t") <= 16 for event in events if event.type == "text")


def test_fast_tokens_are_bundled_by_size(shared):
    events = shared.send("x", model="demo/load-1601-0")
    assert sum(event.type == "text" for event in events) <= 130 and text(events) == numbered(1601)


def test_database_bundles_hold_at_most_50_tokens(shared):
    before = buckets(shared, "liminal_database_bundle_tokens")
    shared.send("x", model="openai/say-500-0")
    after = buckets(shared, "liminal_database_bundle_tokens")
    assert after["sum"] - before["sum"] == 500
    assert after["64.0" if "64.0" in after else "64"] == after["+Inf"]


################ Resume


@RESUME
def test_every_position_of_a_finished_reply_resumes_exactly(shared, by_header):
    shared.provider.script(*openai_stream(*MIXED))
    message_id = shared.send("x", model="openai/scripted")[0].data["message_id"]
    for position in range(len(FLAT) + 1):
        events = shared.read(open_after(shared, message_id, position, by_header))
        assert flat(events) == FLAT[position:] and events[0].data["position"] == position
        assert [int(e.id) for e in events[1:-1]] == list(
            accumulate((len(e.data["text"]) for e in events[1:-1]), initial=position)
        )[1:]


@RESUME
def test_every_position_of_a_running_reply_resumes_exactly(shared, by_header):
    shared.provider.script(*openai_stream(*MIXED, GATE, "😀!"))
    with running(shared, "openai/scripted", position=len(FLAT)) as (start, events):
        for position in range(len(FLAT)):
            with open_after(shared, start["message_id"], position, by_header) as stream:
                assert flat(until(iter(stream), len(FLAT))) == FLAT[position:]
        late = [open_after(shared, start["message_id"], position, by_header) for position in (0, 2, 5, len(FLAT))]
        shared.provider.open_gate()
        for position, stream in zip((0, 2, 5, len(FLAT)), late):
            assert flat(shared.read(stream)) == (FLAT + [("text", "😀"), ("text", "!")])[position:]


def test_without_a_position_everything_comes(shared):
    sent = shared.send("x", model="openai/say-30-0")
    assert text(shared.attach(sent[0].data["message_id"])) == numbered(30)


def test_header_goes_before_the_query(shared):
    message_id = shared.send("x", model="openai/say-2-0")[0].data["message_id"]
    stream = shared.stream(None, f"{SEND}/{message_id}/stream?after=1", "GET", {"last-event-id": "3"})
    assert text(shared.read(stream)) == " t1"


def test_stream_is_found_by_a_prefix(shared):
    message_id = shared.send("x", model="openai/say-2-0")[0].data["message_id"]
    assert text(shared.attach(message_id[:12], 3)) == " t1"


@RESUME
@pytest.mark.parametrize("position", ["-1", "x", "1.5", "7", "99999999999999999999", "1e1", "0_1"])
def test_bad_position_of_a_finished_reply_is_refused(shared, position, by_header):
    message_id = shared.send("x", model="openai/say-2-0")[0].data["message_id"]
    with open_after(shared, message_id, position, by_header) as stream:
        error = status((stream.status, stream.body()), 400, "invalid_request")
    assert error["field"] in ("after", "Last-Event-ID")


def test_position_past_a_running_reply_is_refused(shared):
    with running(shared) as (start, _), open_after(shared, start["message_id"], 7) as stream:
        status((stream.status, stream.body()), 400, "invalid_request")


def test_many_clients_of_one_reply_get_the_same(shared):
    with running(shared, "openai/gate-200-2") as (start, events), ThreadPoolExecutor(20) as pool:
        streams = [open_after(shared, start["message_id"], 0) for _ in range(20)]
        shared.provider.open_gate()
        assert {text(one) for one in pool.map(shared.read, streams)} == {numbered(200)}
        assert numbered(2) + text(list(events)) == numbered(200)


def test_client_that_leaves_does_not_stop_the_reply(shared):
    with running(shared) as (start, _):
        pass
    shared.provider.open_gate()
    assert text(shared.attach(start["message_id"], 6)) == numbered(10, 2)
    assert get(shared, start["message_id"])["status"] == "complete" and shared.provider.closed == []


@pytest.mark.slow
def test_slow_reader_gets_everything_and_delays_nobody(shared):
    place, body = urlsplit(shared.edge), b'{"content": "x", "model": "demo/load-300000-0"}'
    with closing(socket.socket()) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(60)
        slow.connect((place.hostname, place.port))
        head = f"POST {SEND} HTTP/1.0\r\nHost: {place.netloc}\r\nAuthorization: Bearer {shared.key}\r\n"
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        [run] = eventually(lambda: status(shared.api("GET", "/api/v1/runs"), 200)["runs"])
        assert text(shared.attach(run["message_id"])) == numbered(300_000)  # while the other has read nothing
        answer = b"".join(iter(lambda: slow.recv(1 << 20), b"")).decode()
    data = [json.loads(line[6:]) for line in answer.split("\n") if line.startswith("data: ")]
    assert "".join(one.get("text", "") for one in data) == numbered(300_000)
    assert [one["type"] for one in data].count("done") == 1 and data[-1]["type"] == "done"


################ On disk


def test_acknowledged_message_is_on_disk_when_start_comes(shared):
    with shared.stream({"content": "keep me", "model": "openai/gate-2-0"}) as stream:
        start = next(iter(stream)).data
        sql = "select role, status from messages where thread_id = ? order by number"
        assert shared.sql("messages.db", sql, start["thread_id"]) == [("user", "complete"), ("assistant", "pending")]
        assert stored(shared, start["user_message_id"]) == [("text", one) for one in "keep me"]
        assert shared.sql("liminal.db", "select count(*) from threads where id = ?", start["thread_id"]) == [(1,)]
        shared.provider.open_gate()


def test_message_is_complete_on_disk_directly_after_done(shared):
    for _ in range(10):
        events = shared.send("x", model="openai/think-60-0")
        message_id, done = events[0].data["message_id"], events[-1].data
        rows = shared.sql("messages.db", "select status, position from messages where id = ?", message_id)
        assert rows == [("complete", done["position"])] and stored(shared, message_id) == flat(events)


def test_next_prompt_directly_after_done_has_the_reply(shared):
    thread_id = shared.send("one", model="openai/say-60-0")[0].data["thread_id"]
    for turn in range(1, 5):
        shared.send("more", model="openai/say-60-0", thread_id=thread_id)
        prompt = [message["content"] for message in shared.provider.requests[-1]["body"]["messages"]]
        assert prompt == ["one", numbered(60), *["more", numbered(60)] * (turn - 1), "more"]


@pytest.mark.parametrize("wire", ["openai", "anthropic"])
def test_every_token_of_50_concurrent_streams_comes_and_is_stored_once_in_order(shared, wire):
    with ThreadPoolExecutor(50) as pool:
        replies = list(pool.map(lambda n: shared.send(f"{n}", model=f"{wire}/think-{100 + n}-0"), range(50)))
    for n, events in enumerate(replies):
        half = len(numbered((100 + n) // 2))
        wanted = [("thinking" if i < half else "text", one) for i, one in enumerate(numbered(100 + n))]
        assert flat(events) == wanted and stored(shared, events[0].data["message_id"]) == wanted
        assert get(shared, events[0].data["message_id"])["position"] == len(wanted)


################ Cancel


def cancel(shared, message_id):
    return status(shared.api("POST", f"{SEND}/{message_id}/cancel"), 200)


def test_cancel_before_the_first_token_closes_upstream(shared):
    with shared.stream({"content": "x", "model": "openai/gate-5-0"}) as stream:
        events = iter(stream)
        message_id = next(events).data["message_id"]
        shared.provider.wait_gate()
        receipt = cancel(shared, message_id)
        shared.provider.wait_closed()
        assert [event.type for event in events] == ["done"]
    assert set(receipt) == {"message_id", "status", "position", "usage", "upstream_closed"}
    assert (receipt["message_id"], receipt["status"], receipt["position"]) == (message_id, "cancelled", 0)
    assert receipt["upstream_closed"] is True and get(shared, message_id)["content"] == ""


@pytest.mark.parametrize("wire", ["openai", "anthropic"])
def test_cancel_in_mid_stream_keeps_what_came(shared, wire):
    with running(shared, f"{wire}/gate-10-2") as (start, events):
        receipt = cancel(shared, start["message_id"])
        sql = "select status, position from messages where id = ?"
        assert shared.sql("messages.db", sql, start["message_id"]) == [("cancelled", 6)]
        assert [(event.type, event.data["status"]) for event in events] == [("done", "cancelled")]
    shared.provider.wait_closed()
    assert (receipt["status"], receipt["position"], receipt["usage"]["estimated"]) == ("cancelled", 6, True)
    message = get(shared, start["message_id"])
    assert (message["content"], message["status"], message["usage"]) == (" t0 t1", "cancelled", receipt["usage"])


def test_cancel_twice_gives_the_same_receipt(shared):
    with running(shared) as (start, _), ThreadPoolExecutor(4) as pool:
        receipts = list(pool.map(lambda _: cancel(shared, start["message_id"]), range(4)))
    assert receipts == [cancel(shared, start["message_id"][:12])] * 4


def test_cancel_after_the_end_changes_nothing(shared):
    message_id = shared.send("x", model="openai/say-3-0")[0].data["message_id"]
    before = timed(shared, message_id)
    receipt = cancel(shared, message_id)
    assert (receipt["status"], receipt["position"], receipt["usage"]) == ("complete", 9, before["usage"])
    assert get(shared, message_id) == before


def test_thread_is_free_directly_after_a_cancels_receipt(shared):
    with running(shared) as (start, _):
        cancel(shared, start["message_id"])
        assert text(shared.send("x", model="openai/say-1-0", thread_id=start["thread_id"])) == " t0"


def test_cancelled_text_stands_in_the_next_prompt(shared):
    with running(shared) as (start, _):
        cancel(shared, start["message_id"])
    shared.send("go on", model="openai/echo", thread_id=start["thread_id"])
    prompt = [message["content"] for message in shared.provider.requests[-1]["body"]["messages"]]
    assert prompt == ["x", " t0 t1", "go on"]


################ Repeats and the busy thread


def keyed(shared, key, content="x", model="openai/say-5-0", path=SEND, **fields):
    body = {"content": content, "model": model, **fields} if path == SEND else fields
    return shared.stream(body, path, headers={"Idempotency-Key": key})


def test_repeat_of_a_finished_request_gets_the_same_reply(shared):
    first, second = (shared.read(keyed(shared, "finished")) for _ in range(2))
    assert second[0].data == first[0].data and text(second) == text(first) == numbered(5)
    assert len(shared.provider.requests) == 1


def test_repeat_of_a_finished_request_changes_nothing_stored(shared):
    message_id = shared.read(keyed(shared, "unchanged"))[0].data["message_id"]
    before = timed(shared, message_id)
    repeated = shared.read(keyed(shared, "unchanged"))
    timed(shared, shared.send("x", model="openai/say-1-0")[0].data["message_id"])
    assert get(shared, message_id) == before and repeated[-1].data["timing"] == before["timing"]


def test_repeat_of_a_running_request_attaches(shared):
    with (
        keyed(shared, "running", model="openai/gate-5-2") as one,
        keyed(shared, "running", model="openai/gate-5-2") as two,
    ):
        shared.provider.wait_gate()
        shared.provider.open_gate()
        first, second = list(one), list(two)
    assert first[0].data == second[0].data and text(first) == text(second) == numbered(5)
    assert len(shared.provider.requests) == 1


def test_concurrent_repeats_make_one_reply(shared):
    barrier = Barrier(8)

    def post(_):
        barrier.wait()
        return shared.read(keyed(shared, "at-once"))

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(post, range(8)))
    assert len({events[0].data["message_id"] for events in replies}) == 1 == len(shared.provider.requests)
    assert {text(events) for events in replies} == {numbered(5)}
    thread = replies[0][0].data["thread_id"]
    assert len(status(shared.api("GET", f"/api/v1/threads/{thread}/messages"), 200)["messages"]) == 2


def test_same_key_with_another_body_is_a_conflict(shared):
    shared.read(keyed(shared, "taken"))
    with keyed(shared, "taken", content="other") as stream:
        error = status((stream.status, stream.body()), 409, "conflict")
    assert error["field"] == "Idempotency-Key"


def test_same_key_of_another_user_is_another_request(shared):
    shared.read(keyed(shared, "both"))
    user = status(shared.api("POST", "/api/v1/users", {"name": "with the same key"}), 201)
    secret = status(shared.api("POST", "/api/v1/keys", {"name": "k", "user_id": user["id"]}), 201)["secret"]
    body = {"content": "other", "model": "openai/say-5-0"}
    assert text(shared.read(shared.stream(body, headers={"Idempotency-Key": "both"}, key=secret))) == numbered(5)


def test_repeat_of_a_retry_gets_the_same_reply_and_another_body_a_conflict(shared):
    message_id = shared.send("x", model="openai/say-5-0")[0].data["message_id"]
    path = f"{SEND}/{message_id}/retry"
    first, second = (shared.read(keyed(shared, "retried", path=path)) for _ in range(2))
    assert first[0].data == second[0].data and first[0].data["message_id"] != message_id
    stream = shared.stream({"model": "openai/echo"}, path, headers={"Idempotency-Key": "retried"})
    status((stream.status, stream.body()), 409, "conflict")


def test_repeat_may_ask_for_another_form_of_the_same_reply(shared):
    message_id = shared.read(keyed(shared, "forms"))[0].data["message_id"]
    body = {"content": "x", "model": "openai/say-5-0", "stream": False}
    assert status(shared.api("POST", SEND, body, headers={"Idempotency-Key": "forms"}), 200)["id"] == message_id


def test_busy_thread_names_its_running_reply(shared):
    with running(shared) as (start, _):
        body = {"content": "x", "model": "openai/echo", "thread_id": start["thread_id"]}
        for path, said in ((SEND, body), (f"{SEND}/{start['message_id']}/retry", {})):
            error = status(shared.api("POST", path, said), 409, "thread_busy")
            assert error["message_ids"] == [start["message_id"]] and error["retriable"] is True
        shared.provider.open_gate()


def test_key_is_looked_up_before_the_busy_thread(shared):
    thread_id = status(shared.api("POST", "/api/v1/threads", {}), 201)["id"]
    fields = {"model": "openai/gate-5-2", "thread_id": thread_id}
    with keyed(shared, "busy", **fields) as one, keyed(shared, "busy", **fields) as two:
        assert (one.status, two.status) == (200, 200)
        shared.provider.open_gate()
        assert text(list(one)) == text(list(two)) == numbered(5)


def test_thread_is_free_directly_after_done(shared):
    thread_id = shared.send("x", model="openai/say-1-0")[0].data["thread_id"]
    for _ in range(20):
        assert shared.send("x", model="openai/say-1-0", thread_id=thread_id)[-1].data["status"] == "complete"


################ The end of a server


@pytest.mark.core
def test_edge_killed_in_mid_reply_resumes_from_any_position(make_liminal):
    liminal = make_liminal().start()
    with running(liminal, "openai/gate-200-100", position=len(numbered(100))) as (start, events):
        liminal.kill("edge")
        with pytest.raises(httpx2.HTTPError):
            list(events)
    liminal.start("edge")
    late = open_after(liminal, start["message_id"], 50)
    liminal.provider.open_gate()
    assert text(liminal.read(late)) == numbered(200)[50:]
    assert get(liminal, start["message_id"])["status"] == "complete" and len(liminal.provider.requests) == 1
    assert stored(liminal, start["message_id"]) == [("text", one) for one in numbered(200)]


def test_reply_completes_while_there_is_no_edge(make_liminal):
    liminal = make_liminal().start()
    with running(liminal, "openai/gate-200-100", position=len(numbered(100))) as (start, _):
        liminal.kill("edge")
    liminal.provider.open_gate()
    sql = "select 1 from messages where id = ? and status = 'complete'"
    eventually(lambda: liminal.sql("messages.db", sql, start["message_id"]))
    liminal.start("edge")
    assert text(liminal.attach(start["message_id"], 7)) == numbered(200)[7:]


def test_edge_stopped_in_mid_stream_ends_it_without_done_and_the_reply_goes_on(make_liminal):
    liminal = make_liminal().start()
    with running(liminal) as (start, events):
        assert liminal.stop("edge", timeout=10) == 0
        assert "done" not in [event.type for event in events]
    liminal.start("edge")
    liminal.provider.open_gate()
    assert text(liminal.attach(start["message_id"], 6)) == numbered(10, 2)


def test_domain_stopped_in_mid_reply_ends_it_as_interrupted(make_liminal):
    liminal = make_liminal().start()
    with running(liminal) as (start, events):
        assert liminal.stop("domain", timeout=10) == 0
        [done] = [event.data for event in events]
    assert (done["status"], done["position"]) == ("error", 6)
    assert (done["error"]["code"], done["error"]["retriable"]) == ("interrupted", True)
    liminal.start("domain")
    message = get(liminal, start["message_id"])
    assert (message["content"], message["status"], message["error"]) == (" t0 t1", "error", done["error"])


@pytest.mark.core
def test_domain_killed_in_mid_reply_keeps_what_reached_the_edge(make_liminal):
    liminal = make_liminal().start()
    with running(liminal, "openai/gate-200-100", position=len(numbered(100))) as (start, events):
        liminal.kill("domain")
        liminal.start("domain")
        done = [event.data for event in events if event.type == "done"]
    assert [(one["status"], one["error"]["code"]) for one in done] == [("error", "interrupted")]
    sql = "select count(*) from messages where status in ('pending', 'streaming')"
    assert liminal.sql("messages.db", sql) == [(0,)]
    eventually(lambda: get(liminal, start["message_id"])["content"] == numbered(100))
    message = get(liminal, start["message_id"])
    assert (message["status"], message["error"]["code"], message["position"]) == ("error", "interrupted", 390)


def test_position_past_an_interrupted_reply_gives_start_and_done(make_liminal):
    liminal = make_liminal().start()
    with running(liminal) as (start, _):
        liminal.kill("domain")
    liminal.start("domain")
    assert [event.type for event in liminal.attach(start["message_id"], 1000)] == ["start", "done"]


def test_retry_after_an_interruption_completes(make_liminal):
    liminal = make_liminal().start()
    with running(liminal) as (start, _):
        liminal.restart("domain", sig=signal.SIGKILL)
    liminal.provider.open_gate()
    events = liminal.read(liminal.stream({}, f"{SEND}/{start['message_id']}/retry"))
    assert text(events) == numbered(10) and events[-1].data["status"] == "complete"


################ Events that break the contract

START = {
    "type": "start",
    "message_id": "11111111-1111-4111-8111-111111111111",
    "thread_id": "22222222-2222-4222-8222-222222222222",
    "user_message_id": "33333333-3333-4333-8333-333333333333",
    "speaker": None,
    "model": "demo/guide",
    "position": 0,
}


@contextmanager
def fake_domain(*pieces):
    """(address, turn) of a real server that answers as a Domain would. It writes a reply's stream in these pieces, each
    one of events; for each piece after the first it waits for a `turn.wait()`."""
    owner = {"id": "44444444-4444-4444-8444-444444444444", "name": "owner", "role": "owner"}
    answers = {
        "/domain/callers": {"user": owner, "key_id": "55555555-5555-4555-8555-555555555555"},
        "/domain/runs": {"runs": []},
        "/domain/bundles": {"messages": {START["message_id"]: "gone"}},
    }
    turn = Barrier(2, timeout=20)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.end_headers()
            if self.path in answers:
                return self.wfile.write(json.dumps(answers[self.path]).encode())
            for number, events in enumerate(pieces):
                if number:
                    turn.wait()
                self.wfile.write(b"".join(json.dumps(event).encode() + b"\n" for event in events))

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", turn
        server.shutdown()


WRONG = {
    "unknown type": {"type": "sound", "text": "x"},
    "unknown field": {"type": "text", "text": "x", "more": 1},
    "empty text": {"type": "text", "text": ""},
    "missing field": {"type": "tool_call", "name": "x", "arguments": {}},
    "done without a status": {"type": "done", "position": 0},
}


@pytest.fixture
def fed(make_liminal):
    """fed(pieces): (the answer or the last event, the Edge's log) of a message whose Domain sends these."""

    def feed(*pieces):
        with fake_domain(*pieces) as (url, turn):
            liminal = make_liminal(LIMINAL_DOMAIN_URL=url).start("edge")
            with liminal.stream({"content": "x"}, key="lt_sk_any") as stream:
                found = stream.body() if stream.status != 200 else None
                for found in stream if stream.status == 200 else ():
                    if found.type == "start" and len(pieces) > 1:
                        turn.wait()
            liminal.stop("edge")
        return found, liminal.log("edge")

    return feed


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_event_in_mid_stream_ends_it_with_an_internal_error(fed, wrong):
    done, log = fed([START], [WRONG[wrong]])
    assert (done.type, done.data["status"], done.data["error"]["code"]) == ("done", "error", "internal")
    assert "contract" in done.data["error"]["message"] and "contract" in log


def test_wrong_event_before_the_stream_is_a_500(fed):
    body, _ = fed([START, WRONG["unknown type"]])
    assert "contract" in status((500, body), 500, "internal")["message"]


def test_wrong_event_before_the_stream_is_in_the_log(fed):
    _, log = fed([START, WRONG["unknown type"]])
    assert "contract" in log


def test_right_events_pass(fed):
    done = {"type": "done", "status": "complete", "position": 2, "usage": None, "timing": None, "error": None}
    event, _ = fed([START], [{"type": "text", "text": "ok"}, {**done, "stop_reason": None}])
    assert event.data == {**done, "stop_reason": None}
