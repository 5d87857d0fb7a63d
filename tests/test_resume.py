"""Resume as any other client sees it: SSE decoders that are not ours, connections that drop after every event, servers
that end in between, a network that fails between them, replies of a million tokens, readers that do not read."""

import json
import shutil
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from urllib.parse import urlsplit

import pytest

from conftest import Event, Liminal, status, text, with_provider
from provider import GATE, Provider, openai_stream
from test_streams import SEND, eventually, get, numbered, running, stored, timed

SAID = [
    ("thinking", "Hm 🤔e\u0301"),
    ("thinking", " 漢"),
    "né 👨‍👩‍👧",
    " 漢字𝒳",
    "🏳️‍🌈\n\0",
    ("tool", "liminal__file_list", {}),
]
THEN = [" नमस्ते", "👍🏽", "\u0301", " end"]
TOOL = [("tool_call", "liminal__file_list"), ("tool_result", "liminal__file_list")]
WHOLE = [
    (kind, one)
    for kind, said in [("thinking", "Hm 🤔e\u0301 漢"), ("text", "né 👨‍👩‍👧 漢字𝒳🏳️‍🌈\n\0")]
    for one in said
]
WHOLE += TOOL + [("text", one) for one in "".join(THEN)]
LARGEST = 100_000  # bytes of one event's data, about


def mixed(provider, pause=0.0, end=()):
    """Let the next reply think, speak, call a tool and speak again, with a pause before each token."""
    provider.script(*openai_stream(*[step for part in SAID for step in (pause, part)]))
    provider.script(*openai_stream(*[step for part in THEN for step in (pause, part)], *end))


def positions(events) -> list[tuple]:
    """What each position holds: (type, code point), or (type, name of the tool)."""
    held = {"tool_call": lambda data: [data["name"]], "tool_result": lambda data: [data["name"]]}
    held |= dict.fromkeys(("text", "thinking"), lambda data: data["text"])
    return [(event.type, one) for event in events if event.type in held for one in held[event.type](event.data)]


def begin(liminal, model="openai/scripted", **fields) -> str:
    """The message id of a reply that runs in the background."""
    body = {"content": "x", "model": model, "background": True, **fields}
    return status(liminal.api("POST", SEND, body), 202)["message_ids"][0]


def reconnected(liminal, message_id, place):
    """A new connection that sends the id it saw last; none at first."""
    headers = {} if place is None else {"last-event-id": place}
    return liminal.stream(None, f"{SEND}/{message_id}/stream", "GET", headers)


def dropped(liminal, message_id, between=lambda n: None) -> list:
    """A reply's events as a client has them whose connection is dropped after each one."""
    events = []
    while not events or events[-1].type != "done":
        place = events[-1].id if events else None
        with reconnected(liminal, message_id, place) as stream:
            start, event = (one for _, one in zip(range(2), stream))
        assert start.type == "start" and start.data["position"] == int(place or 0)
        events.append(event)
        between(len(events))
    return events


################ Dropped after every event


def test_a_client_dropped_after_every_event_of_a_running_reply_gets_each_position_once(shared):
    mixed(shared.provider, pause=0.02)
    events = dropped(shared, begin(shared))
    assert positions(events) == WHOLE and events[-1].data["status"] == "complete" and len(events) > 5


def test_a_client_dropped_after_every_event_of_a_finished_reply_gets_each_position_once(shared):
    mixed(shared.provider)
    message_id = shared.send("x", model="openai/scripted")[0].data["message_id"]
    events = dropped(shared, message_id)
    assert positions(events) == WHOLE and events[-1].data["position"] == len(WHOLE)


@pytest.mark.slow
def test_a_client_dropped_after_every_event_has_what_is_stored(shared):
    message_id = begin(shared, "openai/think-300-150")
    events, message = dropped(shared, message_id), get(shared, message_id)
    assert [(part["type"], one) for part in message["parts"] for one in part["text"]] == positions(events)
    assert stored(shared, message_id) == positions(events) and text(events) == numbered(300, 150)


@pytest.mark.slow
def test_a_client_dropped_after_every_event_outlives_restarts_of_the_edge(make_liminal):
    liminal = make_liminal().start()
    message_id = begin(liminal, "openai/say-200-60")
    events = dropped(liminal, message_id, lambda n: n % 10 or liminal.restart("edge"))
    assert text(events) == numbered(200) and events[-1].data["status"] == "complete"


@pytest.mark.slow
@pytest.mark.parametrize("names, step", [(["edge"], 7), (["domain"], 5), (["edge", "domain"], 1)])
def test_after_a_restart_every_position_of_a_reply_resumes_exactly(make_liminal, names, step):
    liminal = make_liminal().start()
    mixed(liminal.provider)
    message_id = liminal.send("x", model="openai/scripted")[0].data["message_id"]
    liminal.restart(*names)
    for position in range(0, len(WHOLE) + 1, step):
        events = liminal.attach(message_id, position)
        assert positions(events) == WHOLE[position:] and events[-1].data["position"] == len(WHOLE)
    assert positions(dropped(liminal, message_id)) == WHOLE


NODE = """
import { EventSource } from "eventsource"
const [url, key] = process.argv.slice(2), seen = []
let connections = 0
async function cut(data, controller) {  // end after one event with an id; come back at once
  if (this.over) return
  this.text = (this.text ?? "") + new TextDecoder().decode(data)
  const ends = [...this.text.matchAll(/\\nid: .*\\ndata: .*\\n\\n/g)]
  if (!ends.length) return
  const first = this.text.slice(0, ends[0].index + ends[0][0].length).replace("retry: 2000", "retry: 5")
  controller.enqueue(new TextEncoder().encode(first))
  controller.terminate()
  this.over = true
}
const once = async (url, init) => {
  connections++
  const headers = { ...init.headers, Authorization: `Bearer ${key}` }
  const answer = await fetch(url, { ...init, headers })
  const body = answer.body.pipeThrough(new TransformStream({ transform: cut }))
  return { body, url: answer.url, status: answer.status, redirected: answer.redirected, headers: answer.headers }
}
const source = new EventSource(url, { fetch: once })
for (const type of ["thinking", "text", "tool_call", "tool_result", "done"])
  source.addEventListener(type, (event) => {
    seen.push([type, JSON.parse(event.data)])
    if (type == "done") { source.close(); console.log(JSON.stringify({ connections, seen })); process.exit(0) }
  })
"""


@pytest.fixture(scope="session")
def eventsource(tmp_path_factory):
    """A folder with npm's eventsource and a script that has its connection cut after each event."""
    folder = tmp_path_factory.mktemp("node")
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("there is no Node here")
    run = ["npm", "install", "--no-audit", "--no-fund", "eventsource"]
    if subprocess.run(run, cwd=folder, capture_output=True, timeout=120).returncode:
        pytest.skip("npm cannot install eventsource: its registry cannot be reached")
    (folder / "client.mjs").write_text(NODE)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True], ids=["running", "finished"])
def test_npms_eventsource_dropped_after_every_event_gets_each_position_once(shared, eventsource, finished):
    mixed(shared.provider, pause=0 if finished else 0.05)
    message_id = begin(shared)
    finished and shared.attach(message_id)
    command = ["node", "client.mjs", f"{shared.edge}{SEND}/{message_id}/stream", shared.key]
    run = subprocess.run(command, cwd=eventsource, capture_output=True, text=True, timeout=60)
    found = json.loads(run.stdout or "null")
    events = [Event(one[0], None, one[1]) for one in found["seen"]]
    assert positions(events) == WHOLE and found["connections"] >= len(events) - 1, run.stderr


################ Where a client comes in


def test_a_client_that_comes_late_gets_everything_and_then_what_is_new(shared):
    with running(shared, "openai/gate-400-300", len(numbered(300))) as (start, _):
        with reconnected(shared, start["message_id"], None) as late:
            shared.provider.open_gate()
            assert text(shared.read(late)) == numbered(400)


def test_a_client_at_the_end_of_a_running_reply_gets_only_what_is_new(shared):
    with running(shared) as (start, _), reconnected(shared, start["message_id"], "6") as late:
        shared.provider.open_gate()
        events = shared.read(late)
    assert (events[0].data["position"], text(events)) == (6, numbered(10, 2))


def test_a_client_at_the_end_of_a_finished_reply_gets_start_and_done(shared):
    done = shared.send("x", model="openai/say-5-0")
    message = timed(shared, done[0].data["message_id"])
    ended = {name: message[name] for name in ("status", "position", "stop_reason", "usage", "timing", "error")}
    events = shared.attach(message["id"], message["position"])
    assert [event.type for event in events] == ["start", "done"] and events[-1].data == {"type": "done", **ended}


def test_the_header_goes_before_the_query_while_a_reply_runs(shared):
    with running(shared) as (start, _):
        path, header = f"{SEND}/{start['message_id']}/stream?after=0", {"last-event-id": "3"}
        with shared.stream(None, path, "GET", header) as stream:
            shared.provider.open_gate()
            assert text(shared.read(stream)) == numbered(10, 1)


################ Size: bounded pieces, bounded memory, readers that do not read


def largest(events) -> int:
    return max(len(json.dumps(event.data, ensure_ascii=False).encode()) for event in events)


def test_a_replay_comes_in_bounded_pieces(shared):
    message_id = shared.send("x", model="demo/load-20000-0")[0].data["message_id"]
    events = shared.attach(message_id)
    assert text(events) == numbered(20_000) and largest(events) <= LARGEST


@pytest.mark.slow
@pytest.mark.parametrize("end", [(), (GATE,)], ids=["finished", "running"])
@pytest.mark.parametrize("letter", ["x", "漢", "😀"])
def test_large_tokens_are_replayed_in_bounded_pieces(shared, letter, end):
    shared.provider.script(*openai_stream(*[letter * 3000] * 700, *end, "."))
    message_id = begin(shared)
    come = {"position": 2_100_000} if end else {"status": "complete"}
    eventually(lambda: come.items() <= {name: get(shared, message_id)[name] for name in come}.items())
    with reconnected(shared, message_id, None) as stream:
        shared.provider.open_gate()
        events = shared.read(stream)
    assert text(events) == letter * 2_100_000 + "." and largest(events) <= LARGEST


@pytest.mark.slow
def test_one_huge_token_is_replayed_in_bounded_pieces(shared):
    shared.provider.script(*openai_stream("😀" * 300_000))
    message_id = begin(shared)
    eventually(lambda: get(shared, message_id)["status"] == "complete")
    events = shared.attach(message_id)
    assert text(events) == "😀" * 300_000 and largest(events) <= LARGEST


@pytest.mark.slow
def test_a_long_reply_is_replayed_in_bounded_pieces(shared):
    message_id = begin(shared, "demo/load-200000-0")
    for _ in ("while it runs", "from disk"):
        events = shared.attach(message_id)
        assert text(events) == numbered(200_000) and largest(events) <= LARGEST


def rss(liminal, name) -> float:
    """MiB of memory that a server's process holds."""
    with open(f"/proc/{liminal.servers[name].process.pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def peak_of(liminal, *args) -> tuple[dict, dict]:
    """MiB of memory by server: (most while a stream is read, once all of it is stored)."""
    with ThreadPoolExecutor(1) as pool, liminal.stream(*args) as stream:
        reading = pool.submit(lambda: sum(len(piece) for piece in stream.response.iter_bytes()))
        peak = dict.fromkeys(liminal.servers, 0.0)
        while not reading.done():
            peak = {name: max(most, rss(liminal, name)) for name, most in peak.items()}
            with suppress(TimeoutError):
                reading.result(0.05)
    assert reading.result() > 7_000_000
    eventually(lambda: not status(liminal.api("GET", "/api/v1/overflow"), 200)["waiting"])
    return peak, {name: rss(liminal, name) for name in liminal.servers}


@pytest.mark.slow
def test_a_reply_of_a_million_tokens_leaves_memory_bounded(make_liminal):
    liminal, body = make_liminal(LIMINAL_CHECK_EVENTS=None).start(), {"content": "x", "model": "demo/load-1000000-0"}
    liminal.send("x", model="demo/load-1000-0")
    begun = {name: rss(liminal, name) for name in liminal.servers}
    peak, first = peak_of(liminal, body)
    again, second = peak_of(liminal, body)
    [(message_id,), _] = liminal.sql("messages.db", "select id from messages where position > 1000000")
    replay, _ = peak_of(liminal, None, f"{SEND}/{message_id}/stream", "GET")
    most = {name: max(peak[name], again[name], replay[name]) - begun[name] for name in begun}
    assert all(second[name] - first[name] < 25 for name in begun), (first, second)
    assert max(most.values()) < 90, (begun, peak, again, replay)


def ask_raw(liminal, path) -> socket.socket:
    """A connection that has asked for a stream, and reads nothing yet."""
    place, reader = urlsplit(liminal.edge), socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.settimeout(60)
    reader.connect((place.hostname, place.port))
    reader.sendall(
        f"GET {path} HTTP/1.0\r\nHost: {place.netloc}\r\nAuthorization: Bearer {liminal.key}\r\n\r\n".encode()
    )
    return reader


@pytest.mark.slow
def test_of_20_clients_one_that_does_not_read_delays_nobody(shared):
    message_id = begin(shared, "demo/load-150000-0")
    path = f"{SEND}/{message_id}/stream"
    with closing(ask_raw(shared, path)) as deaf, ThreadPoolExecutor(19) as pool:
        found = list(pool.map(lambda _: text(shared.attach(message_id)), range(19)))
        answer = b"".join(iter(lambda: deaf.recv(1 << 20), b"")).decode()
    data = [json.loads(line[6:]) for line in answer.split("\n") if line.startswith("data: ")]
    assert set(found) == {numbered(150_000)} and data[-1]["type"] == "done"
    assert "".join(one.get("text", "") for one in data) == numbered(150_000)


################ The network between the servers


class Proxy:
    """A TCP proxy. `cut` drops what is connected; `shut` refuses connections until `open`. `lose(request, n)`: the next n
    connections whose request begins so are dropped once an answer has come, which is not passed on. `chop`: each
    connection is dropped after so many bytes of answers."""

    def __init__(self, url: str):
        self.target = urlsplit(url)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        self.pairs, self.refusing, self.wanted, self.losses, self.lost, self.chop = [], False, b"", 0, 0, None
        self.lock = threading.Lock()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with suppress(OSError):
            while True:
                client, _ = self.server.accept()
                threading.Thread(target=self.join, args=(client,), daemon=True).start()

    def join(self, client):
        with suppress(OSError), client, socket.create_connection((self.target.hostname, self.target.port)) as server:
            if self.refusing:
                return
            pair, asked = (client, server), []
            self.pairs.append(pair)
            back = threading.Thread(target=self.answer, args=(pair, asked), daemon=True)
            back.start()
            with suppress(OSError):
                while data := client.recv(65536):
                    asked[:] = [data]
                    server.sendall(data)
            self.end(pair)
            back.join()

    def answer(self, pair, asked):
        passed = 0
        with suppress(OSError):
            while (data := pair[1].recv(65536)) and not self.loses(asked):
                chop = self.chop and self.chop - passed
                pair[0].sendall(data[:chop])
                passed += len(data)
                if chop is not None and len(data) >= chop:
                    break
        self.end(pair)

    def loses(self, asked) -> bool:
        with self.lock:
            if self.losses and asked and asked[0].startswith(self.wanted):
                self.losses, self.lost = self.losses - 1, self.lost + 1
                return True
        return False

    def end(self, pair):
        for one in pair:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def lose(self, wanted: str, n: int):
        self.wanted, self.losses, self.lost = wanted.encode(), n, 0

    def cut(self):
        pairs, self.pairs = self.pairs, []
        for pair in pairs:
            self.end(pair)

    def shut(self):
        self.refusing = True
        self.cut()

    def open(self):
        self.refusing, self.losses, self.chop = False, 0, None

    def close(self):
        self.server.close()
        self.cut()


@pytest.fixture(scope="module")
def proxied_liminal(tmp_path_factory):
    with ExitStack() as made:
        provider = made.enter_context(closing(Provider()))
        liminal = Liminal(tmp_path_factory.mktemp("proxied") / "data", provider, **with_provider(provider, {}))
        liminal.proxy = made.enter_context(closing(Proxy(liminal.domain)))
        made.enter_context(closing(liminal))
        liminal.env["LIMINAL_DOMAIN_URL"] = liminal.proxy.url
        yield liminal.start()


@pytest.fixture
def proxied(proxied_liminal):
    """An installation whose Edge reaches the Domain through `proxied.proxy`."""
    proxied_liminal.provider.reset()
    proxied_liminal.proxy.open()
    yield proxied_liminal
    proxied_liminal.check_logs()


def only_exchange(liminal, start, content="x"):
    """The reply, after checking that its thread holds it and one message of the user, and the provider was asked once."""
    path = f"/api/v1/threads/{start['thread_id']}/messages"
    said, reply = status(liminal.api("GET", path), 200)["messages"]
    assert (said["content"], reply["id"], len(liminal.provider.requests)) == (content, start["message_id"], 1)
    return reply


def in_order(events):
    """Assert that ids follow from what came, without gap or repetition; and one start, one done."""
    at = [len(positions(events[: n + 1])) for n in range(len(events))]
    assert [event.id for event in events] == [None, *map(str, at[1:])]
    assert [event.type for event in events if event.type in ("start", "done")] == ["start", "done"]


def test_a_client_does_not_notice_that_the_domain_was_cut_off(proxied):
    with running(proxied, tools=False) as (start, events):
        proxied.proxy.cut()
        proxied.provider.open_gate()
        rest = list(events)
    assert text(rest) == numbered(10, 2) and [event.type for event in rest].count("done") == 1
    assert only_exchange(proxied, start)["content"] == numbered(10)


@pytest.mark.slow
def test_a_cut_after_every_event_loses_and_repeats_nothing(proxied):
    events = []
    with proxied.stream({"content": "x", "model": "openai/think-200-100"}) as stream:
        for event in stream:
            events.append(event)
            proxied.proxy.cut()
    in_order(events)
    assert text(events) == numbered(200, 100) and only_exchange(proxied, events[0].data)["status"] == "complete"
    assert stored(proxied, events[0].data["message_id"]) == positions(events)


@pytest.mark.slow
def test_a_domain_out_of_reach_until_the_reply_is_over_is_only_a_pause(proxied):
    with running(proxied, "openai/gate-200-100", len(numbered(100))) as (start, events):
        proxied.proxy.shut()
        proxied.provider.open_gate()
        sql = "select 1 from messages where id = ? and status = 'complete'"
        eventually(lambda: proxied.sql("messages.db", sql, start["message_id"]))
        proxied.proxy.open()
        assert text(list(events)) == numbered(200, 100)
    assert stored(proxied, start["message_id"]) == [("text", one) for one in numbered(200)]
    eventually(lambda: not status(proxied.api("GET", "/api/v1/overflow"), 200)["waiting"])


@pytest.mark.slow
def test_a_replay_cut_off_in_mid_line_goes_on_where_it_was(proxied):
    message_id = proxied.send("x", model="demo/load-20000-0")[0].data["message_id"]
    proxied.proxy.chop = 100_001
    proxied.proxy.cut()
    events = proxied.attach(message_id)
    in_order(events)
    assert text(events) == numbered(20_000)


@pytest.mark.parametrize("n", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_lost_answer_makes_one_message_and_one_reply(proxied, n):
    proxied.proxy.lose("POST /domain/messages ", n)
    events = proxied.send("once", model="openai/say-30-0")
    in_order(events)
    assert text(events) == numbered(30) and proxied.proxy.lost == n
    assert only_exchange(proxied, events[0].data, "once")["content"] == numbered(30)


@pytest.mark.slow
def test_a_post_repeated_after_its_answer_never_came_attaches_to_the_same_reply(proxied):
    proxied.proxy.lose("POST /domain/messages ", 100)
    body, headers = {"content": "once", "model": "openai/say-30-0"}, {"Idempotency-Key": "never-came"}
    status(proxied.api("POST", SEND, body, headers=headers), 503, "domain_unavailable")
    proxied.proxy.open()
    events = proxied.read(proxied.stream(body, headers=headers))
    assert text(events) == numbered(30) and only_exchange(proxied, events[0].data, "once")["status"] == "complete"


@pytest.mark.slow
def test_a_lost_answer_to_a_retry_makes_one_reply(proxied):
    message_id = proxied.send("x", model="openai/say-3-0")[0].data["message_id"]
    proxied.proxy.lose(f"POST /domain/messages/{message_id}/retry ", 2)
    events = proxied.read(proxied.stream({"model": "openai/say-5-0"}, f"{SEND}/{message_id}/retry"))
    path = f"/api/v1/threads/{events[0].data['thread_id']}/messages"
    found = [one["content"] for one in status(proxied.api("GET", path), 200)["messages"]]
    assert found == ["x", numbered(3), numbered(5)] and proxied.proxy.lost == 2


@pytest.mark.slow
def test_a_lost_answer_to_a_new_thread_makes_one_thread(proxied):
    proxied.proxy.lose("POST /domain/threads ", 2)
    made = status(proxied.api("POST", "/api/v1/threads", {"title": "made once"}), 201)
    titles = [one["title"] for one in status(proxied.api("GET", "/api/v1/threads"), 200)["threads"]]
    assert titles.count("made once") == 1 and made["title"] == "made once" and proxied.proxy.lost == 2


@pytest.mark.slow
def test_bundles_whose_answer_is_lost_are_stored_once(proxied):
    proxied.proxy.lose("POST /domain/bundles ", 3)
    events = proxied.send("x", model="openai/say-300-100")
    assert stored(proxied, events[0].data["message_id"]) == [("text", one) for one in numbered(300)]
    assert proxied.proxy.lost == 3
    eventually(lambda: not status(proxied.api("GET", "/api/v1/overflow"), 200)["waiting"])
