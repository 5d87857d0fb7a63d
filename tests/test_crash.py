"""Kill -9, SIGSTOP and restarts at chosen tokens of replies, held against what the design promises exactly.

Where a reply stands is given by the provider's gate, so that each death comes at a known token. tests/faults.py does
the same at random.
"""

import signal
import sqlite3
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest
from conftest import Liminal, status, text, with_provider
from prometheus_client.parser import text_string_to_metric_families

from provider import Provider

SEND = "/api/v1/messages"
GATES = (
    0,
    1,
    30,
    120,
)  # tokens that have come when a server dies: none, the one that leaves at once, some, some bundles
WIRES = ("anthropic", "openai", "anthropic", "openai")


def numbered(n, start=0):
    return "".join(f" t{i}" for i in range(start, n))


def eventually(look, seconds=30):
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
    return found


def get(liminal, message_id) -> dict:
    return status(liminal.api("GET", f"{SEND}/{message_id}"), 200)


def unfinished(liminal) -> int:
    return liminal.sql("messages.db", "select count(*) from messages where status in ('pending', 'streaming')")[0][0]


def position_of(liminal, message_id) -> int:
    return liminal.sql("messages.db", "select position from messages where id = ?", message_id)[0][0]


def metric(liminal, name, **labels) -> float:
    found = text_string_to_metric_families(liminal.client.get("/metrics").text)
    rows = [one for family in found for one in family.samples if one.name == name]
    return sum(one.value for one in rows if labels.items() <= one.labels.items())


def kill(liminal, *names):
    for name in names:
        liminal.kill(name)


class At:
    """Replies of 200 tokens at their gates, their clients having seen everything: {tokens: (start, events)}."""

    def __init__(self, liminal, gates=GATES):
        self.liminal, self.open, self.replies = liminal, ExitStack(), {}
        for k, wire in zip(gates, WIRES):
            stream = liminal.stream({"content": f"to {k}", "model": f"{wire}/gate-200-{k}"})
            events = iter(self.open.enter_context(stream))
            start, seen = next(events).data, ""
            while len(seen) < len(numbered(k)):
                seen += text([next(events)])
            self.replies[k] = start, events
        liminal.provider.wait_gate(len(gates))

    def ids(self):
        return {k: start["message_id"] for k, (start, _) in self.replies.items()}

    def wait_stored(self):
        for k, message_id in self.ids().items():
            eventually(lambda: position_of(self.liminal, message_id) == len(numbered(k)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open.close()


################ The Domain is killed


@pytest.mark.slow
def test_domain_killed_ends_each_reply_as_interrupted_with_all_that_its_client_saw(make_liminal):
    liminal = make_liminal().start()
    with At(liminal) as at:
        kill(liminal, "domain")
        liminal.start("domain")
        for k, (start, events) in at.replies.items():
            [done] = [event.data for event in events]
            error, message = done["error"], get(liminal, start["message_id"])
            assert (done["status"], error["code"], error["retriable"]) == ("error", "interrupted", True)
            assert done["position"] == message["position"] == len(numbered(k)) and message["content"] == numbered(k)
            assert (message["status"], message["error"]) == ("error", error)
    assert unfinished(liminal) == 0


@pytest.mark.slow
def test_retry_after_the_domain_was_killed_makes_a_whole_reply_from_the_same_prompt(make_liminal):
    liminal = make_liminal().start()
    with At(liminal, [30]) as at:
        liminal.restart("domain", sig=signal.SIGKILL)
        start, _ = at.replies[30]
    liminal.provider.open_gate()
    events = liminal.read(liminal.stream({}, f"{SEND}/{start['message_id']}/retry"))
    assert text(events) == numbered(200) and events[0].data["user_message_id"] == start["user_message_id"]
    one, other = [request["body"]["messages"] for request in liminal.provider.requests]
    assert one == other and get(liminal, start["message_id"])["content"] == numbered(30)


@pytest.mark.slow
def test_thread_is_free_after_the_domain_was_killed(make_liminal):
    liminal = make_liminal().start()
    with At(liminal, [1]) as at:
        liminal.restart("domain", sig=signal.SIGKILL)
        events = liminal.send("again", model="openai/say-5-0", thread_id=at.replies[1][0]["thread_id"])
    assert text(events) == numbered(5)


################ The Edge is killed


@pytest.mark.slow
def test_edge_killed_loses_and_repeats_nothing(make_liminal):
    liminal = make_liminal().start()
    with At(liminal) as at:
        kill(liminal, "edge")
        liminal.provider.open_gate()
        liminal.start("edge")
        for k, message_id in at.ids().items():
            assert text(liminal.attach(message_id, len(numbered(k)) or None)) == numbered(200, k)
            message = get(liminal, message_id)
            assert (message["status"], message["content"]) == ("complete", numbered(200))
    assert len(liminal.provider.requests) == len(GATES)


@pytest.mark.slow
def test_restarted_edge_follows_running_replies_without_a_client(make_liminal):
    liminal = make_liminal().start()
    with At(liminal) as at:
        kill(liminal, "edge")
    liminal.start("edge")
    eventually(lambda: metric(liminal, "liminal_replies") == len(GATES))
    liminal.provider.open_gate()
    eventually(lambda: metric(liminal, "liminal_bundles_total", consumer="database") >= len(GATES))
    eventually(lambda: all(get(liminal, one)["status"] == "complete" for one in at.ids().values()))


@pytest.mark.slow
def test_domain_stores_by_itself_what_a_dead_edge_does_not_bring_even_if_it_is_killed_then(make_liminal):
    liminal = make_liminal().start()
    body = {"content": "x", "model": "openai/say-1800-120", "background": True}
    [message_id] = status(liminal.api("POST", SEND, body), 202)["message_ids"]
    kill(liminal, "edge")
    eventually(lambda: position_of(liminal, message_id) >= len(numbered(1300)), 60)
    sql = "select status from messages where id = ?"
    assert liminal.sql("messages.db", sql, message_id) == [("streaming",)]
    kill(liminal, "domain")
    liminal.start()
    message = get(liminal, message_id)
    assert (message["status"], message["error"]["code"]) == ("error", "interrupted")
    assert numbered(1800).startswith(message["content"]) and message["position"] >= len(numbered(1300))


################ Both are killed


@pytest.mark.slow
@pytest.mark.parametrize("first", ["domain", "edge"])
def test_both_killed_lose_nothing_that_was_stored(make_liminal, first):
    liminal = make_liminal().start()
    with At(liminal) as at:
        at.wait_stored()
        kill(liminal, first, "edge" if first == "domain" else "domain")
    liminal.start()
    for k, message_id in at.ids().items():
        message = get(liminal, message_id)
        assert (message["content"], message["error"]["code"]) == (numbered(k), "interrupted")
    assert unfinished(liminal) == 0


@pytest.mark.slow
def test_both_killed_at_once_keep_every_acknowledged_message_and_a_prefix_of_its_reply(make_liminal):
    liminal = make_liminal().start()
    with At(liminal) as at:
        kill(liminal, "domain", "edge")
    liminal.start()
    for k, (start, _) in at.replies.items():
        assert get(liminal, start["user_message_id"])["content"] == f"to {k}"
        message = get(liminal, start["message_id"])
        assert numbered(k).startswith(message["content"]) and message["error"]["code"] == "interrupted"
        events = liminal.attach(start["message_id"], len(numbered(k)))
        assert [one.type for one in events] == ["start", "done"]
        assert events[-1].data["position"] == message["position"]


@pytest.mark.slow
def test_repeated_post_attaches_to_the_same_reply_after_both_were_killed(make_liminal):
    liminal, body = make_liminal().start(), {"content": "once", "model": "openai/gate-9-3"}
    headers = {"idempotency-key": str(uuid.uuid4())}
    with liminal.stream(body, headers=headers) as stream:
        start = next(iter(stream)).data
        eventually(lambda: position_of(liminal, start["message_id"]) == 9)
        kill(liminal, "edge", "domain")
    liminal.start()
    again = liminal.read(liminal.stream(body, headers=headers))
    assert (again[0].data["message_id"], again[0].data["thread_id"]) == (start["message_id"], start["thread_id"])
    assert (text(again), again[-1].data["error"]["code"]) == (numbered(3), "interrupted")
    status(liminal.api("POST", SEND, {**body, "content": "other"}, headers=headers), 409, "conflict")
    assert liminal.sql("messages.db", "select count(*) from messages") == [(2,)]


@pytest.mark.slow
def test_messages_of_no_thread_are_swept_at_start(make_liminal):
    liminal = make_liminal().start()
    lost, kept = [liminal.send("x", model="openai/say-5-0")[0].data["thread_id"] for _ in range(2)]
    liminal.stop("domain")
    with closing(sqlite3.connect(liminal.data / "liminal.db")) as db:
        db.execute("delete from threads where id = ?", [lost])
        db.commit()
    liminal.start("domain")
    eventually(lambda: liminal.sql("messages.db", "select distinct thread_id from messages") == [(kept,)])
    for table, left in [("messages", 2), ("chunks", 2), ("idempotency_keys", 1), ("message_texts", 2)]:
        assert liminal.sql("messages.db", f"select count(*) from {table}") == [(left,)], table


################ Stopped processes


def pause(liminal, name, seconds):
    """SIGSTOP, and so much later SIGCONT."""
    process = liminal.servers[name].process
    process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_provider_that_kept_sending_is_not_silent_because_the_domain_was_stopped(make_liminal):
    liminal = make_liminal(LIMINAL_PROVIDER_TIMEOUTS="3,3").start()
    models = [f"{wire}/gate-200-{k}" for wire in ("anthropic", "openai") for k in (0, 20)]
    with ExitStack() as opened, ThreadPoolExecutor() as pool:
        streams = [opened.enter_context(liminal.stream({"content": "x", "model": model})) for model in models]
        liminal.provider.wait_gate(len(models))
        paused = pool.submit(pause, liminal, "domain", 5)
        eventually(lambda: state(liminal, "domain") == "T")
        liminal.provider.open_gate()
        for events in map(liminal.read, streams):
            assert text(events) == numbered(200) and events[-1].data["status"] == "complete"
        paused.result()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["domain", "edge"])
def test_stream_goes_on_after_a_server_was_stopped_for_seconds(make_liminal, name):
    liminal = make_liminal().start()
    with liminal.stream({"content": "x", "model": "openai/say-400-100"}) as stream, ThreadPoolExecutor() as pool:
        pool.submit(pause, liminal, name, 3)
        events = liminal.read(stream)
    assert text(events) == numbered(400) and events[-1].data["status"] == "complete"
    assert get(liminal, events[0].data["message_id"])["content"] == numbered(400)


@pytest.fixture(scope="module")
def minute(tmp_path_factory):
    """{what: its events, or the error} of streams over a Domain, and over an Edge, that was stopped for 62 s."""
    found = {}
    with ExitStack() as made, ThreadPoolExecutor() as pool:
        provider = made.enter_context(closing(Provider()))
        for name in ("domain", "edge"):
            data = tmp_path_factory.mktemp("minute") / name
            liminal = made.enter_context(closing(Liminal(data, provider, **with_provider(provider, {}))))
            liminal.start().client.timeout = 120
            body = {"content": "x", "model": "openai/say-3200-50"}
            stream = liminal.stream(body)
            found[name] = pool.submit(liminal.read, stream)
            found[f"{name} paused"] = pool.submit(pause, liminal, name, 62)
            eventually(lambda: "T" in state(liminal, name))
            found[f"{name} sent"] = pool.submit(lambda: liminal.send("late", model="openai/say-5-0"))
        yield {name: outcome(future) for name, future in found.items()}


def state(liminal, name) -> str:
    """The process's state: T while it is stopped."""
    with open(f"/proc/{liminal.servers[name].process.pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def outcome(future):
    try:
        return future.result(150)
    except Exception as error:
        return error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["domain", "edge"])
def test_stream_goes_on_after_a_server_was_stopped_for_a_minute(minute, name):
    assert isinstance(minute[name], list), minute[name]
    assert text(minute[name]) == numbered(3200) and minute[name][-1].data["status"] == "complete"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["domain", "edge"])
def test_message_sent_to_a_server_that_is_stopped_for_a_minute_is_answered_then(minute, name):
    assert isinstance(minute[f"{name} sent"], list), minute[f"{name} sent"]
    assert text(minute[f"{name} sent"]) == numbered(5)
