"""Bundles on their way to disk: the Edge's queue in both its forms, overflow.db, replay, and what the Domain takes.

The behaviour suite runs the queue itself (`liminal_edge.Queue` over a real overflow.db) in three forms: all in memory,
all in overflow.db, and half in each. What follows it looks at running servers from outside.
"""

import asyncio
import json
import resource
import signal
import sqlite3
import time
import uuid
from contextlib import closing, contextmanager

import httpx2
import jwt
import pytest
from conftest import Liminal, status, text, with_provider
from prometheus_client.parser import text_string_to_metric_families

from liminal import Database, Metrics
from liminal_edge import BATCH_BYTES, BATCH_COUNT, METRICS, Queue
from provider import Provider

MESSAGE = "11111111-1111-4111-8111-111111111111"
FORMS = {"memory": 1000, "overflow": 1, "both": 5}


def numbered(n, start=0):
    return "".join(f" t{i}" for i in range(start, n))


def eventually(look, seconds=20):
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
    return found


################ One behaviour, in memory and in overflow.db


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def play(request, tmp_path):
    """play(scenario): what `await scenario(queue)` returns; called again, a new queue over the same file."""

    def play(scenario, large=False):
        async def main():
            limit = 5 * BATCH_COUNT if large and request.param == FORMS["memory"] else request.param
            database = Database(tmp_path / "overflow.db")
            try:
                return await asyncio.wait_for(scenario(Queue(limit, database, Metrics(METRICS))), 20)
            finally:
                database.close()

        return asyncio.run(main())

    return play


def put(queue, start, end, weight=10):
    for position in range(start, end):
        queue.put({"message_id": MESSAGE, "position": position, "parts": [{"type": "text", "text": "x"}]}, weight)


async def put_many(queue, count, weight=10):
    """Put so many bundles no faster than overflow.db takes them."""
    for start in range(0, count, 500):
        put(queue, start, start + 500, weight)
        while queue.writing:
            await asyncio.sleep(0.001)


def places(batch: list[dict]) -> list[int]:
    return [item["bundle"]["position"] for item in batch]


async def bring(queue, count) -> list[list[int]]:
    """Take and settle batches until so many bundles have been brought."""
    batches = []
    while sum(map(len, batches)) < count:
        batches.append(places(await queue.take()))
        await queue.settle()
    return batches


async def brought(queue, count) -> list[int]:
    return sum(await bring(queue, count), [])


def test_order_is_kept(play):
    async def scenario(queue):
        put(queue, 0, 50)
        return await brought(queue, 50)

    assert play(scenario) == list(range(50))


def test_order_is_kept_while_more_arrives_between_batches(play):
    async def scenario(queue):
        seen = []
        for start in range(0, 60, 6):
            put(queue, start, start + 6)
            seen += places(await queue.take())
            await queue.settle()
        return seen + (await brought(queue, 60 - len(seen)) if len(seen) < 60 else [])

    assert play(scenario) == list(range(60))


def test_order_is_kept_where_a_batch_is_kept_while_more_arrives(play):
    async def scenario(queue):
        put(queue, 0, 8)
        await queue.take()
        put(queue, 8, 16)
        await queue.keep()
        put(queue, 16, 24)
        return await brought(queue, 24)

    assert play(scenario) == list(range(24))


def test_kept_batch_comes_again_first(play):
    async def scenario(queue):
        put(queue, 0, 4)
        first = places(await queue.take())
        await queue.keep()
        return first, places(await queue.take())[: len(first)]

    first, again = play(scenario)
    assert first == again and first[0] == 0


def test_tries_are_counted(play):
    async def scenario(queue):
        put(queue, 0, 3)
        for _ in range(4):
            await queue.take()
            await queue.keep()
        return [(one["position"], one["tries"]) for one in await queue.waiting(10)]

    assert play(scenario)[0] == (0, 4)


def test_batch_has_at_most_its_count(play):
    async def scenario(queue):
        await put_many(queue, BATCH_COUNT + 500)
        return await bring(queue, BATCH_COUNT + 500)

    batches = play(scenario, large=True)
    assert max(map(len, batches)) <= BATCH_COUNT and sum(batches, []) == list(range(BATCH_COUNT + 500))


def test_batch_has_at_most_its_bytes(play):
    async def scenario(queue):
        put(queue, 0, 40, weight=100_000)
        return await bring(queue, 40)

    batches = play(scenario)
    assert max(map(len, batches)) * 100_000 <= BATCH_BYTES + 100_000 and sum(batches, []) == list(range(40))


def test_order_is_kept_in_a_large_memory_where_bytes_close_the_batches(play):
    async def scenario(queue):
        await put_many(queue, 2 * BATCH_COUNT, weight=1_000)
        return await brought(queue, 2 * BATCH_COUNT)

    assert play(scenario, large=True) == list(range(2 * BATCH_COUNT))


def test_bundle_over_the_bytes_of_a_batch_goes_alone(play):
    async def scenario(queue):
        put(queue, 0, 3, weight=2 * BATCH_BYTES)
        return await bring(queue, 3)

    assert play(scenario) == [[0], [1], [2]]


def test_restart_on_the_same_file_gives_the_same_order(play):
    async def stop(queue):
        put(queue, 0, 10)
        await queue.take()
        queue.spill([item for item in queue.taken if item["where"] == "queue"])

    async def start(queue):
        put(queue, 10, 20)
        return await brought(queue, 20)

    play(stop)
    assert play(start) == list(range(20))


def test_nothing_is_forgotten_before_it_is_settled(play):
    async def scenario(queue):
        put(queue, 0, 6)
        await queue.take()
        before = [one["position"] for one in await queue.waiting(10)]
        await brought(queue, 6)
        return before, await queue.waiting(10), queue.rows

    assert play(scenario) == (list(range(6)), [], 0)


def test_what_waits_is_listed_in_order_with_its_age(play):
    async def scenario(queue):
        put(queue, 0, 7)
        while queue.writing:
            await asyncio.sleep(0.001)
        found = await queue.waiting(5)
        return [one["position"] for one in found], [one["age_s"] for one in found]

    order, ages = play(scenario)
    assert order == [0, 1, 2, 3, 4] and sorted(ages, reverse=True) == ages and ages[0] < 20


def test_take_waits_for_something_to_come(play):
    async def scenario(queue):
        taking = asyncio.ensure_future(queue.take())
        await asyncio.sleep(0)
        waited = not taking.done()
        put(queue, 0, 1)
        return waited, places(await taking)

    assert play(scenario) == (True, [0])


def test_brought_waits_for_what_is_there_now_and_for_nothing_newer(play):
    async def scenario(queue):
        put(queue, 0, 6)
        waiting = asyncio.ensure_future(queue.brought())
        await asyncio.sleep(0)
        put(queue, 6, 7)
        before = waiting.done()
        while not waiting.done():
            last = places(await queue.take())[-1]
            await queue.settle()
            await asyncio.sleep(0)
        return before, last >= 5

    assert play(scenario) == (False, True)


def test_brought_does_not_wait_where_nothing_is_there(play):
    async def scenario(queue):
        put(queue, 0, 6)
        await brought(queue, 6)
        await asyncio.wait_for(queue.brought(), 5)

    play(scenario)
    play(lambda queue: asyncio.wait_for(queue.brought(), 5))


def test_replayed_counts_what_came_from_disk_only(play):
    async def scenario(queue):
        put(queue, 0, 20)
        held = queue.memory.qsize()
        await brought(queue, 20)
        return held + queue.metrics.value("liminal_replayed_total")

    assert play(scenario) == 20


################ A disk that takes nothing


@contextmanager
def full_disk():
    """No file of this process may grow past its first byte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


async def refused(queue, start, end):
    """Put bundles that overflow.db refuses; it has said so when this returns."""
    with full_disk():
        put(queue, start, end)
        while queue.writing:
            await asyncio.sleep(0.001)


@pytest.fixture
def small(tmp_path):
    """As `play`, a queue of one bundle: any second one goes to disk."""

    def play(scenario):
        async def main():
            with closing(Database(tmp_path / "overflow.db")) as database:
                return await asyncio.wait_for(scenario(Queue(1, database, Metrics(METRICS))), 20)

        return asyncio.run(main())

    return play


def left(queue) -> int:
    return queue.metrics.value("liminal_left_to_domain_total")


def test_what_overflow_refuses_is_left_to_the_domain_and_counted(small):
    async def scenario(queue):
        await refused(queue, 0, 7)
        return left(queue) + queue.memory.qsize(), left(queue) >= 6, queue.rows

    assert small(scenario) == (7, True, 0)


def test_queue_goes_on_when_there_is_room_again(small):
    async def scenario(queue):
        await refused(queue, 0, 6)
        put(queue, 6, 12)
        return await brought(queue, 12 - left(queue))

    assert small(scenario)[-6:] == list(range(6, 12))


def test_rows_on_disk_stay_where_newer_ones_are_refused(small):
    async def scenario(queue):
        put(queue, 0, 5)
        await queue.overflow.read(lambda db: None)
        while queue.writing:
            await asyncio.sleep(0.001)
        await refused(queue, 5, 9)
        return left(queue), await brought(queue, 5)

    assert small(scenario) == (4, [0, 1, 2, 3, 4])


def test_brought_does_not_wait_for_what_was_left(small):
    async def scenario(queue):
        await refused(queue, 0, 6)
        await brought(queue, queue.memory.qsize())
        await asyncio.wait_for(queue.brought(), 2)

    small(scenario)


################ What the Domain takes


def token(liminal) -> str:
    """A service token of the Edge's, signed with this installation's key."""
    begun = int(time.time())
    claims = {"iss": "liminal-edge", "sub": "edge-service", "aud": "liminal-domain", "iat": begun, "exp": begun + 60}
    claims |= {"jti": str(uuid.uuid4()), "scopes": ["write:bundles"]}
    return jwt.encode(claims, (liminal.data / "edge_private_key.pem").read_text(), algorithm="EdDSA")


def store(liminal, *bundles) -> dict:
    """The Domain's answer to a batch of (message_id, position, text)."""
    rows = [{"message_id": i, "position": p, "parts": [{"type": "text", "text": said}]} for i, p, said in bundles]
    headers = {"authorization": f"Bearer {token(liminal)}"}
    answer = httpx2.post(f"{liminal.domain}/domain/bundles", json={"bundles": rows}, headers=headers, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()["messages"]


def get(liminal, message_id) -> dict:
    return status(liminal.api("GET", f"/api/v1/messages/{message_id}"), 200)


def rows_of(liminal, message_id) -> list[tuple]:
    return liminal.sql("messages.db", "select position, parts from chunks where message_id = ? order by 1", message_id)


def test_bundle_of_a_message_that_does_not_exist_is_gone(shared):
    assert store(shared, (MESSAGE, 0, "x")) == {MESSAGE: "gone"}
    assert shared.sql("messages.db", "select count(*) from messages where id = ?", MESSAGE) == [(0,)]


@pytest.mark.parametrize("position", [0, 30, 31])
def test_finished_reply_is_never_lengthened(shared, position):
    message_id = shared.send("x", model="openai/say-10-0")[0].data["message_id"]
    assert store(shared, (message_id, position, "y" * 60)) == {message_id: 30}
    assert get(shared, message_id)["content"] == numbered(10)


def test_bundle_above_what_is_stored_is_filled_up_from_the_run(shared):
    with shared.stream({"content": "x", "model": "openai/gate-20-10"}) as stream:
        events = iter(stream)
        message_id = next(events).data["message_id"]
        next(one for one in events if one.id == "30")
        assert store(shared, (message_id, 27, " t9")) == {message_id: 30}
        [*_, last] = rows_of(shared, message_id)
        shared.provider.open_gate()
        assert last[0] == 30 and [one.type for one in events][-1] == "done"
    assert get(shared, message_id)["content"] == numbered(20)


def test_member_may_not_see_what_waits(shared):
    user = status(shared.api("POST", "/api/v1/users", {"name": f"member {uuid.uuid4()}"}), 201)
    key = status(shared.api("POST", "/api/v1/keys", {"name": "k", "user_id": user["id"]}), 201)
    status(shared.api("GET", "/api/v1/overflow", key=key["secret"]), 403, "forbidden")


def test_queue_is_empty_while_all_is_well(shared):
    shared.send("x", model="openai/say-200-0")
    answer = eventually(
        lambda: (found := status(shared.api("GET", "/api/v1/overflow"), 200))["waiting"] == [] and found
    )
    assert (answer["queue"], answer["overflow"], answer["left_to_domain"]) == (0, 0, 0)


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    """(an installation whose Domain was killed in mid-reply, the ids of its interrupted replies, each of 10 tokens)."""
    with closing(Provider()) as provider:
        data = tmp_path_factory.mktemp("cut_off") / "data"
        with closing(Liminal(data, provider, **with_provider(provider, {}))) as liminal:
            ids = [background(liminal.start() if not n else liminal, "openai/gate-20-10") for n in range(8)]
            sql = "select count(*) from messages where position = 30"
            eventually(lambda: liminal.sql("messages.db", sql) == [(8,)])
            liminal.restart("domain", sig=signal.SIGKILL)
            yield liminal, ids
            liminal.check_logs()


def background(liminal, model) -> str:
    body = {"content": "x", "model": model, "background": True}
    return status(liminal.api("POST", "/api/v1/messages", body), 202)["message_ids"][0]


@pytest.mark.slow
def test_interrupted_reply_grows_by_what_the_edge_brings_later(cut_off):
    liminal, ids = cut_off
    message_id = ids.pop()
    assert store(liminal, (message_id, 30, " more"), (message_id, 35, " still")) == {message_id: 41}
    message = get(liminal, message_id)
    assert (message["content"], message["position"]) == (numbered(10) + " more still", 41)
    assert (message["status"], message["error"]["code"]) == ("error", "interrupted")


@pytest.mark.slow
def test_overlap_is_cut_off(cut_off):
    liminal, ids = cut_off
    message_id = ids.pop()
    assert store(liminal, (message_id, 24, " t8 t9 t10")) == {message_id: 34}
    assert get(liminal, message_id)["content"] == numbered(11)


@pytest.mark.slow
def test_bundle_that_would_leave_a_hole_is_refused_and_settled(cut_off):
    liminal, ids = cut_off
    message_id = ids.pop()
    assert store(liminal, (message_id, 31, "t10")) == {message_id: 30}
    assert get(liminal, message_id)["content"] == numbered(10)


@pytest.mark.slow
def test_refused_bundle_takes_no_other_with_it(cut_off):
    liminal, ids = cut_off
    one, other = ids.pop(), ids.pop()
    assert store(liminal, (one, 99, "x"), (MESSAGE, 0, "x"), (other, 30, "y")) == {one: 30, MESSAGE: "gone", other: 31}


@pytest.mark.slow
def test_same_batch_twice_changes_nothing(cut_off):
    liminal, ids = cut_off
    message_id = ids.pop()
    batch = [(message_id, 30, " a"), (message_id, 32, " b")]
    assert store(liminal, *batch) == {message_id: 34}
    before = rows_of(liminal, message_id), get(liminal, message_id)
    assert store(liminal, *batch) == {message_id: 34}
    assert before == (rows_of(liminal, message_id), get(liminal, message_id))


@pytest.mark.slow
def test_positions_of_what_is_brought_count_code_points(cut_off):
    liminal, ids = cut_off
    message_id = ids.pop()
    assert store(liminal, (message_id, 30, "👍🏽e\u0301"), (message_id, 31, "🏽e\u0301漢")) == {message_id: 35}
    assert get(liminal, message_id)["content"] == numbered(10) + "👍🏽e\u0301漢"


@pytest.mark.slow
def test_brought_text_of_an_interrupted_reply_is_found_by_search(cut_off):
    liminal, ids = cut_off
    message_id = ids.pop()
    store(liminal, (message_id, 30, " zanzibar"))
    found = status(liminal.api("GET", "/api/v1/search?q=zanzibar"), 200)["results"]
    assert [one["message_id"] for one in found] == [message_id]


################ The Domain away, the Edge killed: over real processes


@pytest.fixture
def piled(make_liminal):
    """(an installation whose Domain was killed under running replies, the replies' ids, what waits in the Edge)."""
    liminal = make_liminal(LIMINAL_QUEUE_SIZE="2").start()
    ids = [background(liminal, "openai/say-4000-400") for _ in range(6)]
    sql = "select count(*) from messages where position > 100"
    eventually(lambda: liminal.sql("messages.db", sql) == [(6,)])
    liminal.kill("domain")
    return liminal, ids, eventually(lambda: tried(liminal))


def tried(liminal) -> list[dict] | bool:
    """What waits, once all of it is in overflow.db and a try to bring it has failed."""
    found = status(liminal.api("GET", "/api/v1/overflow"), 200)["waiting"]
    return len(found) > 2 and all(one["where"] == "overflow" for one in found) and found[0]["tries"] > 1 and found


def metric(liminal, name) -> float:
    text = liminal.client.get("/metrics").text
    return sum(
        one.value for family in text_string_to_metric_families(text) for one in family.samples if one.name == name
    )


def bundles_in(liminal) -> list[tuple]:
    """(message_id, position, end) of each row of overflow.db."""
    rows = [json.loads(row[0]) for row in liminal.sql("overflow.db", "select bundle from overflow order by id")]
    ends = [row["position"] + sum(len(part["text"]) for part in row["parts"]) for row in rows]
    return [(row["message_id"], row["position"], end) for row, end in zip(rows, ends)]


def empty(liminal) -> bool:
    return liminal.sql("overflow.db", "select count(*) from overflow") == [(0,)]


def assert_replayed(liminal, rows):
    """Every bundle that waited is stored, each reply a whole prefix and `interrupted`, and no row is left."""
    eventually(lambda: empty(liminal))
    for message_id in {row[0] for row in rows}:
        message = get(liminal, message_id)
        assert message["position"] == max(end for one, _, end in rows if one == message_id) == len(message["content"])
        assert numbered(4000).startswith(message["content"]) and message["error"]["code"] == "interrupted"


@pytest.mark.slow
def test_overflow_lists_what_waits_in_order_and_so_does_the_command(piled):
    liminal, ids, waiting = piled
    rows = bundles_in(liminal)
    assert [(one["message_id"], one["position"]) for one in waiting] == [row[:2] for row in rows]
    assert {one["message_id"] for one in waiting} <= set(ids)
    ages = [one["age_s"] for one in waiting]
    assert ages == sorted(ages, reverse=True) and all(one["bytes"] > 0 for one in waiting)
    shown = json.loads(liminal.cli("overflow", "--json").stdout)["waiting"]
    assert [(one["message_id"], one["position"]) for one in shown] == [
        (one["message_id"], one["position"]) for one in waiting
    ]
    assert shown[0]["tries"] >= waiting[0]["tries"] and waiting[0]["message_id"][:8] in liminal.cli("overflow").stdout


@pytest.mark.slow
def test_restarted_domain_and_its_clients_get_everything_and_rows_are_gone(piled):
    liminal, _, waiting = piled
    rows, before = bundles_in(liminal), metric(liminal, "liminal_replayed_total")
    liminal.start("domain")
    for message_id in {row[0] for row in rows}:
        events = liminal.attach(message_id)
        assert events[-1].data["position"] == max(end for one, _, end in rows if one == message_id) == len(text(events))
    assert_replayed(liminal, rows)
    eventually(lambda: metric(liminal, "liminal_overflow_bundles") == 0)
    assert metric(liminal, "liminal_replayed_total") == before + len(rows)
    assert metric(liminal, "liminal_left_to_domain_total") == 0


@pytest.mark.slow
def test_edge_killed_over_its_overflow_replays_it_when_it_is_back(piled):
    liminal, _, waiting = piled
    rows = bundles_in(liminal)
    liminal.kill("edge")
    liminal.start("edge")
    assert len(bundles_in(liminal)) == len(rows)
    liminal.start("domain")
    assert_replayed(liminal, rows)


@pytest.mark.slow
def test_edge_stopped_over_its_overflow_keeps_it_and_ends_in_time(piled):
    liminal, _, waiting = piled
    rows = bundles_in(liminal)
    assert liminal.stop("edge", timeout=10) == 0 and bundles_in(liminal) == rows
    liminal.start()
    assert_replayed(liminal, rows)


@pytest.mark.slow
def test_bundles_of_deleted_threads_are_settled(piled):
    liminal, ids, waiting = piled
    with closing(sqlite3.connect(liminal.data / "liminal.db")) as db:
        db.execute("delete from threads")
        db.commit()
    liminal.start("domain")
    eventually(lambda: empty(liminal))
    eventually(lambda: liminal.sql("messages.db", "select count(*) from messages") == [(0,)])
    assert text(liminal.send("x", model="openai/say-10-0")) == numbered(10)
