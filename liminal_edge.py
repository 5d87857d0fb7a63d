"""Liminal's Edge: the process that faces clients.

Owns: API keys at the door, bundling, SSE, resume, the queue of database bundles. Opens no database, speaks to no LLM,
writes no status: it may be killed at any time, since every reply lives in the Domain and on disk.

A token's way through this file: follow_run -> bundle -> stream_events, and beside it bundle -> queue -> drain.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
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
from collections.abc import AsyncIterator

import aiohttp
import yarl
from aiohttp import web

from liminal import (
    Call,
    Database,
    Metrics,
    Problem,
    Settings,
    check_database,
    check_event,
    contract,
    cut,
    encode_json,
    joined,
    make_application,
    now,
    operations,
    serve,
    size,
    sse,
    version,
    write_private,
)

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
RETRY = b"retry: 2000\n\n"
SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}
log = logging.getLogger("liminal.edge")


################ The Domain
# Every call is signed afresh with the scopes that the called operation names in the contract (a signature costs 26 us).


def backoff():
    return itertools.chain(BACKOFF, itertools.repeat(BACKOFF[-1]))


class Edge:
    """What the handlers share: the replies being followed, the queue, the callers already known."""

    def __init__(self, settings: Settings):
        self.settings, self.metrics, self.operations = settings, Metrics(METRICS), operations("domain")
        self.replies: dict[str, Reply] = {}
        self.clients: set[Client] = set()
        self.callers: dict[str, tuple[dict, float]] = {}
        self.queue = Queue(settings.queue_size, Database(settings.data / "overflow.db"), self.metrics)
        self.closing, self.tasks = False, set()
        self.http = None
        self.key = private_key(settings)
        self.metrics.gauges = {
            "liminal_clients": lambda: len(self.clients),
            "liminal_replies": lambda: len(self.replies),
            "liminal_queue_bundles": self.queue.memory.qsize,
            "liminal_overflow_bundles": lambda: self.queue.rows,
        }

    def token(self, scopes: list[str]) -> str:
        import jwt

        begun = int(time.time())
        claims = {"iss": "liminal-edge", "sub": "edge-service", "aud": "liminal-domain", "iat": begun, "exp": begun + 60}
        return jwt.encode({**claims, "jti": str(uuid.uuid4()), "scopes": scopes}, self.key, algorithm="EdDSA")

    async def open(self, name: str, call: Call | None = None, user_id=None, headers=None, body=None, **arguments):
        """The Domain's answer to one of its operations, its body still unread. Problem where the Domain refuses or is away.
        `arguments` fill path and query; what `call` was asked fills the rest."""
        operation, user_id = self.operations[name], user_id or (call and call.user_id)
        arguments = {**(call.arguments if call else {}), **arguments}
        headers = {"Authorization": f"Bearer {self.token(operation.security.get('edge', []))}", **(headers or {})}
        if user_id:
            headers["x-user-id"] = user_id
        if call:
            headers["x-request-id"] = call.request_id
        if body is not None:
            headers["Content-Type"] = "application/json"
        asked = {given.name: str(arguments[given.name]) for given in operation.parameters if arguments.get(given.name) is not None}
        names = {given.name: given.where for given in operation.parameters}
        quoted = {name: urllib.parse.quote(value, safe="") for name, value in asked.items() if names[name] == "path"}
        query = {name: value for name, value in asked.items() if names[name] == "query"}
        headers |= {name: value for name, value in asked.items() if names[name] == "header" and name != "x-user-id"}
        url = self.settings.domain_url + operation.path.format_map(quoted)
        url += "?" + urllib.parse.urlencode(query) if query else ""
        data = None if body is None else encode_json(body).encode()
        try:
            response = await self.http.request(operation.method, yarl.URL(url, encoded=True), headers=headers, data=data)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            words = f"the Domain does not answer at {self.settings.domain_url}: `liminal up` starts it"
            raise Problem("domain_unavailable", words) from error
        if response.status >= 400:
            raise problem_of(response.status, await read_whole(response))
        return response

    async def ask(self, name: str, call: Call | None = None, **rest) -> tuple[int, dict | None]:
        """(status, body) of a JSON operation. What may be repeated is sent again after a lost answer."""
        operation = self.operations[name]
        keyed = any(given.name == "Idempotency-Key" for given in operation.parameters)
        waits = REPEATS if operation.method == "GET" or keyed or name == "domain_find_caller" else ()
        for wait in (*waits, None):
            try:
                response = await self.open(name, call, **rest)
                data = await read_whole(response)
                return response.status, json.loads(data) if data else None
            except Problem as problem:
                if problem.code != "domain_unavailable" or wait is None:
                    raise
                await asyncio.sleep(wait)

    def background(self, work) -> asyncio.Task:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.forget)
        return task

    def forget(self, task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("in the background", exc_info=task.exception())


async def read_whole(response) -> bytes:
    try:
        async with response:
            return await response.read()
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        raise Problem("domain_unavailable", "the Domain went away in mid-answer: try again") from error


def problem_of(status: int, data: bytes) -> Problem:
    """The Domain's error, to be passed on as our own."""
    try:
        error = json.loads(data)["error"]
        more = {name: error[name] for name in ("field", "message_ids") if name in error}
        return Problem(error["code"], error["message"], **more)
    except (ValueError, KeyError, TypeError):
        return Problem("internal", f"the Domain answered {status} with something that is no error of ours")


def private_key(settings: Settings):
    """The Edge's Ed25519 key; at the first start both halves are made, the public one for the Domain to find."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    given = settings.edge_private_key
    path = pathlib.Path(given or settings.data / "edge_private_key.pem")
    if not given and not path.exists():
        pem = serialization.Encoding.PEM
        key = Ed25519PrivateKey.generate()
        plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        write_private(path, key.private_bytes(pem, *plain).decode())
    try:
        text = given.replace("\\n", "\n") if "-----BEGIN" in given else path.read_text()
        key = serialization.load_pem_private_key(text.encode(), None)
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"liminal: the Edge's private key cannot be read: {error}; see EDGE_PRIVATE_KEY") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SystemExit("liminal: the Edge's private key is not an Ed25519 key")
    public = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    text = key.public_key().public_bytes(*public).decode()
    known = settings.data / "edge_public_key.pem"
    if not settings.edge_public_key and (not known.exists() or known.read_text() != text):
        write_private(known, text)
    return key


################ Following a run
# One task for each running reply, whether or not a client listens: it brings the database bundles, too. When the Domain goes
# away it follows again, from where it was; clients notice a pause.


class Reply:
    """A running reply as the Edge knows it: the open bundles, and a window of closed ones as (start, end, events, bytes)."""

    def __init__(self, message_id: str, user_id: str, position: int, began: float | None = None):
        self.message_id, self.user_id, self.head, self.done = message_id, user_id, None, None
        self.position = self.begin = self.end = position  # what has come; where the window begins, and ends
        self.window, self.window_bytes = collections.deque(), 0
        self.open, self.open_bytes, self.timer = [], 0, None
        self.unstored, self.unstored_at, self.unstored_bytes = [], position, 0
        self.began, self.edge_ttft_ms, self.told_ttft = began, None, False
        self.heard_at, self.response, self.waiters = time.monotonic(), None, []

    def wake(self) -> None:
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def changed(self) -> asyncio.Future:
        self.waiters.append(asyncio.get_running_loop().create_future())
        return self.waiters[-1]

    def start(self, position: int) -> dict:
        return {**self.head, "position": position}

    def after(self, position: int) -> bytes:
        """What the window holds strictly after a position that lies in it, encoded."""
        found = []
        for start, end, events, data in reversed(self.window):
            if end <= position:
                break
            found.append(data if start >= position else encode_events(cut(events, position - start), position))
        return b"".join(reversed(found))


def encode_events(events: list[dict], position: int) -> bytes:
    made = []
    for event in events:
        position += size(event)
        made.append(sse(event, position))
    return b"".join(made)


async def read_events(edge: Edge, response) -> AsyncIterator[tuple[list[dict], int]]:
    """(events, bytes) of each read of a Domain's stream; an empty list for a ping."""
    tail = b""
    async for data in response.content.iter_any():
        *lines, tail = (tail + data).split(b"\n") if tail else data.split(b"\n")
        events = [json.loads(line) for line in lines if line]
        if edge.settings.check_events:
            for event in events:
                check_event(event)
        yield events, len(data)


LOST = (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError)


async def follow_run(edge: Edge, reply: Reply, response=None, reader=None) -> None:
    """Take in a reply's events until its `done`, over as many connections as it needs."""
    waits = backoff()
    while not reply.done:
        try:
            if response is None:
                await bring_bundles(edge, reply)
                response = await edge.open("domain_stream_message", message_id=reply.message_id, after=reply.position)
                reader = read_events(edge, response)
                edge.metrics.count("liminal_follows_total")
            reply.response = response
            async for events, weight in reader:
                reply.heard_at = time.monotonic()
                for event in events:
                    bundle(edge, reply, event, weight // len(events))
                waits = backoff()
        except LOST as error:
            log.info("the stream of %s broke off: %r", reply.message_id, error)
        except Problem as problem:
            if problem.code != "domain_unavailable":
                log.error("the reply %s cannot be followed: %s", reply.message_id, problem.message)
                end_reply(edge, reply, failed_end(reply, problem))
        finally:
            if response is not None:
                response.close()
            response = reply.response = None
        if not reply.done:
            await asyncio.sleep(next(waits))


async def bring_bundles(edge: Edge, reply: Reply) -> None:
    """Before following anew: where the Domain was killed, it has only what we bring, and its `done` must not fall short of
    what clients have seen."""
    enqueue(edge, reply, "end")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(edge.queue.brought(), DRAIN)


def failed_end(reply: Reply, problem: Problem) -> dict:
    rest = dict.fromkeys(("stop_reason", "usage", "timing"))
    return {"type": "done", "status": "error", "position": reply.position, **rest, "error": problem.detail(None)}


################ Bundling
# What one token costs decides how fast Liminal is: here it is two appends and two comparisons. The first token of a reply
# leaves at once, so that the time to the first token is not taxed by the timer.


def bundle(edge: Edge, reply: Reply, event: dict, weight: int) -> None:
    """Take one event of the Domain into the open bundle of the clients and into that of the database."""
    kind = event["type"]
    if kind == "start":
        reply.head = reply.head or event
        return reply.wake()
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
    events, tokens = joined(reply.open), len(reply.open)
    start, reply.end, data = reply.end, reply.position, encode_events(events, reply.end)
    reply.open, reply.open_bytes = [], 0
    reply.window.append((start, reply.end, events, data))
    reply.window_bytes += len(data)
    while reply.window_bytes > WINDOW_BYTES and len(reply.window) > 1:
        _, reply.begin, _, old = reply.window.popleft()
        reply.window_bytes -= len(old)
    edge.metrics.count("liminal_bundles_total", consumer="client", cause=cause)
    edge.metrics.observe("liminal_client_bundle_tokens", tokens)
    reply.wake()


def end_reply(edge: Edge, reply: Reply, done: dict) -> None:
    close_bundle(edge, reply, "end")
    enqueue(edge, reply, "end")
    if done["timing"]:
        known = done["timing"]["edge_ttft_ms"] or reply.edge_ttft_ms  # a replay keeps what was measured then
        done = {**done, "timing": {**done["timing"], "edge_ttft_ms": known}}
    reply.done = done
    edge.replies.pop(reply.message_id, None)
    reply.wake()


################ The queue
# Database bundles on their way to the Domain; nobody's stream ever waits for them. In memory while all is well; when that is
# full, or the Domain is away, in overflow.db, from where they are replayed by themselves before anything newer. Storing is
# idempotent by position, so a batch whose answer was lost is simply sent again.


@dataclasses.dataclass(slots=True)
class Waiting:
    """A bundle in the queue. `id` gives the order, over memory and overflow.db; `age` counts from `created_at` (epoch s)."""

    id: int
    bundle: dict
    bytes: int
    created_at: float
    tries: int = 0
    where: str = "queue"

    def row(self) -> dict:
        known = {"id": self.id, "bytes": self.bytes, "created_at": self.created_at, "tries": self.tries}
        return {**known, "message_id": self.bundle["message_id"], "bundle": encode_json(self.bundle)}


class Queue:
    """Bundles in their order. `take` gives the oldest batch; then either `settle` it or `keep` it."""

    def __init__(self, limit: int, overflow: Database, metrics: Metrics):
        self.limit, self.overflow, self.metrics = limit, overflow, metrics
        self.memory, self.taken, self.arrived, self.moved = asyncio.Queue(limit), [], asyncio.Event(), asyncio.Event()
        self.rows, self.newest = overflow.writer.execute(COUNT_OVERFLOW).fetchone()
        self.settled = 0 if self.rows else self.newest  # everything up to this id has been brought
        self.writing = 0  # bundles handed to overflow.db whose insert has not been answered

    def put(self, bundle: dict, weight: int) -> None:
        self.newest += 1
        item = Waiting(self.newest, bundle, weight, time.time())
        if self.rows or self.memory.full():
            self.spill([item])
        else:
            self.memory.put_nowait(item)
        self.arrived.set()

    def spill(self, items: list[Waiting]) -> None:
        """Send these, and whatever waits in memory, to overflow.db; where it refuses, too, they are left to the Domain."""
        while not self.memory.empty():
            items.append(self.memory.get_nowait())
        if self.writing + len(items) > self.limit + BATCH_COUNT:
            return self.leave(len(items))
        self.rows, self.writing = self.rows + len(items), self.writing + len(items)
        rows = [item.row() for item in items]
        self.overflow.write(insert_overflow, rows).add_done_callback(functools.partial(self.spilled, len(items)))

    def spilled(self, count: int, future: asyncio.Future) -> None:
        self.writing -= count
        if not future.cancelled() and (error := future.exception()):
            self.rows -= count
            self.leave(count)
            log.error("overflow.db takes nothing: %s", error)

    def leave(self, count: int) -> None:
        """The Domain holds the runs, and stores by itself what nobody brings."""
        self.metrics.count("liminal_left_to_domain_total", count)

    async def take(self) -> list[Waiting]:
        """The oldest batch: of overflow.db as long as anything waits there, else of memory, once something comes."""
        while not self.taken:
            if self.rows:
                found = await self.overflow.write(select_overflow, BATCH_COUNT)  # in the writer's order, behind every insert
                self.rows = self.rows if found else self.writing
                self.taken = first_bytes(list(map(stored_item, found)))
            elif not self.memory.empty():
                held = [self.memory.get_nowait() for _ in range(min(BATCH_COUNT, self.memory.qsize()))]
                self.taken = first_bytes(held)
                for item in held[len(self.taken) :]:
                    self.memory.put_nowait(item)
            else:
                self.arrived.clear()
                await self.arrived.wait()
        return self.taken

    async def settle(self) -> None:
        """The Domain has answered for the batch: only now is it forgotten."""
        taken = self.taken
        if taken[0].where == "overflow":
            await self.overflow.write(delete_overflow, taken[-1].id)
            self.rows -= len(taken)
            self.metrics.count("liminal_replayed_total", len(taken))
        self.taken, self.settled = [], taken[-1].id
        self.moved.set()

    async def keep(self) -> None:
        """The Domain is away: the batch stays, on disk from now on."""
        taken, self.taken = self.taken, []
        for item in taken:
            item.tries += 1
        if taken and taken[0].where == "overflow":
            await self.overflow.write(touch_overflow, taken[-1].id)
        elif taken:
            self.spill(taken)

    async def brought(self) -> None:
        """Wait until everything that is in the queue now has reached the Domain."""
        newest = self.newest
        while self.settled < newest:
            self.moved.clear()
            await self.moved.wait()

    async def waiting(self, limit: int) -> list[dict]:
        """What waits, oldest first."""
        stored = map(stored_item, await self.overflow.read(select_overflow, limit))
        held = [item for item in (*self.taken, *self.memory._queue) if item.where == "queue"]
        return [describe(item) for item in sorted((*stored, *held), key=lambda item: item.id)[:limit]]


def first_bytes(items: list[Waiting]) -> list[Waiting]:
    """The items up to BATCH_BYTES, at least one."""
    totals = itertools.accumulate(item.bytes for item in items)
    return [item for item, total in zip(items, totals) if total - item.bytes < BATCH_BYTES]


def stored_item(row) -> Waiting:
    return Waiting(row["id"], json.loads(row["bundle"]), row["bytes"], row["created_at"], row["tries"], "overflow")


def describe(item: Waiting) -> dict:
    age = {"age_s": round(max(0.0, time.time() - item.created_at), 3), "tries": item.tries, "bytes": item.bytes}
    return {"message_id": item.bundle["message_id"], "position": item.bundle["position"], "where": item.where, **age}


COUNT_OVERFLOW = "select count(*), coalesce(max(id), 0) from overflow"


def insert_overflow(db, rows: list[dict]) -> None:
    sql = """insert into overflow (id, message_id, bundle, bytes, created_at, tries)
             values (:id, :message_id, :bundle, :bytes, :created_at, :tries)"""
    db.executemany(sql, rows)


def select_overflow(db, limit: int) -> list:
    sql = "select id, bundle, bytes, created_at, tries from overflow order by id limit :limit"
    return db.execute(sql, {"limit": limit}).fetchall()


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
    """Bring the queue to the Domain, in order, a batch at a time; no answer, or any other than a good one, keeps it."""
    waits = backoff()
    while True:
        try:
            batch = await edge.queue.take()
            await edge.ask("domain_store_bundles", body={"bundles": [item.bundle for item in batch]})
            for item in batch:
                edge.metrics.observe("liminal_queue_wait_seconds", time.time() - item.created_at)
            await edge.queue.settle()
            waits = backoff()
            await asyncio.sleep(BATCH_PAUSE)
        except Problem as problem:
            if problem.code != "domain_unavailable":
                log.error("a batch of bundles has to wait: %s", problem.message)
            with contextlib.suppress(Problem):  # only the count of tries is lost
                await edge.queue.keep()
            await asyncio.sleep(next(waits))


async def tend(edge: Edge) -> None:
    """Twice a second, for all replies at once: close what the database has waited for, notice a Domain that has fallen
    silent, and wake clients for a ping."""
    for beat in itertools.count():
        await asyncio.sleep(DATABASE_SECONDS)
        for reply in list(edge.replies.values()):
            enqueue(edge, reply, "time")
            if reply.response and time.monotonic() - reply.heard_at > DEAF:
                reply.response.close()
            if not beat % 10:
                reply.wake()


################ Streaming and resume
# A client is only a position. Where the window holds what it needs next it is served from there, else from the Domain: so
# live, late, resumed and slow clients are one path, and none of them delays another.


class Client:
    """An open stream, so that it can be closed when its key is revoked."""

    def __init__(self, call: Call):
        self.user_id, self.key_id, self.transport = call.user_id, call.key_id, call.request.transport


async def stream_events(edge: Edge, call: Call, message_id: str, after: int, reply: Reply | None = None):
    """Answer with a reply's events strictly after a position, as SSE, until its `done`."""
    response, client = web.StreamResponse(headers=SSE_HEADERS), Client(call)
    edge.clients.add(client)
    try:
        await response.prepare(call.request)
        await response.write(RETRY)
        async with contextlib.aclosing(events_after(edge, call, message_id, after, reply)) as stream:
            async for data in stream:
                await response.write(data)
    except ConnectionError:
        pass  # the client has gone: it only detaches
    except Problem as problem:
        log.warning("a stream of %s ends: %s", message_id, problem.message)
    finally:
        edge.clients.discard(client)
    return response


async def events_after(edge: Edge, call: Call, message_id: str, position: int, reply: Reply | None) -> AsyncIterator[bytes]:
    """A reply's events strictly after a position, encoded, with a comment as ping through every silence."""
    begun = ended = False
    while not ended and not edge.closing:
        reply = edge.replies.get(message_id) or reply
        if reply is None or not reply.begin <= position <= reply.end:
            async with contextlib.aclosing(from_domain(edge, call, message_id, position, begun)) as replay:
                async for data, position, ended in replay:
                    yield data
            begun = True
            continue
        written = time.monotonic()
        while reply.begin <= position and not ended and not edge.closing:
            if not begun and reply.head:
                begun = True
                yield sse(reply.start(position))
            elif position < reply.end:
                data, position = reply.after(position), reply.end
                yield data
            elif reply.done:
                ended = True
                yield sse(reply.done, reply.done["position"])
            elif time.monotonic() - written >= PING:
                yield b": ping\n\n"
            else:
                await reply.changed()
                continue
            written = time.monotonic()


async def from_domain(edge: Edge, call: Call, message_id: str, position: int, begun: bool):
    """(encoded events, position behind them, whether that was `done`) straight from the Domain: until the end, or until the
    window of a running reply is reached. The Domain's backpressure is the client's own."""
    waits = backoff()
    while not edge.closing:
        response = None
        try:
            response = await edge.open("domain_stream_message", call, message_id=message_id, after=position)
            async for events, _ in read_events(edge, response):
                made = []
                for event in events:
                    if event["type"] == "start":
                        made += [] if begun else [sse(event)]
                        begun = True
                        continue
                    position = event["position"] if event["type"] == "done" else position + size(event)
                    made.append(sse(event, position))
                ended = bool(events) and events[-1]["type"] == "done"
                yield b"".join(made) if events else b": ping\n\n", position, ended
                reply = edge.replies.get(message_id)
                if ended or reply and reply.begin <= position <= reply.end:
                    return
        except LOST as error:
            log.info("a replay of %s broke off: %r", message_id, error)
        except Problem as problem:
            if problem.code != "domain_unavailable" or not begun:
                raise
        finally:
            if response is not None:
                response.close()
        await asyncio.sleep(next(waits))


################ Handlers: messages
# Bound by operationId. Most operations are the Domain's own behind another path, and are passed on.


async def forward(edge: Edge, call: Call):
    """Ask the Domain's operation of the same name, and give its answer as ours."""
    if call.arguments.get("Idempotency-Key") is None:
        call.arguments["Idempotency-Key"] = str(uuid.uuid4())
    return await edge.ask("domain_" + call.operation.id, call, body=call.body)


async def begin_reply(edge: Edge, call: Call) -> Reply:
    """Send the Domain what asks for a new reply, and follow it; after a lost answer send it again with the same key."""
    began, key = time.monotonic(), call.arguments["Idempotency-Key"] or str(uuid.uuid4())
    for wait in (*REPEATS, None):
        try:
            response = await edge.open("domain_" + call.operation.id, call, body=call.body, **{"Idempotency-Key": key})
            reader = read_events(edge, response)
            async for events, weight in reader:
                if events:
                    return take_up(edge, call, events, weight, response, reader, began)
            response.close()
        except LOST as error:
            log.info("an answer of the Domain was lost: %r", error)
        except Problem as problem:
            if problem.code != "domain_unavailable" or wait is None:
                raise
        if wait is not None:
            await asyncio.sleep(wait)
    raise Problem("domain_unavailable", "the Domain went away in mid-answer: send the same Idempotency-Key again")


def take_up(edge: Edge, call: Call, events: list[dict], weight: int, response, reader, began: float) -> Reply:
    """The reply that an opened stream begins; one that is followed already is not followed twice."""
    message_id = events[0]["message_id"]
    if known := edge.replies.get(message_id):
        response.close()
        return known
    reply = edge.replies[message_id] = Reply(message_id, call.user_id, 0, began)
    for event in events:
        bundle(edge, reply, event, weight // len(events))
    edge.background(follow_run(edge, reply, response, reader))
    return reply


async def send_message(edge: Edge, call: Call):
    streamed, background = call.body.pop("stream", True), call.body.pop("background", False)
    reply = await begin_reply(edge, call)
    if background:
        ids = {"thread_id": reply.head["thread_id"], "user_message_id": reply.head["user_message_id"]}
        return 202, {**ids, "message_ids": [reply.message_id]}
    if streamed:
        return await stream_events(edge, call, reply.message_id, 0, reply)
    while not reply.done:
        if edge.closing:
            raise Problem("domain_unavailable", "this server is stopping; the reply goes on: ask again for its message")
        await reply.changed()
    return await edge.ask("domain_get_message", call, message_id=reply.message_id)


async def retry_message(edge: Edge, call: Call):
    reply = await begin_reply(edge, call)
    return await stream_events(edge, call, reply.message_id, 0, reply)


async def stream_message(edge: Edge, call: Call):
    """Attach from a position. A running reply that nobody follows yet (the Edge is new) is followed from what is stored."""
    asked = call.arguments["Last-Event-ID"]
    after, ref = (call.arguments["after"] or 0) if asked is None else asked, call.arguments["message_id"]
    known = edge.replies.get(ref)
    if known is None or known.user_id != call.user_id or after > known.end:
        await attach_runs(edge, call.user_id)
        response = await edge.open("domain_stream_message", call, after=after)  # it judges id, owner and position
        try:
            async for events, _ in read_events(edge, response):
                if events:
                    ref = events[0]["message_id"]
                    break
        finally:
            response.close()
    if after:
        edge.metrics.count("liminal_resumes_total")
    return await stream_events(edge, call, ref, after)


async def attach_runs(edge: Edge, user_id: str | None = None) -> None:
    """Follow the running replies that are not followed yet, from what is stored of them."""
    _, found = await edge.ask("domain_list_runs", user_id=user_id)
    for run in found["runs"]:
        if run["message_id"] not in edge.replies:
            reply = edge.replies[run["message_id"]] = Reply(run["message_id"], run["user_id"], run["stored"])
            edge.background(follow_run(edge, reply))


async def cancel_message(edge: Edge, call: Call):
    answer = await forward(edge, call)
    edge.metrics.count("liminal_cancellations_total")
    return answer


################ Who may come in
# The Domain knows keys and sessions by their hash; its word is believed for a minute, and forgotten at once on revoking.


async def authenticate(edge: Edge, call: Call) -> None:
    """Fill in the caller from the Authorization header or the cookie, and judge the role that the operation needs."""
    needed = call.operation.security
    scheme, _, secret = call.request.headers.get("Authorization", "").partition(" ")
    given = "key" if scheme.lower() == "bearer" and secret else "session"
    secret = secret.strip() if given == "key" else call.request.cookies.get("session", "")
    if not secret or given not in needed or secret.startswith("lt_sk_") != (given == "key"):
        words = "send the cookie of a session" if "key" not in needed else "send the header `Authorization: Bearer lt_sk_...`"
        raise Problem("unauthorized", f"{words}; the owner's key is in data/cli.key")
    caller = await find_caller(edge, call, hash_of(secret))
    call.user, call.user_id, call.key_id = caller["user"], caller["user"]["id"], caller["key_id"]
    if "owner" in needed[given] and call.user["role"] != "owner":
        raise Problem("forbidden", "only an owner may do this")


async def find_caller(edge: Edge, call: Call, hash: str) -> dict:
    caller, until = edge.callers.get(hash, (None, 0))
    if until < time.monotonic():
        _, caller = await edge.ask("domain_find_caller", body={"hash": hash})
        if len(edge.callers) > 10_000:
            edge.callers.clear()
        edge.callers[hash] = caller, time.monotonic() + CALLER_FRESH
    return caller


def hash_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def shut_out(edge: Edge, key_id: str | None = None, user_id: str | None = None) -> None:
    """Forget what is known of a key or a user, and close their streams; their runs go on."""
    known = {hash: one for hash, one in edge.callers.items() if not (one[0]["key_id"] == key_id or one[0]["user"]["id"] == user_id)}
    edge.callers = known
    for client in list(edge.clients):
        if (client.key_id == key_id or client.user_id == user_id) and client.transport:
            client.transport.abort()


async def revoke_key(edge: Edge, call: Call):
    status, key = await forward(edge, call)
    shut_out(edge, key_id=key["id"])
    return status, key


async def delete_user(edge: Edge, call: Call):
    status, user = await forward(edge, call)
    shut_out(edge, user_id=user["id"])
    return status, user


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


async def list_overflow(edge: Edge, call: Call):
    found = await edge.queue.waiting(call.arguments["limit"])
    left = edge.metrics.value("liminal_left_to_domain_total")
    return {"waiting": found, "queue": edge.queue.memory.qsize(), "overflow": edge.queue.rows, "left_to_domain": int(left)}


async def get_stats(edge: Edge, call: Call):
    """Both servers' figures, as people ask for them."""
    _, known = await edge.ask("domain_get_stats", call)
    causes = {who: edge.metrics.by_label("liminal_bundles_total", "cause", consumer=who) for who in ("client", "database")}
    zero = dict.fromkeys(("first", "size", "time", "end"), 0)
    sizes = {f"{who}_tokens": edge.metrics.quantiles(f"liminal_{who}_bundle_tokens") for who in causes}
    counts = {name: int(edge.metrics.value(f"liminal_{name}_total")) for name in ("replayed", "left_to_domain")}
    waits = edge.metrics.quantiles("liminal_queue_wait_seconds", 1000)
    queue = {"waiting": edge.queue.memory.qsize(), "overflow": edge.queue.rows, **counts, "wait_ms": waits}
    ttft = {"provider": known.pop("provider_ttft_ms"), "domain": known.pop("domain_ttft_ms")}
    ttft["edge"] = edge.metrics.quantiles("liminal_edge_ttft_seconds", 1000)
    own = {name: int(edge.metrics.value(f"liminal_{name}_total")) for name in ("resumes", "cancellations")}
    bundles = {**{who: zero | found for who, found in causes.items()}, **sizes}
    return {"ttft_ms": ttft, "bundles": bundles, "queue": queue, "clients": len(edge.clients), **own, **known}


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
    "liminal_cancellations_total": ("replies cancelled", None),
    "liminal_errors_total": ("requests refused, by code", None),
    "liminal_edge_ttft_seconds": ("from a client's request to the first token", SECONDS),
    "liminal_client_bundle_tokens": ("tokens in a client's bundle", TOKENS),
    "liminal_database_bundle_tokens": ("tokens in a database bundle", TOKENS),
    "liminal_queue_wait_seconds": ("from a bundle's closing to the Domain's answer", SECONDS),
}
FORWARDED = """get_message add_reaction remove_reaction create_thread list_threads get_thread update_thread delete_thread
    list_messages fork_thread search_messages list_runs list_tools list_models list_providers put_provider delete_provider create_user list_users create_key
    list_keys""".split()
OWN = (send_message, retry_message, stream_message, cancel_message, revoke_key, delete_user, create_session, delete_session)


async def make_app(settings: Settings) -> web.Application:
    edge = Edge(settings)
    own = {fn.__name__: fn for fn in (*OWN, list_overflow, get_stats, get_status, health, metrics)} | {"contract": contract_document}
    handlers = {name: functools.partial(fn, edge) for name, fn in (own | dict.fromkeys(FORWARDED, forward)).items()}
    app = make_application("edge", handlers, functools.partial(authenticate, edge), settings, edge.metrics)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
    edge.http = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
    for work in (drain, tend, attach_at_start):
        edge.background(work(edge))
    app.on_shutdown.append(lambda app: shut_down(edge))
    app.on_cleanup.append(lambda app: close(edge))
    return app


async def attach_at_start(edge: Edge) -> None:
    """Replies that ran while no Edge was there are followed again."""
    for wait in backoff():
        try:
            return await attach_runs(edge)
        except Problem:
            await asyncio.sleep(wait)


async def shut_down(edge: Edge) -> None:
    """SIGTERM: streams end without `done`, which tells clients to reconnect; what the database waits for is brought there."""
    edge.closing = True
    for reply in list(edge.replies.values()):
        enqueue(edge, reply, "end")
        reply.wake()
    end = time.monotonic() + DRAIN
    while time.monotonic() < end and (edge.queue.memory.qsize() or edge.queue.taken and not edge.queue.rows):
        await asyncio.sleep(0.02)


async def close(edge: Edge) -> None:
    for task in list(edge.tasks):
        task.cancel()
    await asyncio.gather(*edge.tasks, return_exceptions=True)
    edge.queue.spill([item for item in edge.queue.taken if item.where == "queue"])
    edge.queue.overflow.close()
    await edge.http.close()


if __name__ == "__main__":
    serve("edge", make_app)
