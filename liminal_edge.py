"""Liminal's Edge: the process that faces clients.

Owns: API keys at the door, bundling, SSE, resume, the queue of database bundles with overflow.db. Speaks to no LLM,
writes no status: it may be killed at any time, since every reply lives in the Domain and on disk.

A token's way through this file: follow_run -> bundle -> stream_events, and beside it bundle -> queue -> drain.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import pathlib
import secrets
import time
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator

import aiohttp
import yarl
from aiohttp import web

from liminal import Call, Database, Metrics, Problem, Settings, check_database, check_event, contract, cut, encode_json
from liminal import joined, make_application, now, operations, serve, size, sse, version, write_private

CLIENT_TOKENS, CLIENT_SECONDS = 16, 0.1  # a client's bundle closes at so many tokens, or so long after its first
DATABASE_TOKENS, DATABASE_SECONDS = 50, 0.5  # and a database bundle, whichever comes first
BUNDLE_BYTES = 64 << 10  # or at so many bytes of events
BATCH_BYTES = 512 << 10  # bytes of bundles in one call of domain_store_bundles
BATCH_COUNT = 1_000  # and bundles
BATCH_PAUSE = 0.02  # seconds between two such calls, in which bundles gather
WINDOW_BYTES = 256 << 10  # bytes of recent events kept for each running reply; who is further behind asks the Domain
PING = 15  # seconds of silence after which a client gets a comment
DEAF = 45  # seconds without a byte after which the Domain is followed anew
BACKOFF = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between two tries to reach the Domain; the last one repeats
REPEATS = (0.1, 0.3, 0.6)  # and between the tries of one request that a client waits for
CALLER_FRESH = 60  # seconds for which the Domain's word on a key is believed
DRAIN = 3  # seconds at SIGTERM in which the queue may still reach the Domain; the rest goes to overflow.db
SESSION_SECONDS = 30 * 24 * 3600
RETRY, COMMENT = b"retry: 2000\n\n", b": ping\n\n"
SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}
BROKEN = "the Domain went away in mid-answer: try again, with the same Idempotency-Key where one was sent"
decode_json = json.JSONDecoder().decode  # json.loads guesses the encoding first: 3.3 us an event, not 2
LOST = (aiohttp.ClientError, OSError)  # of which a timeout is one
CLAIMS = {"iss": "liminal-edge", "sub": "edge-service", "aud": "liminal-domain"}
log = logging.getLogger("liminal.edge")


################ The Domain
# Every call is signed afresh with the scopes that the called operation names in the contract (a signature costs 26 us).
# In whatever way the Domain is away, before an answer or within, it is one Problem: `domain_unavailable`.


class Edge:
    """What the handlers share: the replies being followed, the queue, the callers already known."""

    def __init__(self, settings: Settings):
        self.settings, self.metrics, self.operations = settings, Metrics(METRICS), operations("domain")
        self.replies: dict[str, Reply] = {}
        self.clients: set[Client] = set()
        self.callers: dict[str, tuple[dict, float]] = {}
        self.queue = Queue(settings.queue_size, Database(settings.data / "overflow.db"), self.metrics)
        self.closing, self.tasks, self.http, self.key = False, set(), None, private_key(settings)
        self.metrics.gauges = {
            "liminal_clients": lambda: len(self.clients),
            "liminal_replies": lambda: len(self.replies),
            "liminal_queue_bundles": self.queue.memory.qsize,
            "liminal_overflow_bundles": lambda: self.queue.rows,
        }

    def token(self, scopes: list[str]) -> str:
        import jwt

        begun = int(time.time())
        claims = {**CLAIMS, "iat": begun, "exp": begun + 60, "jti": str(uuid.uuid4()), "scopes": scopes}
        return jwt.encode(claims, self.key, algorithm="EdDSA")

    async def open(self, name: str, call: Call | None = None, body=None, **arguments) -> aiohttp.ClientResponse:
        """The Domain's answer to one of its operations, its body still unread. Problem where it refuses or is away.
        The operation's parameters are filled from `arguments`, else from what `call` was asked."""
        operation, given = self.operations[name], {"path": {}, "query": {}, "header": {}}
        known = {**call.arguments, "x-user-id": call.user_id, **arguments} if call else arguments
        for parameter in operation.parameters:
            if (value := known.get(parameter.name)) is not None:
                given[parameter.where][parameter.name] = str(value)
        headers = {**given["header"], **({"x-request-id": call.request_id} if call else {})}
        path = operation.path.format_map({key: urllib.parse.quote(value, "") for key, value in given["path"].items()})
        url = yarl.URL(f"{self.settings.domain_url}{path}?{urllib.parse.urlencode(given['query'])}", encoded=True)
        for last in (False, True):
            headers["Authorization"] = f"Bearer {self.token(operation.security.get('edge', []))}"
            try:
                response = await self.http.request(operation.method, url, headers=headers, json=body)
            except LOST as error:
                words = f"the Domain does not answer at {self.settings.domain_url}: `liminal up` starts it"
                raise Problem("domain_unavailable", words) from error
            if response.status < 400:
                return response
            problem = await read_problem(response)
            ours = problem.more.get("field") == "Authorization"  # it is our signature that is not taken, no user's key
            if not ours or last:  # it may have expired while the Domain was stopped
                break
        if ours:
            log.error("the Domain takes no signature of ours: %s", problem.message)
            raise Problem("domain_unavailable", f"the Domain does not take this Edge's signature: {problem.message}")
        raise problem

    async def ask(self, name: str, call: Call | None = None, read=None, **rest):
        """What `read` makes of the Domain's answer: (status, body) unless told. What may be repeated is sent again
        where the Domain was away or its answer was lost."""
        operation = self.operations[name]
        keyed = any(given.name == "Idempotency-Key" for given in operation.parameters)
        waits = REPEATS if operation.method == "GET" or keyed or name == "domain_find_caller" else ()
        for wait in (*waits, None):
            try:
                return await (read or read_json)(await self.open(name, call, **rest))
            except Problem as problem:
                if problem.code != "domain_unavailable" or wait is None:
                    raise
                await asyncio.sleep(wait)

    def background(self, work) -> None:
        """Run beside the requests; what it raises is logged by asyncio."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


@contextlib.contextmanager
def reading():
    """Around each read of an answer. A ValueError is a line that broke off."""
    try:
        yield
    except (*LOST, ValueError, RecursionError) as error:
        log.info("an answer of the Domain broke off: %r", error)
        raise Problem("domain_unavailable", BROKEN) from error


async def read_json(response) -> tuple[int, dict | None]:
    """(status, body) of an answer."""
    with reading():
        async with response:
            data = await response.read()
    return response.status, json.loads(data) if data else None


async def back_off(tries: int) -> int:
    """The pause behind a failed try of what is tried without end; how many have failed."""
    await asyncio.sleep(BACKOFF[min(tries, len(BACKOFF) - 1)])
    return tries + 1


async def read_problem(response) -> Problem:
    """The Domain's error, to be passed on as our own."""
    try:
        error = (await read_json(response))[1]["error"]
        more = {name: error[name] for name in ("field", "message_ids") if name in error}
        return Problem(error["code"], error["message"], **more)
    except (ValueError, KeyError, TypeError):
        return Problem("internal", f"the Domain answered {response.status} with something that is no error of ours")


def private_key(settings: Settings):
    """The Edge's Ed25519 key; at the first start both halves are made, the public one for the Domain to find."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    given, pem = settings.edge_private_key, serialization.Encoding.PEM
    path = pathlib.Path(given or settings.data / "edge_private_key.pem")
    if not given and not path.exists():
        plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        write_private(path, Ed25519PrivateKey.generate().private_bytes(pem, *plain).decode())
    try:
        text = given.replace("\\n", "\n") if "-----BEGIN" in given else path.read_text()
        key = serialization.load_pem_private_key(text.encode(), None)
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"liminal: the Edge's private key cannot be read: {error}; see EDGE_PRIVATE_KEY") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SystemExit("liminal: the Edge's private key is not an Ed25519 key")
    text = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    known = settings.data / "edge_public_key.pem"
    if not settings.edge_public_key and (not known.exists() or known.read_text() != text):
        write_private(known, text)
    return key


################ Following a run
# One task for each running reply, whether or not a client listens: it brings the database bundles, too. When the Domain
# goes away it follows again, from where it was; clients notice a pause.


class Reply:
    """A running reply as the Edge knows it: open bundles, and a window of closed ones as (start, end, events, SSE)."""

    def __init__(self, message_id: str, user_id: str, position: int = 0, began: float | None = None):
        self.message_id, self.user_id, self.head, self.done = message_id, user_id, None, None
        self.position = self.begin = self.end = position  # what has come; where the window begins, and ends
        self.window, self.window_bytes = collections.deque(), 0
        self.open, self.open_bytes, self.timer = [], 0, None
        self.unstored, self.unstored_at, self.unstored_bytes = [], position, 0
        self.began, self.edge_ttft_ms, self.told_ttft = began, None, False
        self.heard_at, self.response, self.changed = time.monotonic(), None, asyncio.Event()

    def after(self, position: int) -> bytes:
        """What the window holds strictly after a position that lies in it, encoded."""
        found = []
        for start, end, events, data in reversed(self.window):
            if end <= position:
                break
            found.append(data if start >= position else encode_events(cut(events, position - start), position)[0])
        return b"".join(reversed(found))


def pulse(event: asyncio.Event) -> None:
    """Wake all who wait now; who comes later waits for the next time."""
    event.set()
    event.clear()


def encode_events(events: list[dict], position: int) -> tuple[bytes, int]:
    """(events behind a position as SSE, the position that they lead to)."""
    made = []
    for event in events:
        kind = event["type"]
        position = event["position"] if kind in ("start", "done") else position + size(event)
        made.append(sse(event, None if kind == "start" else position))
    return b"".join(made), position


async def read_events(edge: Edge, response) -> AsyncIterator[tuple[list[dict], int]]:
    """(events, bytes) of each read of a Domain's stream; an empty list for a ping."""
    tail = b""
    with reading():
        async for data in response.content.iter_any():
            *lines, tail = (tail + data).split(b"\n") if tail else data.split(b"\n")
            weight = sum(map(len, lines))  # of whole lines, in however many reads they came
            events = [decode_json(line.decode()) for line in lines if line]
            if edge.settings.check_events:
                for event in events:
                    check_event(event)
            yield events, weight


async def read_first(edge: Edge, response) -> tuple:
    """(response, reader, events, bytes) of the first read that holds any, of which the first is `start`; Problem where
    one of them is wrong, so that nothing is begun."""
    reader = read_events(edge, response)
    async for events, weight in reader:
        if events:
            return response, reader, events, weight
    raise Problem("domain_unavailable", BROKEN)


async def follow_run(edge: Edge, reply: Reply, opened: tuple | None = None) -> None:
    """Take in a reply's events until its `done`, over as many connections as it takes; one may be `opened` already."""
    tries = 0
    while not reply.done:
        try:
            reply.response, reader = opened or await reopen(edge, reply)
            async for events, weight in reader:
                tries, reply.heard_at = 0, time.monotonic()
                for event in events:
                    bundle(edge, reply, event, weight // len(events))
        except Problem as problem:
            if problem.code != "domain_unavailable":
                log.error("the reply %s cannot be followed: %s", reply.message_id, problem.message)
                unknown = dict.fromkeys(("stop_reason", "usage", "timing"))
                done = {"type": "done", "status": "error", "position": reply.position, "error": problem.detail(None)}
                end_reply(edge, reply, done | unknown)
        finally:
            if reply.response:
                reply.response.close()
            opened = reply.response = None
        if not reply.done:
            tries = await back_off(tries)


async def reopen(edge: Edge, reply: Reply) -> tuple:
    """(response, reader) of a reply from where it was. Where the Domain was killed, it has only what we bring, and its
    `done` must not fall short of what clients have seen: so that comes first."""
    enqueue(edge, reply, "end")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(edge.queue.brought(), DRAIN)
    response = await edge.open("domain_stream_message", message_id=reply.message_id, after=reply.position)
    edge.metrics.count("liminal_follows_total")
    return response, read_events(edge, response)


################ Bundling
# What one token costs decides how fast Liminal is: here it is two appends and two comparisons. The first token of a
# reply leaves at once, so that the time to the first token is not taxed by the timer.


def bundle(edge: Edge, reply: Reply, event: dict, weight: int) -> None:
    """Take one event of the Domain into the open bundle of the clients and into that of the database."""
    kind = event["type"]
    if kind == "start":
        reply.head = reply.head or event
        return pulse(reply.changed)
    if kind == "done":
        return end_reply(edge, reply, event)
    reply.position += len(event["text"]) if kind == "text" else size(event)
    reply.open.append(event)
    reply.unstored.append(event)
    reply.open_bytes += weight
    reply.unstored_bytes += weight
    if reply.edge_ttft_ms is None and reply.began:
        first_token(edge, reply)
    elif len(reply.open) >= CLIENT_TOKENS or reply.open_bytes >= BUNDLE_BYTES:
        close_bundle(edge, reply, "size")
    elif reply.timer is None:
        reply.timer = asyncio.get_running_loop().call_later(CLIENT_SECONDS, close_bundle, edge, reply, "time")
    if len(reply.unstored) >= DATABASE_TOKENS or reply.unstored_bytes >= BUNDLE_BYTES:
        enqueue(edge, reply, "size")


def first_token(edge: Edge, reply: Reply) -> None:
    close_bundle(edge, reply, "first")
    seconds = time.monotonic() - reply.began
    reply.edge_ttft_ms = round(seconds * 1000, 2)
    edge.metrics.observe("liminal_edge_ttft_seconds", seconds)


def close_bundle(edge: Edge, reply: Reply, cause: str) -> None:
    """Close the clients' open bundle: joined and encoded once, for however many clients."""
    if reply.timer:
        reply.timer.cancel()
        reply.timer = None
    if not reply.open:
        return
    events, tokens, start = joined(reply.open), len(reply.open), reply.end
    data, reply.end = encode_events(events, start)
    reply.open, reply.open_bytes = [], 0
    reply.window.append((start, reply.end, events, data))
    reply.window_bytes += len(data)
    while reply.window_bytes > WINDOW_BYTES and len(reply.window) > 1:
        _, reply.begin, _, old = reply.window.popleft()
        reply.window_bytes -= len(old)
    edge.metrics.count("liminal_bundles_total", consumer="client", cause=cause)
    edge.metrics.observe("liminal_client_bundle_tokens", tokens)
    pulse(reply.changed)


def end_reply(edge: Edge, reply: Reply, done: dict) -> None:
    close_bundle(edge, reply, "end")
    enqueue(edge, reply, "end")
    if done["timing"]:
        known = done["timing"]["edge_ttft_ms"] or reply.edge_ttft_ms  # a replay keeps what was measured then
        done = {**done, "timing": {**done["timing"], "edge_ttft_ms": known}}
    reply.done = done
    edge.replies.pop(reply.message_id, None)
    pulse(reply.changed)


################ The queue
# Database bundles on their way to the Domain; nobody's stream ever waits for them. In memory while all is well; when
# that is full, or the Domain is away, in overflow.db, from where they are replayed by themselves before anything newer.
# Storing is idempotent by position, so a batch whose answer was lost is simply sent again.


class Queue:
    """Bundles in their order, as {id, bundle, bytes, created_at (epoch s), tries, where}; the ids give the order over
    memory and overflow.db. `take` gives the oldest batch; then either `settle` it or `keep` it."""

    def __init__(self, limit: int, overflow: Database, metrics: Metrics):
        self.limit, self.overflow, self.metrics = limit, overflow, metrics
        self.memory, self.taken, self.changed = asyncio.Queue(limit), [], asyncio.Event()
        count = "select count(*), coalesce(max(id), 0) from overflow"
        self.rows, self.newest = overflow.writer.execute(count).fetchone()
        self.writing = 0  # bundles handed to overflow.db whose insert has not been answered

    def put(self, bundle: dict, weight: int) -> None:
        self.newest += 1
        item = {"id": self.newest, "bundle": bundle, "bytes": weight, "created_at": time.time()}
        item |= {"tries": 0, "where": "queue"}
        if self.rows or self.memory.full():
            self.spill([item])
        else:
            self.memory.put_nowait(item)
        pulse(self.changed)

    def held(self) -> Iterator[dict]:
        """What waits in memory, taken out one by one."""
        while not self.memory.empty():
            yield self.memory.get_nowait()

    def spill(self, items: list[dict]) -> None:
        """Send these, and whatever waits in memory, to overflow.db. Where it refuses, too, they are left to the Domain,
        which holds the runs, and stores by itself what nobody brings."""
        items = [*items, *self.held()]

        def answered(written: asyncio.Future) -> None:
            self.writing -= len(items)
            if not written.cancelled() and (error := written.exception()):
                self.rows -= len(items)
                self.leave(len(items))
                log.error("overflow.db takes nothing: %s", error)

        if self.writing + len(items) > self.limit + BATCH_COUNT:
            return self.leave(len(items))
        self.rows, self.writing = self.rows + len(items), self.writing + len(items)
        self.overflow.write(insert_overflow, items).add_done_callback(answered)

    def leave(self, count: int) -> None:
        self.metrics.count("liminal_left_to_domain_total", count)
        pulse(self.changed)

    async def take(self, count: int = BATCH_COUNT) -> list[dict]:
        """The oldest batch, of at most so many: of overflow.db while anything waits there, else of memory, once it can."""
        while not self.taken:
            if self.rows:
                found = await self.overflow.write(select_overflow, BATCH_COUNT)  # by the writer: behind every insert
                self.rows = self.rows if found else self.writing
                self.taken = first_batch(found, count)
            elif not self.memory.empty():
                self.taken = first_batch(self.held(), count)
            else:
                await self.changed.wait()
        return self.taken

    async def settle(self) -> None:
        """The Domain has answered for the batch: only now is it forgotten."""
        last = self.taken[-1]["id"]
        if self.taken[0]["where"] == "overflow":
            await self.overflow.write(delete_overflow, last)
            self.rows -= len(self.taken)
            self.metrics.count("liminal_replayed_total", len(self.taken))
        self.taken = []
        pulse(self.changed)

    async def keep(self) -> None:
        """The Domain is away: the batch stays, on disk from now on."""
        taken, self.taken = self.taken, []
        if taken and taken[0]["where"] == "queue":
            self.spill(taken)
        if taken:
            await self.overflow.write(touch_overflow, taken[-1]["id"])

    async def brought(self) -> None:
        """Wait until nothing of what is in the queue now waits any more."""
        newest = self.newest
        while self.rows or any(items and items[0]["id"] <= newest for items in (self.taken, self.memory._queue)):
            await self.changed.wait()

    async def waiting(self, limit: int) -> list[dict]:
        """What waits, oldest first, as the API tells it."""
        stored = await self.overflow.write(select_overflow, limit)  # by the writer: behind every insert
        held = [item for item in (*self.taken, *self.memory._queue) if item["where"] == "queue"]
        return [
            {name: item["bundle"][name] for name in ("message_id", "position")}
            | {name: item[name] for name in ("where", "tries", "bytes")}
            | {"age_s": round(max(0.0, time.time() - item["created_at"]), 3)}
            for item in sorted((*stored, *held), key=lambda item: item["id"])[:limit]
        ]


def first_batch(items: Iterable[dict], count: int) -> list[dict]:
    """Of the items the first, at most `count`, up to the one that reaches BATCH_BYTES."""
    batch, weight = [], 0
    for item in items:
        batch.append(item)
        weight += item["bytes"]
        if weight >= BATCH_BYTES or len(batch) == count:
            break
    return batch


def insert_overflow(db, items: list[dict]) -> None:
    sql = """insert into overflow (id, message_id, bundle, bytes, created_at, tries)
             values (:id, :message_id, :bundle, :bytes, :created_at, :tries)"""
    texts = ({"message_id": item["bundle"]["message_id"], "bundle": encode_json(item["bundle"])} for item in items)
    db.executemany(sql, [item | text for item, text in zip(items, texts)])


def select_overflow(db, limit: int) -> list[dict]:
    sql = "select id, bundle, bytes, created_at, tries, 'overflow' as \"where\" from overflow order by id limit :limit"
    return [{**row, "bundle": json.loads(row["bundle"])} for row in db.execute(sql, {"limit": limit})]


def delete_overflow(db, last: int) -> None:
    db.execute("delete from overflow where id <= :last", {"last": last})


def touch_overflow(db, last: int) -> None:
    db.execute("update overflow set tries = tries + 1 where id <= :last", {"last": last})


def enqueue(edge: Edge, reply: Reply, cause: str) -> None:
    """Close the open database bundle and queue it."""
    if not reply.unstored:
        return
    bundle = {"message_id": reply.message_id, "position": reply.unstored_at, "parts": joined(reply.unstored)}
    if reply.edge_ttft_ms is not None and not reply.told_ttft:
        bundle["edge_ttft_ms"], reply.told_ttft = reply.edge_ttft_ms, True
    edge.metrics.count("liminal_bundles_total", consumer="database", cause=cause)
    edge.metrics.observe("liminal_database_bundle_tokens", len(reply.unstored))
    edge.queue.put(bundle, reply.unstored_bytes)
    reply.unstored, reply.unstored_at, reply.unstored_bytes = [], reply.position, 0


async def drain(edge: Edge) -> None:
    """Bring the queue to the Domain, in order, a batch at a time; no answer, or any other than a good one, keeps it.
    But a bundle that it can never take must not hold up all others: tried alone, it is left to it, and counted."""
    tries, alone = 0, False
    while True:
        try:
            batch = await edge.queue.take(1 if alone else BATCH_COUNT)
            await edge.ask("domain_store_bundles", body={"bundles": [item["bundle"] for item in batch]})
            for item in batch:
                edge.metrics.observe("liminal_queue_wait_seconds", time.time() - item["created_at"])
            await edge.queue.settle()
            tries, alone = 0, alone and edge.queue.rows > 0  # what was refused waits in overflow.db
            await asyncio.sleep(BATCH_PAUSE)
        except Problem as problem:
            if problem.code != "domain_unavailable":
                log.error("a batch of bundles has to wait: %s", problem.message)
            with contextlib.suppress(Problem):  # only the count of tries is lost
                refused = problem.code in ("invalid_request", "too_large")
                if refused and len(edge.queue.taken) == 1:
                    edge.queue.leave(1)
                    await edge.queue.settle()
                    alone = False
                    continue
                alone = refused
                await edge.queue.keep()
            tries = await back_off(tries)


async def tend(edge: Edge) -> None:
    """Twice a second, for all replies at once: close what the database has waited for, notice a Domain that has fallen
    silent, and wake clients for a ping."""
    for beat in itertools.count():
        await asyncio.sleep(DATABASE_SECONDS - 0.1)  # what is promised within this time has to be stored by then, too
        deaf = time.monotonic() - DEAF
        for reply in list(edge.replies.values()):
            enqueue(edge, reply, "time")
            if reply.response and reply.heard_at < deaf:
                reply.response.close()
            if not beat % 4:
                pulse(reply.changed)
        for client in list(edge.clients):
            if client.source and client.heard_at < deaf:
                client.source.close()


################ Streaming and resume
# A client is only a position. Where the window holds, or will hold, what it needs next, it is served from there, else
# from the Domain: so live, late, resumed and slow clients are one path, and none of them delays another.


class Client:
    """An open stream, how far it has come, and whose it is: it is closed when its key is revoked."""

    def __init__(self, call: Call, message_id: str, position: int):
        self.call, self.message_id, self.position, self.begun, self.ended = call, message_id, position, False, False
        self.response, self.written, self.tries = web.StreamResponse(headers=SSE_HEADERS), 0.0, 0
        self.source, self.heard_at = None, 0.0  # the Domain's answer that is being replayed

    async def write(self, data: bytes) -> None:
        await self.response.write(data)
        self.written = time.monotonic()


async def stream_events(edge: Edge, call: Call, message_id: str, after: int = 0, reply: Reply | None = None):
    """Answer with a reply's events strictly after a position, as SSE, until its `done`."""
    client = Client(call, message_id, after)
    edge.clients.add(client)
    try:
        await client.response.prepare(call.request)
        await client.write(RETRY)
        while not client.ended and not edge.closing:
            reply = edge.replies.get(message_id) or reply
            if reply and reply.begin <= client.position:
                await write_window(edge, client, reply)
            else:
                await write_replay(edge, client)
    except ConnectionError:
        pass  # the client has gone: it only detaches
    except Problem as problem:
        log.warning("a stream of %s ends: %s", message_id, problem.message)
    finally:
        edge.clients.discard(client)
    return client.response


async def write_window(edge: Edge, client: Client, reply: Reply) -> None:
    """What the Edge has and gets of a reply, with a comment as ping through every silence: until the end, or until the
    window has moved past the client."""
    while reply.begin <= client.position and not client.ended and not edge.closing:
        if not client.begun and reply.head:
            client.begun = True
            await client.write(sse({**reply.head, "position": client.position}))
        elif client.position < reply.end:
            data, client.position = reply.after(client.position), reply.end
            await client.write(data)
        elif reply.done:
            client.ended = True
            await client.write(sse(reply.done, reply.done["position"]))
        elif time.monotonic() - client.written >= PING:
            await client.write(COMMENT)
        else:
            await reply.changed.wait()


async def write_replay(edge: Edge, client: Client) -> None:
    """What the Domain has and gets of a reply: until the end, until the window is reached, or until the connection
    breaks off. Its backpressure is the client's own."""
    asked = {"message_id": client.message_id, "after": client.position}
    try:
        with contextlib.closing(await edge.open("domain_stream_message", client.call, **asked)) as client.source:
            client.heard_at = time.monotonic()
            async for events, _ in read_events(edge, client.source):
                client.heard_at = time.monotonic()
                fresh = [event for event in events if event["type"] != "start" or not client.begun]
                data, client.position = encode_events(fresh, client.position)
                client.begun, client.tries = client.begun or bool(events), 0
                client.ended = bool(events) and events[-1]["type"] == "done"
                await client.write(data if events else COMMENT)
                reply = edge.replies.get(client.message_id)
                if client.ended or reply and reply.begin <= client.position:
                    return
    except Problem as problem:
        if problem.code != "domain_unavailable" or not client.begun:
            raise
    finally:
        client.source = None
    if time.monotonic() - client.written >= PING:
        await client.write(COMMENT)
    client.tries = await back_off(client.tries)


################ Handlers: messages
# Bound by operationId. Most operations are the Domain's own behind another path, and are passed on.


async def forward(edge: Edge, call: Call, **rest):
    """Ask the Domain's operation of the same name, and give its answer as ours. It always has an Idempotency-Key."""
    call.arguments["Idempotency-Key"] = call.arguments.get("Idempotency-Key") or str(uuid.uuid4())
    return await edge.ask("domain_" + call.operation.id, call, body=call.body, **rest)


async def begin_reply(edge: Edge, call: Call) -> Reply:
    """Send the Domain what asks for a new reply, and follow it."""
    began = time.monotonic()
    response, reader, events, weight = await forward(edge, call, read=functools.partial(read_first, edge))
    message_id = events[0]["message_id"]
    if known := edge.replies.get(message_id):
        response.close()
        return known
    reply = edge.replies[message_id] = Reply(message_id, call.user_id, 0, began)
    for event in events:
        bundle(edge, reply, event, weight // len(events))
    edge.background(follow_run(edge, reply, (response, reader)))
    return reply


async def send_message(edge: Edge, call: Call):
    """Begin a reply, and give it in the form that was asked for; a retry has only one."""
    streamed, background = call.body.pop("stream", True), call.body.pop("background", False)
    reply = await begin_reply(edge, call)
    if background:
        ids = {name: reply.head[name] for name in ("thread_id", "user_message_id")}
        return 202, {**ids, "message_ids": [reply.message_id]}
    if streamed:
        return await stream_events(edge, call, reply.message_id, reply=reply)
    while not reply.done:
        if edge.closing:
            raise Problem("domain_unavailable", "this server is stopping; the reply goes on: ask again for its message")
        await reply.changed.wait()
    return await edge.ask("domain_get_message", call, message_id=reply.message_id)


async def stream_message(edge: Edge, call: Call):
    """Attach from a position. A run that nobody follows yet (the Edge is new) is followed from what is stored."""
    asked = call.arguments["Last-Event-ID"]
    after, ref = (call.arguments["after"] or 0) if asked is None else asked, call.arguments["message_id"]
    known = edge.replies.get(ref)
    if known is None or known.user_id != call.user_id or after > known.end:
        await attach_runs(edge, call.user_id)
        judge = functools.partial(read_first, edge)  # the Domain judges id, owner and position
        response, _, events, _ = await edge.ask("domain_stream_message", call, read=judge, after=after)
        response.close()
        ref = events[0]["message_id"]
    if after:
        edge.metrics.count("liminal_resumes_total")
    return await stream_events(edge, call, ref, after)


async def attach_runs(edge: Edge, user_id: str | None = None) -> None:
    """Follow the running replies that are not followed yet, from what is stored of them."""
    _, found = await edge.ask("domain_list_runs", **{"x-user-id": user_id})
    for run in found["runs"]:
        if run["message_id"] not in edge.replies:
            reply = edge.replies[run["message_id"]] = Reply(run["message_id"], run["user_id"], run["stored"])
            edge.background(follow_run(edge, reply))


################ Who may come in
# The Domain knows keys and sessions by their hash; its word is believed for a minute, and forgotten on revoking.


async def authenticate(edge: Edge, call: Call) -> None:
    """Fill in the caller from the Authorization header or the cookie, and judge the role that the operation needs."""
    needed = call.operation.security
    scheme, _, secret = call.request.headers.get("Authorization", "").partition(" ")
    given = "key" if scheme.lower() == "bearer" and secret else "session"
    secret = secret.strip() if given == "key" else call.request.cookies.get("session", "")
    if not secret or given not in needed or secret.startswith("lt_sk_") != (given == "key"):
        words = "the header `Authorization: Bearer lt_sk_...`" if "key" in needed else "the cookie of a session"
        raise Problem("unauthorized", f"send {words}; the owner's key is in data/cli.key")
    caller = await find_caller(edge, hash_of(secret))
    call.user, call.user_id, call.key_id = caller["user"], caller["user"]["id"], caller["key_id"]
    if "owner" in needed[given] and call.user["role"] != "owner":
        raise Problem("forbidden", "only an owner may do this")


async def find_caller(edge: Edge, hash: str) -> dict:
    caller, until = edge.callers.get(hash, (None, 0))
    if until < time.monotonic():
        _, caller = await edge.ask("domain_find_caller", body={"hash": hash})
        if len(edge.callers) > 10_000:
            edge.callers.clear()
        edge.callers[hash] = caller, time.monotonic() + CALLER_FRESH
    return caller


def hash_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


async def shut_out(edge: Edge, call: Call):
    """Revoke a key or delete a user: forget what is known of callers, even where the answer is lost, and close the
    streams of what is gone; its runs go on."""
    try:
        status, gone = await forward(edge, call)
    finally:
        edge.callers.clear()
    for client in list(edge.clients):
        if gone["id"] in (client.call.key_id, client.call.user_id) and client.call.request.transport:
            client.call.request.transport.abort()
    return status, gone


async def create_session(edge: Edge, call: Call):
    """Exchange a key for a cookie that scripts in a page cannot read."""
    secret = secrets.token_urlsafe(32)
    body = {"hash": hash_of(secret), "key_id": call.key_id, "expires_at": now(later=SESSION_SECONDS)}
    await edge.ask("domain_create_session", call, body=body)
    response = web.json_response(text=encode_json(call.user), status=201)
    response.set_cookie("session", secret, max_age=SESSION_SECONDS, httponly=True, samesite="Strict", path="/")
    return response


async def delete_session(edge: Edge, call: Call):
    hash = hash_of(call.request.cookies["session"])
    await edge.ask("domain_delete_session", call, hash=hash)
    edge.callers.pop(hash, None)
    response = web.Response(status=204)
    response.del_cookie("session", path="/")
    return response


################ Handlers: the server itself


def totals(edge: Edge, *names: str) -> dict[str, int]:
    return {name: int(edge.metrics.value(f"liminal_{name}_total")) for name in names}


async def list_overflow(edge: Edge, call: Call):
    queue = edge.queue
    figures = {"queue": queue.memory.qsize(), "overflow": queue.rows, **totals(edge, "left_to_domain")}
    return {"waiting": await queue.waiting(call.arguments["limit"]), **figures}


async def get_stats(edge: Edge, call: Call):
    """Both servers' figures, as people ask for them."""
    _, known = await edge.ask("domain_get_stats", call)
    metrics, queue, consumers = edge.metrics, edge.queue, ("client", "database")
    ttft = {who: known.pop(f"{who}_ttft_ms") for who in ("provider", "domain")}
    ttft["edge"] = metrics.quantiles("liminal_edge_ttft_seconds", 1000)
    zero = dict.fromkeys(("first", "size", "time", "end"), 0)
    causes = {who: zero | metrics.by_label("liminal_bundles_total", "cause", consumer=who) for who in consumers}
    sizes = {f"{who}_tokens": metrics.quantiles(f"liminal_{who}_bundle_tokens") for who in consumers}
    waits = {"wait_ms": metrics.quantiles("liminal_queue_wait_seconds", 1000)}
    figures = {"waiting": queue.memory.qsize(), "overflow": queue.rows, **totals(edge, "replayed", "left_to_domain")}
    own = {"clients": len(edge.clients), **totals(edge, "resumes")}
    return {"ttft_ms": ttft, "bundles": causes | sizes, "queue": figures | waits, **own, **known}


async def get_status(edge: Edge, call: Call):
    _, known = await edge.ask("domain_get_status", call)
    own = await asyncio.to_thread(check_database, edge.settings.data / "overflow.db")
    return {"databases": {**known["databases"], "overflow.db": own}}


async def health(edge: Edge, call: Call):
    """The Edge is well without the Domain, and says so."""
    try:
        async with asyncio.timeout(1):
            await edge.ask("health")
            domain = "ok"
    except (Problem, TimeoutError):
        domain = "unavailable"
    known = {"version": version(), "instance": edge.settings.instance}
    return {"status": "ok", "server": "edge", **known, "domain": domain}


async def metrics(edge: Edge, call: Call):
    return web.Response(text=edge.metrics.text(), content_type="text/plain", charset="utf-8")


async def contract_document(edge: Edge, call: Call):
    return contract()


################ The server

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TOKENS = (1, 2, 4, 8, 16, 32, 64)
METRICS = {
    "liminal_clients": ("open streams", None),
    "liminal_replies": ("running replies that are followed", None),
    "liminal_queue_bundles": ("database bundles in the queue", None),
    "liminal_overflow_bundles": ("database bundles in overflow.db", None),
    "liminal_replayed_total": ("database bundles brought from overflow.db to the Domain", None),
    "liminal_bundles_total": ("bundles closed, by consumer and cause", None),
    "liminal_left_to_domain_total": ("database bundles that neither queue nor overflow.db could take", None),
    "liminal_follows_total": ("times a reply was followed anew", None),
    "liminal_resumes_total": ("streams resumed after a position", None),
    "liminal_errors_total": ("requests refused, by code", None),
    "liminal_edge_ttft_seconds": ("from a client's request to the first token", SECONDS),
    "liminal_client_bundle_tokens": ("tokens in a client's bundle", TOKENS),
    "liminal_database_bundle_tokens": ("tokens in a database bundle", TOKENS),
    "liminal_queue_wait_seconds": ("from a bundle's closing to the Domain's answer", SECONDS),
}
FORWARDED = """get_message cancel_message add_reaction remove_reaction create_thread list_threads get_thread
    update_thread delete_thread fork_thread list_messages search_messages list_runs list_tools list_models
    list_providers put_provider delete_provider create_user list_users create_key list_keys"""
OWN = {fn.__name__: fn for fn in (send_message, stream_message, create_session, delete_session)}
OWN |= {fn.__name__: fn for fn in (list_overflow, get_stats, get_status, health, metrics)}
OWN |= {"retry_message": send_message, "revoke_key": shut_out, "delete_user": shut_out, "contract": contract_document}


async def make_app(settings: Settings) -> web.Application:
    edge = Edge(settings)
    known = OWN | dict.fromkeys(FORWARDED.split(), forward)
    handlers = {name: functools.partial(fn, edge) for name, fn in known.items()}
    app = make_application("edge", handlers, functools.partial(authenticate, edge), settings, edge.metrics)
    timeout, connector = aiohttp.ClientTimeout(total=None, sock_connect=5), aiohttp.TCPConnector(limit=0)
    edge.http = aiohttp.ClientSession(timeout=timeout, connector=connector, json_serialize=encode_json)
    for work in (drain, tend, attach_at_start):
        edge.background(work(edge))
    app.on_shutdown.append(lambda app: shut_down(edge))
    app.on_cleanup.append(lambda app: close(edge))
    return app


async def attach_at_start(edge: Edge) -> None:
    """Replies that ran while no Edge was there are followed again."""
    for tries in itertools.count():
        try:
            return await attach_runs(edge)
        except Problem:
            await back_off(tries)


async def shut_down(edge: Edge) -> None:
    """SIGTERM: streams end without `done`, which tells clients to reconnect; the queue is brought to the Domain."""
    edge.closing = True
    for reply in list(edge.replies.values()):
        enqueue(edge, reply, "end")
        pulse(reply.changed)
    for client in edge.clients:
        if client.source:
            client.source.close()
    end = time.monotonic() + DRAIN
    while time.monotonic() < end and (edge.queue.memory.qsize() or edge.queue.taken and not edge.queue.rows):
        await asyncio.sleep(0.02)


async def close(edge: Edge) -> None:
    for task in list(edge.tasks):
        task.cancel()
    await asyncio.gather(*edge.tasks, return_exceptions=True)
    edge.queue.spill([item for item in edge.queue.taken if item["where"] == "queue"])
    edge.queue.overflow.close()
    await edge.http.close()


if __name__ == "__main__":
    serve("edge", make_app)
