"""Liminal's Domain: the process that knows.

Owns: liminal.db, messages.db, the providers, the prompts, and every reply while it is being generated.
Never: client bundles, SSE, cookies, terminals; it knows one client, the Edge, and trusts what its JWT says.

A token's way through this file: read_provider -> run -> record -> stream_run, and back from the Edge: store_bundles.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import contextvars
import dataclasses
import email.utils
import errno
import fnmatch
import functools
import hashlib
import importlib
import itertools
import json
import logging
import os
import pathlib
import random
import re
import secrets
import signal
import sqlite3
import stat
import sys
import time
import urllib.parse
import uuid
import weakref
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from liminal import Call, Database, Decoder, Metrics, Problem, Settings, check_database, check_event, cut, encode_json
from liminal import joined, make_application, now, parse_json, serve, size, stamp, version, write_private

PING = 15  # seconds of silence after which the Edge gets an empty line
LAG = 1.4  # seconds after which a running reply is stored though the Edge brings nothing: 2 with the tick and commit
RECENT = 256  # tokens of a run that are kept one by one; older ones are joined, so that a run is no object per token
PAGE = 16  # pieces handed to a follower at once, so that a replay goes out in bounded writes
CHUNK = 16_384  # code points of text in one stored row or event, at most 64 KiB
INDEXED = 16 * CHUNK  # code points of a message that search sees: one of 8 MB would hold the writer for 4 s
ATTEMPTS = 4  # calls to an overloaded provider before its error stands; only ever before the first token
LONGEST_WAIT = 30.0  # seconds between two such calls, whatever the provider asks for
CONNECT = 10.0  # seconds to connect to a provider
MODELS_FRESH = 60.0  # seconds for which a provider's own list of models is believed
ARGUMENTS, ARGUMENT_DEPTH = 1_000_000, 100  # characters and depth of a tool call's arguments
TITLE = 60  # characters of a first message that make the title of its thread
BYTES_PER_TOKEN = 3  # the design's estimate, on the safe side for most languages
ANTHROPIC_MODEL, ANTHROPIC_MAX_TOKENS = "claude-sonnet-5-5", 16_000
OPENAI_MODEL = "gpt-5.5"  # max_tokens is left to the provider
DEMO_MODELS = ["guide", "load-200-50"]
JSON_COLUMNS = {"models", "prices", "parts", "usage", "timing", "error"}
NO_TIMING = dict.fromkeys(("provider_ttft_ms", "domain_ttft_ms", "edge_ttft_ms", "total_ms", "tokens_per_s"))
COUNTS = ("input_tokens", "cached_tokens", "output_tokens")
KEY_USED = "this Idempotency-Key was used with another body: take a new one"
OUR_ERROR = "an error of our own; the Domain's log tells more"
log = logging.getLogger("liminal.domain")


################ Statements on liminal.db: users, keys, sessions, threads, providers
# A statement is a small synchronous function of a connection and its values by name; none touches both databases.
# Most are only their SQL: a `query` gives rows, a `change` the number of rows it changed, a `finder` the one row meant.


def decoded(row) -> dict:
    """A row as a dict, what its columns hold as JSON read."""
    return {name: json.loads(row[name]) if row[name] and name in JSON_COLUMNS else row[name] for name in row.keys()}


def query(sql: str, shape=decoded):
    return lambda db, values=(): [shape(row) for row in db.execute(sql, values)]


def change(sql: str):
    return lambda db, values: db.execute(sql, values).rowcount


def finder(what: str, sql: str, shape=decoded):
    """The one row that an id or its prefix means; the same 404 for what is another's and what does not exist."""

    def find(db, values: dict) -> dict:
        rows, ref = query(sql, shape)(db, values), values[f"{what}_id"]
        if not rows or len(ref) < 4:
            raise Problem("not_found", f"there is no {what} {ref[:64]!r}")
        if len(rows) > 1:
            raise Problem("invalid_request", f"{ref!r} means more than one {what}: give more characters")
        return rows[0]

    return find


def pick(row, *names) -> dict:
    return {name: row[name] for name in names}


def thread_of(row) -> dict:
    forked = {"thread_id": row["forked_from_thread_id"], "message_id": row["forked_from_message_id"]}
    forked = forked if forked["thread_id"] else None
    return {**pick(row, "id", "title", "system", "model", "created_at", "updated_at"), "forked_from": forked}


select_users = query("select id, name, role from users order by created_at, id")
find_user = finder("user", "select id, name, role from users where id >= :user_id and id < :user_id || 'g' limit 2")
remove_user = change("delete from users where id = :id")
insert_key = change("insert into api_keys values (:id, :user_id, :name, :prefix, :hash, :created_at, :last_used_at)")
find_key = finder(
    "key",
    """select id, user_id, name, prefix, created_at, last_used_at from api_keys
       where id >= :key_id and id < :key_id || 'g' and (:owner_id is null or user_id = :owner_id) limit 2""",
)
touch_key = change("update api_keys set last_used_at = :time where id = :key_id")
remove_session = change("delete from sessions where hash = :hash")
insert_thread = change(  # `or ignore`: a repeated POST has the same derived id, and may find what its lost try has made
    """insert or ignore into threads values (:id, :user_id, :title, :system, :model, :forked_from_thread_id,
       :forked_from_message_id, :created_at, :updated_at)"""
)
find_thread = finder(
    "thread",
    "select * from threads where id >= :thread_id and id < :thread_id || 'g' and user_id = :user_id limit 2",
    thread_of,
)
touch_thread = change(
    "update threads set updated_at = max(updated_at, :time), title = coalesce(title, :title) where id = :id"
)
remove_thread = change("delete from threads where id = :id")
thread_ids = query("select id from threads where :user_id is null or user_id = :user_id order by id")
remove_provider = change("delete from providers where name = :name")
select_providers = query("select * from providers order by name")


def insert_user(db, user: dict) -> dict:
    try:
        db.execute("insert into users values (:id, :name, :role, :created_at)", user)
    except sqlite3.IntegrityError:
        raise Problem("conflict", f"there is a user {user['name']!r} already", field="name") from None
    return pick(user, "id", "name", "role")


def owner_of(db, values: dict) -> dict:
    """Whose keys the caller may see: their own, or everyone's (None) for an owner."""
    user = find_user(db, values)
    return {**values, "owner_id": None if user["role"] == "owner" else user["id"]}


def select_keys(db, values: dict) -> list[dict]:
    sql = """select id, user_id, name, prefix, created_at, last_used_at from api_keys
             where :owner_id is null or user_id = :owner_id order by created_at, id"""
    return query(sql)(db, owner_of(db, values))


def remove_key(db, values: dict) -> dict:
    """Delete a key (and, by the schema, its sessions); the last one of an owner stays, else nobody could come in."""
    key = find_key(db, owner_of(db, values))
    owners = query("select api_keys.id from api_keys join users on users.id = user_id where role = 'owner' limit 2")
    if owners(db) == [{"id": key["id"]}]:
        raise Problem("conflict", "this is the owner's last key: make another one first")
    db.execute("delete from api_keys where id = :id", key)
    return key


def find_caller(db, values: dict) -> dict:
    """Whose key or session this `hash` is: {"user", "key_id"}."""
    sql = """select api_keys.id as key_id, users.id, users.name, role from api_keys join users on users.id = user_id
             where hash = :hash or api_keys.id =
             (select key_id from sessions where hash = :hash and expires_at > :time)"""
    found = query(sql)(db, values)
    if not found:
        raise Problem("unauthorized", "this key is not known, or was revoked")
    return {"user": pick(found[0], "id", "name", "role"), "key_id": found[0]["key_id"]}


def insert_session(db, session: dict) -> None:
    db.execute("delete from sessions where expires_at <= :time", session)
    db.execute("insert into sessions values (:hash, :key_id, :time, :expires_at)", session)


def select_threads(db, values: dict) -> list[dict]:
    """Newest first; `before`: only those behind this thread in the list."""
    sql = """select * from threads where user_id = :user_id
             and (:id is null or updated_at < :updated_at or updated_at = :updated_at and id > :id)
             order by updated_at desc, id limit :limit"""
    none = {"id": None, "updated_at": None}
    edge = find_thread(db, {**values, "thread_id": values["before"]}) if values["before"] else none
    return query(sql, thread_of)(db, {**values, **edge})


def change_thread(db, values: dict) -> dict:
    thread = find_thread(db, values)
    thread |= {name: values[name] for name in ("title", "system", "model") if name in values}
    db.execute("update threads set title = :title, system = :system, model = :model where id = :id", thread)
    return thread


def replace_provider(db, provider: dict) -> None:
    sql = "insert or replace into providers values (:name, :kind, :base_url, :key_env, :models, :prices)"
    db.execute(sql, {**provider, "models": encode_json(provider["models"]), "prices": encode_json(provider["prices"])})


################ Statements on messages.db: messages, chunks, reactions, idempotency keys
# A message's text is never rewritten: each stored bundle is a row of its own, read together in the order of positions.

find_message = finder(  # user None is the Edge itself
    "message",
    """select * from messages where id >= :message_id and id < :message_id || 'g'
       and (:user_id is null or user_id = :user_id) limit 2""",
)
find_idempotency_key = query(
    "select request_hash, message_id from idempotency_keys where user_id = :user_id and key = :key"
)
remove_user_keys = change("delete from idempotency_keys where user_id = :id")
newest_finished = query(  # where a message hangs when it names no parent
    """select id from messages where thread_id = :thread_id and status in ('complete', 'cancelled', 'error')
       order by number desc limit 1"""
)
message_threads = query("select distinct thread_id from messages")
sum_models = query(  # tokens and cost of a user's replies by model
    """select model, count(*) as runs, sum(status = 'error') as errors,
       sum(coalesce(json_extract(usage, '$.input_tokens'), 0)) as input_tokens,
       sum(coalesce(json_extract(usage, '$.cached_tokens'), 0)) as cached_tokens,
       sum(coalesce(json_extract(usage, '$.output_tokens'), 0)) as output_tokens,
       sum(json_extract(usage, '$.cost')) as cost
       from messages where user_id = :user_id and role = 'assistant' group by model order by runs desc, model"""
)


def insert_exchange(db, messages: list[dict], parts: list[dict], key: dict) -> None:
    """A user's message (where it is new), its reply's row and the Idempotency-Key, in one transaction."""
    sql = """insert into messages (id, thread_id, user_id, number, parent_id, role, model, status, created_at,
             completed_at) select :id, :thread_id, :user_id, coalesce(max(number), 0) + 1, :parent_id, :role, :model,
             :status, :created_at, :completed_at from messages where thread_id = :thread_id"""
    for message in messages:
        db.execute(sql, message)
        if message["role"] == "user":
            append_parts(db, message["id"], 0, parts)
            index_text(db, message["id"])
    db.execute("insert into idempotency_keys values (:user_id, :key, :request_hash, :message_id, :created_at)", key)


def append_parts(db, message_id: str, position: int, parts: list[dict]) -> int:
    """Append the parts, which begin at `position`, to what is stored: the overlap is cut off, a hole is refused.
    Returns the position now stored."""
    row = db.execute("select position from messages where id = :id", {"id": message_id}).fetchone()
    stored = row["position"]
    new = cut(parts, stored - position) if position <= stored else []
    for piece in pieces_of(new, stored):
        stored = piece["position"]
        db.execute("insert into chunks values (:id, :position, :parts)", {"id": message_id, **piece})
    sql = "update messages set position = :stored, status = iif(status = 'pending', 'streaming', status) where id = :id"
    if new:
        db.execute(sql, {"id": message_id, "stored": stored})
    return stored


def pieces_of(parts: list[dict], position: int):
    """The parts as rows of chunks, each of a bounded size."""
    while parts:
        some = first_positions(parts, CHUNK)
        length = sum(map(size, some))
        parts, position = cut(parts, length), position + length
        yield {"position": position, "parts": encode_json(joined(some))}


def first_positions(events: list[dict], count: int) -> list[dict]:
    """The events up to their `count`-th position."""
    made = []
    for event in events:
        if count <= 0:
            break
        made.append({**event, "text": event["text"][:count]} if size(event) > count else event)
        count -= size(event)
    return made


def lengthen(db, bundles: list[dict]) -> dict:
    """Store a batch of bundles; {message_id: the position now stored, or "gone"}. Only a message that is still running
    or was interrupted grows: a finished one keeps what its end said."""
    stored, grown = {}, set()
    find = "select position, status, json_extract(error, '$.code') as code from messages where id = :message_id"
    first = """update messages set timing = json_insert(coalesce(timing, '{}'), '$.edge_ttft_ms', :edge_ttft_ms)
               where id = :message_id"""
    for bundle in bundles:
        message_id, row = bundle["message_id"], db.execute(find, bundle).fetchone()
        if row is None:
            stored[message_id] = "gone"
            continue
        stored[message_id], interrupted = row["position"], row["code"] == "interrupted"
        if interrupted or row["status"] in ("pending", "streaming"):
            stored[message_id] = append_parts(db, message_id, bundle["position"], bundle["parts"])
        if interrupted:
            grown.add(message_id)
        if "edge_ttft_ms" in bundle:
            db.execute(first, bundle)
    for message_id in grown:
        index_text(db, message_id)
    return stored


def finish_message(db, message_id: str, position: int, parts: list[dict], done: dict) -> None:
    """A reply's tail and its final status, in one transaction: whoever sees `done` finds it on disk."""
    append_parts(db, message_id, position, parts)
    sql = """update messages set status = :status, stop_reason = :stop_reason, usage = :usage, error = :error,
             timing = json_patch(coalesce(timing, '{}'), :timing), completed_at = :completed_at where id = :id"""
    columns = {name: done[name] and encode_json(done[name]) for name in ("usage", "timing", "error")}
    db.execute(sql, {"id": message_id, **done, **columns, "completed_at": now()})
    index_text(db, message_id)


def interrupt_unfinished(db, values: dict) -> int:
    """Nothing runs when the Domain starts: what still says so was cut off by its end."""
    sql = """update messages set status = 'error', error = :error, completed_at = :time
             where status in ('pending', 'streaming') returning id"""
    found = db.execute(sql, values).fetchall()
    for row in found:
        index_text(db, row["id"])
    return len(found)


def index_text(db, message_id: str) -> None:
    """Make a message's first INDEXED code points searchable, once more where it has grown."""
    seq = db.execute("select seq from messages where id = :id", {"id": message_id}).fetchone()["seq"]
    text = ""
    for row in db.execute("select parts from chunks where message_id = :id order by position", {"id": message_id}):
        text += text_of(json.loads(row["parts"]))
        if len(text) >= INDEXED:
            break
    db.execute("delete from message_texts where rowid = :seq", {"seq": seq})
    sql = "insert into message_texts (rowid, content) values (:seq, :content)"
    db.execute(sql, {"seq": seq, "content": text[:INDEXED]})


def text_of(parts: list[dict]) -> str:
    return "".join(part["text"] for part in parts if part["type"] == "text")


def search_texts(db, values: dict) -> list[dict]:
    """A user's messages that hold all the words, best first. Words are quoted, so that no input is a syntax error."""
    words = " ".join('"' + word.replace('"', '""') + '"' for word in values["q"].replace("\0", " ").split())
    sql = """select id as message_id, thread_id, role, created_at,
             snippet(message_texts, 0, char(2), char(3), ' … ', 24) as snippet
             from message_texts join messages on messages.seq = message_texts.rowid
             where message_texts match :words and user_id = :user_id order by rank limit :limit"""
    return query(sql)(db, {**values, "words": words}) if words else []


def read_message(db, values: dict) -> dict:
    return message_of(db, find_message(db, values), values["user_id"])


def message_of(db, row: dict, user_id: str) -> dict:
    """A message as the API gives it."""
    parts = read_parts(db, row["id"])
    shown = {name: row[name] for name in row if name not in ("seq", "user_id")}
    reactions = select_reactions(db, {"message_id": row["id"], "user_id": user_id})
    timing = row["timing"] and {**NO_TIMING, **row["timing"]}
    return {**shown, "content": text_of(parts), "parts": parts, "timing": timing, "reactions": reactions}


def read_chunks(db, message_id: str, after: int, limit: int) -> list[list[dict]]:
    """The parts of a message strictly after a position, as they were stored, from at most `limit` rows (-1: all)."""
    sql = """select position, parts from chunks where message_id = :id and position > :after
             order by position limit :limit"""
    pages = []
    for row in query(sql)(db, {"id": message_id, "after": after, "limit": limit}):
        begun = row["position"] - sum(map(size, row["parts"]))
        pages.append(cut(row["parts"], after - begun) if begun < after else row["parts"])
    return pages


def read_parts(db, message_id: str) -> list[dict]:
    return joined(list(itertools.chain(*read_chunks(db, message_id, 0, -1))))


def select_messages(db, values: dict) -> list[dict]:
    sql = """select * from messages where thread_id = :thread_id and number > coalesce(:after, 0)
             order by number limit :limit"""
    return [message_of(db, row, values["user_id"]) for row in query(sql)(db, values)]


def copy_way(db, message_id: str, thread_id: str) -> None:
    """Copy the messages from the root to this one into another thread, with their parts and new ids."""
    sql = """insert or ignore into messages (id, thread_id, number, parent_id, user_id, role, speaker, model, status,
             position, stop_reason, usage, timing, error, created_at, completed_at) select :copy, :thread_id, :number,
             :parent_id, user_id, role, speaker, model, status, position, stop_reason, usage, timing, error, created_at,
             completed_at from messages where id = :id"""
    parts_sql = "insert or ignore into chunks select :copy, position, parts from chunks where message_id = :id"
    parent = None
    for number, row in enumerate(reversed(list(rows_up(db, message_id))), 1):
        copy = str(uuid.uuid5(uuid.UUID(thread_id), row["id"]))
        values = {"id": row["id"], "copy": copy, "thread_id": thread_id, "number": number, "parent_id": parent}
        db.execute(sql, values)
        db.execute(parts_sql, values)
        index_text(db, copy)
        parent = copy


def rows_up(db, message_id: str | None):
    """The messages from this one up to the root."""
    while message_id:
        yield (row := db.execute("select * from messages where id = :id", {"id": message_id}).fetchone())
        message_id = row["parent_id"]


def remove_messages(db, threads: list[str]) -> None:
    values = [{"id": thread} for thread in threads]
    sql = "delete from message_texts where rowid in (select seq from messages where thread_id = :id)"
    db.executemany(sql, values)
    db.executemany("delete from messages where thread_id = :id", values)


def insert_reaction(db, values: dict) -> list[dict]:
    values = {**values, "message_id": find_message(db, values)["id"]}
    db.execute("insert or ignore into message_reactions values (:message_id, :user_id, :emoji, :time)", values)
    return select_reactions(db, values)


def delete_reaction(db, values: dict) -> list[dict]:
    values = {**values, "message_id": find_message(db, values)["id"]}
    sql = "delete from message_reactions where message_id = :message_id and user_id = :user_id and emoji = :emoji"
    db.execute(sql, values)
    return select_reactions(db, values)


def select_reactions(db, values: dict) -> list[dict]:
    sql = """select emoji, count(*) as count, max(user_id = :user_id) as mine from message_reactions
             where message_id = :message_id group by emoji order by min(created_at), emoji"""
    return [{**pick(row, "emoji", "count"), "userReacted": bool(row["mine"])} for row in db.execute(sql, values)]


################ The prompt
# The way from the root of the thread's tree to the message answered, as neutral messages {"role", "parts"}.
# Read from the newest upwards, so that a long thread costs no more than its budget.


def read_prompt(db, message_id: str | None, newest: list[dict], system: str | None, budget: int) -> list[dict]:
    """The messages of a prompt, oldest first. `newest`: parts of a user message that is not stored yet and hangs on
    `message_id`, or [] where `message_id` is the one answered. The oldest turns fall out, whole, until it fits `budget`
    (tokens); Problem `too_large` where not even the last one does."""
    turns, turn, used = [], [], tokens_of(system or "")
    for role, parts in itertools.chain([("user", newest)] if newest else [], way_up(db, message_id)):
        turn.insert(0, {"role": role, "parts": parts})
        if role == "user":  # it began the turn
            used += prompt_tokens(turn)
            if used > budget and turns:
                break
            if used > budget:
                words = f"the message and the system text are about {used} tokens, the limit is {budget}"
                raise Problem("too_large", f"{words} (LIMINAL_CONTEXT)", field="content")
            turns, turn = [turn, *turns], []
    return join_neighbours([message for turn in turns for message in turn])


def way_up(db, message_id: str | None):
    """(role, parts) of each message from here up to the root. Beside a reply on the way stand, by number, the newest
    finished ones of the other speakers: a retry replaces, a roundtable adds."""
    beside = """select * from messages as one where parent_id = :parent_id and role = 'assistant'
                and speaker is not :speaker and status in ('complete', 'cancelled', 'error')
                and not exists (select 1 from messages as newer where newer.parent_id = :parent_id
                and newer.speaker is one.speaker and newer.number > one.number
                and newer.status in ('complete', 'cancelled', 'error'))"""
    for row in rows_up(db, message_id):
        rows = [row, *db.execute(beside, dict(row))] if row["role"] == "assistant" else [row]
        for one in sorted(rows, key=lambda row: -row["number"]):
            parts = read_parts(db, one["id"])
            yield one["role"], answered(joined([part for part in parts if part["type"] != "thinking"]))


def answered(parts: list[dict]) -> list[dict]:
    """The parts with a result for each call: a provider takes no call without one."""
    results = {part["tool_call_id"] for part in parts if part["type"] == "tool_result"}
    made, open_calls = [], []
    for part, following in itertools.zip_longest(parts, parts[1:]):
        made.append(part)
        if part["type"] == "tool_call" and part["tool_call_id"] not in results:
            open_calls.append({**CANCELLED_CALL, **pick(part, "tool_call_id", "name")})
        if following is None or following["type"] != "tool_call":
            results |= {call["tool_call_id"] for call in open_calls}
            made, open_calls = made + open_calls, []
    return made


CANCELLED_CALL = {"type": "tool_result", "text": "cancelled", "is_error": True}


def join_neighbours(messages: list[dict]) -> list[dict]:
    """Without empty replies, and with neighbours of one role as one message: providers want the roles to alternate."""
    groups = itertools.groupby([one for one in messages if one["parts"]], key=lambda one: one["role"])
    return [{"role": role, "parts": [part for one in group for part in one["parts"]]} for role, group in groups]


def tokens_of(text: str) -> int:
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def part_tokens(part: dict) -> int:
    return tokens_of(part.get("text") or encode_json(part.get("arguments", "")))


def prompt_tokens(messages: list[dict]) -> int:
    return sum(part_tokens(part) for message in messages for part in message["parts"])


def in_steps(parts: list[dict]):
    """A reply's parts as the steps that providers know: (what the model said and called, the results that it got)."""
    said = []
    for are_results, group in itertools.groupby(parts, key=lambda part: part["type"] == "tool_result"):
        group = list(group)
        if are_results:
            yield said, group
        said = [] if are_results else group
    if said:
        yield said, []


################ Providers
# One async generator a provider, all yielding lists of events, one for each read: nothing is done per token that can be
# done per read. Beside the events of the contract they yield `usage` (what is known so far) and, last, `end`
# {stop_reason, blocks}: without it a stream is cut off, however clean its connection ended.


@dataclasses.dataclass(frozen=True)
class Provider:
    """`key_env` names the variable that holds the key; the key itself is in no database, log or error."""

    name: str
    kind: str
    base_url: str | None
    key_env: str | None
    key: str
    models: list[str]
    prices: dict
    built_in: bool = True

    @property
    def official(self) -> bool:
        return self.base_url == Settings.openai_base_url

    @property
    def missing(self) -> str | None:
        """Why it cannot be used, and what to do."""
        own = self.key_env and not self.built_in
        needed = own or self.kind == "anthropic" or self.name == "openai" and self.official
        words = f"{self.key_env} is not set: `liminal providers key {self.name}` asks for it"
        return words if needed and not self.key else None

    @property
    def bearer(self) -> dict:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def hide(self, text: str) -> str:
        return text.replace(self.key, "(key)") if self.key else text


def all_providers(settings: Settings, rows: list[dict]) -> dict[str, Provider]:
    """Built-in and added providers by name, in the order in which a default model is looked for."""
    ollama = settings.ollama_host if "//" in settings.ollama_host else f"http://{settings.ollama_host}"
    ollama = ollama.replace("//0.0.0.0", "//127.0.0.1").rstrip("/")
    ollama += "" if urllib.parse.urlsplit(ollama).port else ":11434"
    anthropic = settings.anthropic_base_url.rstrip("/"), "ANTHROPIC_API_KEY", settings.anthropic_api_key
    openai = settings.openai_base_url.rstrip("/"), "OPENAI_API_KEY", settings.openai_api_key
    own = []
    for row in rows:
        row = {**row, "base_url": (row["base_url"] or "").rstrip("/"), "built_in": False}
        own.append(Provider(**row, key=settings.values.get(row["key_env"] or "", "")))
    made = [
        Provider("anthropic", "anthropic", *anthropic, [ANTHROPIC_MODEL], {}),
        Provider("openai", "openai", *openai, [OPENAI_MODEL] if openai[0] == Settings.openai_base_url else [], {}),
        *own,
        Provider("ollama", "openai", ollama + "/v1", None, "", [], {}),
        Provider("demo", "demo", None, None, "", DEMO_MODELS, {}),
    ]
    return {provider.name: provider for provider in made}


async def read_provider(domain: Domain, reply: Run) -> AsyncIterator[list[dict]]:
    """One round of a reply: what its provider sends, as lists of events. An overloaded provider is called again, with
    jitter and no sooner than it asked for, as long as nothing has come. Problem where it fails."""
    provider, begun = reply.provider, reply.position
    for attempt in itertools.count(1):
        for name in NEEDS.get(provider.kind, ()):
            await import_later(name)
        reply.expect(domain.first_byte)
        try:
            async with contextlib.aclosing(READERS[provider.kind](domain, provider, reply.request)) as reader:
                async for events in reader:
                    reply.expect(domain.next_byte)
                    yield events
            return
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            words, address = plain_error(error), f"{provider.name} at {provider.base_url}"
            if reply.position == begun:
                words = f"cannot reach {address} ({words}): does it run there?"
            else:
                words = f"{provider.name} broke off in mid-answer ({words}): retry"
            raise Problem("provider_error", provider.hide(words)) from error
        except Problem as problem:
            asked = problem.retry_after or 0
            overloaded = problem.code in ("rate_limited", "provider_overloaded")
            if not overloaded or attempt == ATTEMPTS or reply.position > begun or asked > LONGEST_WAIT:
                raise
            wait = (asked or 0.5 * 2**attempt) * random.uniform(1, 1.25)
            log.warning("%s: %s; call %d follows in %.1f s", reply.model, problem.message, attempt + 1, wait)
            domain.metrics.count("liminal_provider_retries_total", code=problem.code)
        reply.expect(None)
        await asyncio.sleep(wait)


FAULTS = [  # the statuses and error types of both formats that mean the same, our code for them, what to do
    ({401, 403, "authentication_error", "permission_error"}, "provider_auth", " (is {} right?)"),
    ({404, "not_found_error"}, "unknown_model", " (`liminal models` lists what there is)"),
    ({429, "rate_limit_error"}, "rate_limited", ""),
    ({503, 529, "overloaded_error"}, "provider_overloaded", ""),
    ({413, "request_too_large"}, "too_large", ""),
    ({408, 504, "timeout_error"}, "provider_timeout", ""),
]


def provider_problem(provider: Provider, status: int, kind: str, text: str, retry_after: str | None = None) -> Problem:
    """What a provider's error status (or an error inside its stream) means, in its own words."""
    text = valid(provider.hide(text.strip())[:500]) or f"status {status}"
    known = ((code, advice) for signs, code, advice in FAULTS if signs & {status, kind})
    code, advice = next(known, ("provider_error", ""))
    words = f"{provider.name}: {text}" + advice.format(provider.key_env or "its key")
    return Problem(code, words, seconds_of(retry_after))


def stream_problem(provider: Provider, sent: dict) -> Problem:
    """What an error inside a stream means; some servers put it into `error`, some send it bare, or as text."""
    error = sent.get("error") or sent
    error = error if isinstance(error, dict) else {"message": error}
    code = str(error.get("code"))
    kind, text = str(error.get("type", "")), str(error.get("message", ""))
    return provider_problem(provider, int(code) if code.isdigit() else 0, kind, text)


def seconds_of(retry_after: str | None) -> float | None:
    """A Retry-After header, a number of seconds or a date, as seconds from now."""
    if not retry_after:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(retry_after))
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())


def error_words(body: bytes | str) -> tuple[str, str]:
    """(kind, message) out of an error's body in either wire format, or its plain text."""
    try:
        error = json.loads(body)
        error = error[0] if isinstance(error, list) else error
        error = error.get("error", error)
        if isinstance(error, dict):
            return str(error.get("type") or ""), str(error.get("message") or error)
        return "", str(error)
    except (ValueError, AttributeError, IndexError):
        return "", body.decode("utf-8", "replace") if isinstance(body, bytes) else body


def take_frames(provider: Provider, decoder: Decoder, data: bytes, take) -> tuple[list[dict], Problem | None]:
    """(events, what was wrong) of one read. `take(name, value, events)` sees each frame; what came before a bad one
    counts."""
    events, words = [], "sent a frame that is not a JSON object"
    try:
        for name, text, _ in decoder.feed(data):
            take(name, text if text == "[DONE]" else object_of(provider, text, json.loads, words), events)
    except Problem as problem:
        return events, problem
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        words = f"{provider.name} sent a malformed frame ({provider.hide(repr(error))[:100]})"
        return events, Problem("provider_error", words)
    return events, None


def object_of(provider: Provider, text: str, parse, words: str) -> dict:
    try:
        value = parse(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Problem("provider_error", f"{provider.name} {words}: {provider.hide(text)[:100]!r}")
    return value


def tool_call(provider: Provider, call_id: str, name: str, text: str) -> dict:
    """The event of a call whose arguments came as JSON text; no text is none. They must fit every later reader: strict
    JSON, of a bounded size and depth."""
    text, words = text if text.strip() else "{}", f"called {name} with arguments that are no object we can take"
    arguments = object_of(provider, text, read_arguments, words)
    return {"type": "tool_call", "tool_call_id": valid(call_id), "name": valid(name), "arguments": arguments}


def read_arguments(text: str):
    if len(text) > ARGUMENTS:
        raise ValueError(f"more than {ARGUMENTS} characters")
    value = parse_json(valid(encode_json(json.loads(text))).encode())
    level = [value]
    for _ in range(ARGUMENT_DEPTH):
        groups = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = list(itertools.chain(*groups))
        if not level:
            return value
    raise ValueError(f"nested more than {ARGUMENT_DEPTH} deep")


def count_of(usage: dict, name: str) -> int:
    """A count that a provider gives, 0 where it makes no sense."""
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else 0


def valid(text: str) -> str:
    """Text as valid Unicode: the halves of a surrogate pair are joined, lone ones become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def given(fields: dict) -> dict:
    """What was asked for: nothing else is sent."""
    return {name: value for name, value in fields.items() if value not in (None, [])}


IMPORTS: dict[str, asyncio.Future] = {}


async def import_later(name: str):
    """A module that is slow to import, when first needed, in a thread: the loop stalls 0.05 s instead of 0.6 s."""
    if name not in IMPORTS:
        IMPORTS[name] = asyncio.ensure_future(asyncio.to_thread(importlib.import_module, name))
    return await asyncio.shield(IMPORTS[name])


async def read_anthropic(domain: Domain, provider: Provider, request: dict) -> AsyncIterator[list[dict]]:
    """Anthropic Messages through the official SDK, whose connection, retries-off and headers we use; its typed events
    cost 190 us a token, so the stream itself goes through our decoder (20 us)."""
    anthropic, httpx2 = [await import_later(name) for name in NEEDS["anthropic"]]
    system = {"type": "text", "text": request["system"], "cache_control": {"type": "ephemeral"}}
    tools = [(tool.wire_name, tool.description, tool.schema) for tool in request["tools"].values()]
    body = {
        "model": request["model"],
        "max_tokens": request["max_tokens"] or ANTHROPIC_MAX_TOKENS,
        "messages": mark_cached(anthropic_messages(request["messages"]) + request["rounds"]),
        "stream": True,
        "system": [system] if request["system"] else None,
        "tools": [dict(zip(("name", "description", "input_schema"), tool)) for tool in tools],
        "extra_body": given({"temperature": request["temperature"]}) | request["options"],  # create() knows it no more
    }
    create = domain.anthropic_client(anthropic, provider).messages.with_streaming_response.create
    try:
        async with create(**given(body)) as response:
            kind = response.headers.get("content-type") or "no content type"
            if "text/event-stream" not in kind:
                raise Problem("provider_error", f"{provider.name} answered with {kind}, not with a stream")
            blocks, decoder = AnthropicBlocks(provider), Decoder()
            async for data in response.iter_bytes():
                events, problem = take_frames(provider, decoder, data, blocks.take)
                yield events
                if problem:
                    raise problem
    except anthropic.APIStatusError as error:
        words, wait = error_words(error.response.text), error.response.headers.get("retry-after")
        raise provider_problem(provider, error.status_code, *words, wait) from None
    except anthropic.APIConnectionError as error:
        raise OSError(str(error.__cause__ or error)) from None
    except anthropic.AnthropicError as error:
        raise Problem("provider_error", provider.hide(f"{provider.name}: {error}")) from None
    except httpx2.HTTPError as error:
        raise OSError(str(error) or type(error).__name__) from None


class AnthropicBlocks:
    """The content blocks of one answer: turns Anthropic's events into ours, and keeps the blocks as they came, since
    thinking, its signature and redacted thinking must go back unchanged with the tool results of the same turn."""

    def __init__(self, provider: Provider):
        self.provider, self.blocks, self.texts, self.usage, self.stop_reason = provider, {}, {}, {}, None

    def take(self, name: str, event: dict, out: list[dict]) -> None:
        kind = event.get("type")
        if kind == "content_block_delta":
            self.delta(event["index"], event["delta"], out)
        elif kind == "content_block_start":
            self.blocks[event["index"]], self.texts[event["index"]] = dict(event["content_block"]), []
        elif kind in ("message_start", "message_delta"):
            usage = (event["message"] if kind == "message_start" else event).get("usage") or {}
            self.usage.update({name: count_of(usage, name) for name in usage})
            self.stop_reason = event.get("delta", {}).get("stop_reason") or self.stop_reason
            out.append({"type": "usage", **anthropic_usage(self.usage)})
        elif kind == "message_stop":
            self.finish(out)
        elif kind == "error":
            raise stream_problem(self.provider, event)

    def delta(self, index: int, delta: dict, out: list[dict]) -> None:
        kind, texts = delta["type"], self.texts[index]
        if kind in ("text_delta", "thinking_delta"):
            name = kind.removesuffix("_delta")
            texts.append(delta[name])
            out.append({"type": name, "text": delta[name]})
        elif kind == "input_json_delta":
            texts.append(delta["partial_json"])
        elif kind == "signature_delta":
            block = self.blocks[index]
            block["signature"] = block.get("signature", "") + delta["signature"]

    def finish(self, out: list[dict]) -> None:
        """Complete the blocks; call tools only where that is why the answer ended: a cut off call may look whole."""
        for index, block in self.blocks.items():
            text = "".join(self.texts[index])
            if block["type"] in ("text", "thinking"):
                block[block["type"]] = valid(block[block["type"]] + text)
            elif block["type"] == "tool_use" and self.stop_reason == "tool_use":
                text = text or encode_json(block.get("input") or {})
                out.append(tool_call(self.provider, block["id"], block["name"], text))
                block["input"] = out[-1]["arguments"]
        reason = self.stop_reason and valid(str(self.stop_reason))
        out.append({"type": "end", "stop_reason": reason, "blocks": [*self.blocks.values()]})


def anthropic_usage(usage: dict) -> dict:
    """Every prompt token is input here, cached or not, as with OpenAI; Anthropic counts the cached ones apart."""
    cached = usage.get("cache_read_input_tokens", 0)
    fresh = usage.get("input_tokens", 0) + usage.get("cache_creation_input_tokens", 0)
    return dict(zip(COUNTS, (fresh + cached, cached, usage.get("output_tokens", 0))))


def anthropic_messages(messages: list[dict]) -> list[dict]:
    made = []
    for message in messages:
        for said, results in in_steps(message["parts"]):
            made += [{"role": message["role"], "content": list(map(anthropic_block, said))}] if said else []
            made += [{"role": "user", "content": list(map(anthropic_block, results))}] if results else []
    return made


def anthropic_block(part: dict) -> dict:
    if part["type"] == "tool_call":
        return {"type": "tool_use", "id": part["tool_call_id"], "name": part["name"], "input": part["arguments"]}
    if part["type"] == "tool_result":
        result = {"tool_use_id": part["tool_call_id"], "content": part["text"] or "(empty)"}
        return {"type": "tool_result", **result, "is_error": part["is_error"]}
    return {"type": "text", "text": part["text"]}


def mark_cached(messages: list[dict]) -> list[dict]:
    """With the last block of the prompt marked, so that the next turn reads this one from the provider's cache."""
    *content, last = messages[-1]["content"]
    marked = {**last, "cache_control": {"type": "ephemeral"}}
    return [*messages[:-1], {**messages[-1], "content": [*content, marked]}]


async def read_openai(domain: Domain, provider: Provider, request: dict) -> AsyncIterator[list[dict]]:
    """Chat Completions of any OpenAI-compatible server. What they differ in is taken as it comes: usage twice or late,
    `choices` empty, `reasoning` or `reasoning_content`, comment lines, errors inside a 200."""
    body = {
        "model": request["model"],
        "messages": openai_messages(request["system"], request["messages"]) + request["rounds"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens" if provider.official else "max_tokens": request["max_tokens"] or None,
        "temperature": request["temperature"],
        "tools": list(map(openai_tool, request["tools"].values())),
    }
    headers = {**provider.bearer, "Content-Type": "application/json", "Accept": "text/event-stream"}
    url, data = f"{provider.base_url}/chat/completions", encode_json(given(body) | request["options"]).encode()
    async with domain.http.post(url, data=data, headers=headers, allow_redirects=False) as response:
        if response.status != 200 or response.content_type != "text/event-stream":
            kind, words = error_words(await read_up_to(response, 100_000))
            if response.status != 200:
                raise provider_problem(provider, response.status, kind, words, response.headers.get("retry-after"))
            words = f"{provider.name} answered with {response.content_type}: {provider.hide(words)[:200]}"
            raise Problem("provider_error", words)
        choice, decoder = OpenaiChoice(provider), Decoder()
        async for data in response.content.iter_any():
            events, problem = take_frames(provider, decoder, data, choice.take)
            yield events
            if problem:
                raise problem
            if choice.ended:
                return
        yield choice.finish([])  # some servers never say [DONE]


class OpenaiChoice:
    """The one choice of a Chat Completions stream, turned into our events."""

    def __init__(self, provider: Provider):
        self.provider, self.calls, self.texts, self.finish_reason, self.ended = provider, {}, [], None, False

    def take(self, name: str, chunk: dict | str, out: list[dict]) -> None:
        if chunk == "[DONE]":
            self.finish(out)
            return
        if name == "error" or chunk.get("error"):
            raise stream_problem(self.provider, chunk)
        if usage := chunk.get("usage"):
            cached = count_of(usage.get("prompt_tokens_details") or {}, "cached_tokens")
            counts = count_of(usage, "prompt_tokens"), cached, count_of(usage, "completion_tokens")
            out.append({"type": "usage", **dict(zip(COUNTS, counts))})
        for choice in (chunk.get("choices") or [])[:1]:
            delta = choice.get("delta") or {}
            if thought := delta.get("reasoning") or delta.get("reasoning_content"):
                out.append({"type": "thinking", "text": thought})
            if text := delta.get("content"):
                out.append({"type": "text", "text": text})
                self.texts.append(text)
            for piece in delta.get("tool_calls") or ():
                self.call(piece)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def call(self, piece: dict) -> None:
        """A piece of a tool call: id and name come once, arguments in pieces, by index; without, a new id is a call."""
        index = piece.get("index")
        if index is None:
            index = max(self.calls, default=-1)
            index += 1 if index < 0 or piece.get("id") and piece["id"] != self.calls[index]["id"] else 0
        known = self.calls.setdefault(index, {"id": "", "name": "", "arguments": [], "size": 0})
        function = piece.get("function") or {}
        known["id"] = piece.get("id") or known["id"]
        known["name"] = function.get("name") or known["name"]
        known["arguments"].append(function.get("arguments") or "")
        known["size"] += len(known["arguments"][-1])
        if known["size"] > ARGUMENTS:
            raise ValueError(f"a call's arguments have more than {ARGUMENTS} characters")

    def finish(self, out: list[dict]) -> list[dict]:
        """The calls and the end, where the server has said why it ended."""
        if self.finish_reason is None or self.ended:
            return out
        self.ended = True
        reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
        stop_reason = reasons.get(self.finish_reason, valid(str(self.finish_reason)))
        if self.calls and stop_reason == "end_turn":
            stop_reason = "tool_use"  # some servers end with "stop" all the same
        for index, call in sorted(self.calls.items()) if stop_reason == "tool_use" else ():
            call_id = call["id"] or f"call_{index}_{secrets.token_hex(4)}"
            out.append(tool_call(self.provider, call_id, call["name"], "".join(call["arguments"])))
        calls = [event for event in out if event["type"] == "tool_call"]
        said = openai_message("assistant", valid("".join(self.texts)), calls)
        out.append({"type": "end", "stop_reason": stop_reason, "blocks": said})
        return out


def openai_messages(system: str | None, messages: list[dict]) -> list[dict]:
    made = [{"role": "system", "content": system}] if system else []
    for message in messages:
        for said, results in in_steps(message["parts"]):
            text = "\n\n".join(part["text"] for part in said if part["type"] == "text")
            calls = [part for part in said if part["type"] == "tool_call"]
            made += [openai_message(message["role"], text, calls)] if text or calls else []
            made += map(openai_result, results)
    return made


def openai_message(role: str, text: str, calls: list[dict]) -> dict:
    made = [{"name": call["name"], "arguments": encode_json(call["arguments"])} for call in calls]
    made = [{"id": call["tool_call_id"], "type": "function", "function": one} for call, one in zip(calls, made)]
    return {"role": role, "content": text or None, **given({"tool_calls": made})}


def openai_result(part: dict) -> dict:
    return {"role": "tool", "tool_call_id": part["tool_call_id"], "content": part["text"] or "(empty)"}


def openai_tool(tool: Tool) -> dict:
    function = {"name": tool.wire_name, "description": tool.description[:1024], "parameters": tool.schema}
    return {"type": "function", "function": function}


GUIDE = """This is Liminal's built-in demo, not a language model: it answers every message with this text, offline.

To talk to a real model, give Liminal a key once:

    ./run.sh providers key anthropic     (or openai)

It asks without echo and writes data/env; the next message uses it. With Ollama running on this machine, \
`./run.sh models` lists its models and needs no key.

What you see already works as it will with a real model: this reply came through both servers token by token, and is \
on disk. Try `./run.sh threads`, `./run.sh show`, or close this terminal in the middle of a reply and look again with \
`./run.sh chat --continue`.
"""
GUIDE_RATE = 60  # tokens per second, about what a fast model does


async def read_demo(domain: Domain, provider: Provider, request: dict) -> AsyncIterator[list[dict]]:
    """Offline: `guide` says what this is and how to set a real key, and reads a file when told to, so that tools can be
    tried; `load-<tokens>-<rate>` streams numbered tokens."""
    kind, *numbers = request["model"].split("-")
    said = "".join(part.get("text", "") for part in request["messages"][-1]["parts"])
    prompt = {"type": "usage", "input_tokens": prompt_tokens(request["messages"]), "cached_tokens": 0}
    words = said[:500].split() if kind == "guide" else []  # what a person says, not what was pasted
    place = next((place for place, word in enumerate(words) if word.lower() == "read"), len(words))
    asked = next((word.strip("`'\",;:!?") for word in words[place:] if re.search(r"\w\.\w", word)), None)
    if asked and not request["rounds"] and "liminal__file_read" in request["tools"]:
        call = {"type": "tool_call", "tool_call_id": f"demo_{secrets.token_hex(4)}", "name": "liminal__file_read"}
        call["arguments"] = {"path": asked}
        yield [{**prompt, "output_tokens": part_tokens(call)}, call]
        yield [{"type": "end", "stop_reason": "tool_use", "blocks": {}}]
        return
    if kind == "load":
        count, rate = int(numbers[0]), float(numbers[1])
        tokens = (f" t{number}" for number in range(count))
    else:
        results = [one["content"] for one in request["rounds"] if one.get("role") == "tool"]
        text = f"The demo has read the file, which begins:\n\n{results[-1][:500]}\n" if results else GUIDE
        rate, tokens = GUIDE_RATE, re.findall(r"\S+\s*|\s+", text)
        count = len(tokens)
    yield [{**prompt, "output_tokens": count}]
    begun, sent, tokens = time.monotonic(), 0, iter(tokens)
    while sent < count:
        due = min(count, int((time.monotonic() - begun) * rate) + 1 if rate else sent + 64)
        if due > sent:
            yield [{"type": "text", "text": token} for token in itertools.islice(tokens, due - sent)]
            sent = due
        await asyncio.sleep(max(0, begun + sent / rate - time.monotonic()) if rate else 0)
    yield [{"type": "end", "stop_reason": "end_turn", "blocks": {}}]


NEEDS = {"anthropic": ("anthropic", "httpx2")}
READERS = {"anthropic": read_anthropic, "openai": read_openai, "demo": read_demo}


async def ask_models(domain: Domain, provider: Provider) -> tuple[list[str], str | None]:
    """(the provider's models, why they cannot be used or None), asked for at most once a minute; what was configured
    stands first."""
    if provider.missing or provider.kind == "demo":
        return provider.models, provider.missing
    place = provider.name, provider.base_url, provider.key
    known, asked = domain.models.get(place), time.monotonic()
    if known is None or known[0] < asked:
        found, why = await fetch_models(domain, provider)
        hung = time.monotonic() - asked  # who hangs is not asked at each message
        until = time.monotonic() + (MODELS_FRESH if why is None or hung > 1 else 0)
        known = domain.models[place] = until, found, why
    _, found, why = known
    return [*provider.models, *(model for model in found if model not in provider.models)], why


async def read_up_to(response, limit: int) -> bytes:
    """A body to its end, or its first `limit` bytes."""
    data = b""
    async for piece in response.content.iter_any():
        data += piece
        if len(data) >= limit:
            break
    return data[:limit]


async def fetch_models(domain: Domain, provider: Provider) -> tuple[list[str], str | None]:
    url, headers = f"{provider.base_url}/models", provider.bearer
    if provider.kind == "anthropic":
        url = f"{provider.base_url}/v1/models?limit=1000"
        headers = {"x-api-key": provider.key, "anthropic-version": "2023-06-01"}
    try:
        limit = aiohttp.ClientTimeout(total=5)
        async with domain.http.get(url, headers=headers, timeout=limit, allow_redirects=False) as response:
            data = await read_up_to(response, 10_000_000)
            if response.status != 200:
                return [], provider_problem(provider, response.status, *error_words(data)).message
            return [str(one["id"]) for one in json.loads(data)["data"]], None
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        return [], f"cannot reach {provider.base_url} ({plain_error(error)})"
    except (ValueError, KeyError, TypeError):
        return [], f"{provider.base_url}/models gave no list of models"


async def default_model(domain: Domain) -> str:
    """LIMINAL_MODEL, else that of the first provider with a key, else Ollama's first, else the demo."""
    if domain.settings.model:
        return domain.settings.model
    for provider in domain.providers().values():
        wanted = provider.key or provider.name == "ollama" or provider.kind == "openai" and not provider.official
        if provider.kind != "demo" and wanted and not provider.missing:
            models = provider.models or (await ask_models(domain, provider))[0]
            if models:
                return f"{provider.name}/{models[0]}"
    return "demo/guide"


async def find_model(domain: Domain, name: str | None) -> tuple[Provider, str]:
    """The provider and its own name of a model; Problem `unknown_model` or `provider_auth` that says what to do."""
    domain.settings = domain.settings.fresh()
    name = name or await default_model(domain)
    prefix, _, model = name.partition("/")
    provider, why = domain.providers().get(prefix), None
    model = model or next(iter(provider.models if provider else ()), "")
    if provider is None:
        why = f"is no model: they are named provider/model, with {', '.join(domain.providers())}"
    elif provider.kind == "demo" and not re.fullmatch(r"guide|load-[0-9]{1,7}-[0-9]{1,6}", model):
        why = "is no model: demo has guide and load-<tokens>-<rate>"
    elif not model:
        why = "names no model: `liminal models` lists what there is"
    if why:
        raise Problem("unknown_model", f"{name!r} {why}", field="model")
    if provider.missing:
        raise Problem("provider_auth", f"{prefix}: {provider.missing}", field="model")
    return provider, model


################ Tools
# All tools are MCP tools, our own too (an in-process server named `liminal`), so that there is one path. A server is
# started when a reply first needs it, lives in one task, and is started anew after it has died. Whatever a server does,
# it costs one call, never the reply. What a tool says is data: it cannot widen what is allowed; only names are judged.

TOOL_CONNECT, TOOL_CALL = 15.0, 60.0  # seconds; a server's `connect_timeout` and `call_timeout` in mcp.json change them
TOOL_LIST = 3.0  # seconds to list the tools anew at a reply; then the last list stands
TOOL_LINE = 16 << 20  # bytes of one message of a server; a longer one ends it, before it fills the memory
TOOL_TEXT = 50_000  # characters of a result that the model and the thread get
TOOL_BACKOFF = (1, 2, 5, 15, 60)  # seconds between two starts of a server that dies


@dataclasses.dataclass(frozen=True)
class Tool:
    server: ToolServer
    name: str
    description: str
    schema: dict
    read_only: bool

    @property
    def full_name(self) -> str:
        """`server__tool`: what patterns are matched with and people see."""
        return f"{self.server.name}__{self.name}"

    @property
    def wire_name(self) -> str:
        """The full name as both wire formats take it: 64 letters, digits, `_` and `-`."""
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", self.full_name)
        digest = hashlib.sha256(self.full_name.encode()).hexdigest()[:8]
        return plain if plain == self.full_name and len(plain) <= 64 else f"{plain[:55]}_{digest}"


class ToolServer:
    """One MCP server. `state` is starting, running or failed, `why` what was wrong last."""

    def __init__(self, name: str, config: dict, target):
        self.name, self.config, self.target = name, config, target
        self.state, self.why, self.tools, self.client = "starting", None, [], None
        self.connect_timeout = config.get("connect_timeout", TOOL_CONNECT)
        self.call_timeout = config.get("call_timeout", TOOL_CALL)
        self.settled, self.broken = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self.live())

    async def live(self) -> None:
        """Enter the client, stay until it breaks, leave it: all in this one task, as the SDK needs it."""
        for wait in itertools.chain(TOOL_BACKOFF, itertools.repeat(TOOL_BACKOFF[-1])):
            self.broken.clear()
            begun = time.monotonic()
            try:
                async with contextlib.AsyncExitStack() as stack:
                    async with asyncio.timeout(self.connect_timeout):
                        self.client = await stack.enter_async_context(self.target(self))
                        self.tools = await self.list_tools()
                    self.state, self.why = "running", None
                    self.settled.set()
                    await self.broken.wait()
            except asyncio.CancelledError:
                raise
            except TimeoutError:
                self.why = f"it did not answer within {self.connect_timeout:g} s of its start"
            except BaseException as error:  # whatever the SDK raises, groups included, is this server's fault
                self.why = plain_error(error)
            self.state, self.client = "failed", None
            self.settled.set()
            log.warning("the MCP server %s is not running: %s", self.name, self.why or "it ended")
            if time.monotonic() - begun < 60:
                await asyncio.sleep(wait)

    async def list_tools(self) -> list[Tool]:
        found, cursor = [], None
        while True:
            page = await self.client.list_tools(cursor=cursor, cache_mode="bypass")
            for tool in page.tools:
                read_only = bool(tool.annotations and tool.annotations.read_only_hint)
                found.append(Tool(self, tool.name, tool.description or "", tool.input_schema, read_only))
            cursor = page.next_cursor
            if not cursor or len(found) > 1000:
                return found

    async def refresh(self) -> list[Tool]:
        """The tools as they are now: a server may change them at any time."""
        await self.settled.wait()
        if self.state == "running" and self.name != "liminal":  # ours never change
            try:
                self.tools = await asyncio.wait_for(self.list_tools(), TOOL_LIST)
            except Exception as error:
                self.fail(error)
        return self.tools if self.state == "running" else []

    async def call(self, name: str, arguments: dict) -> tuple[str, bool]:
        """(text, is_error) of one call. It runs in a task of its own, which a cancelled reply does not wait for."""
        task = asyncio.create_task(self.client.call_tool(name, arguments))
        try:
            done, _ = await asyncio.wait([task], timeout=self.call_timeout)
            if not done:
                return f"{self.name} did not answer within {self.call_timeout:g} s", True
            result = task.result()
            return result_text(result), result.is_error
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.fail(error)
            return f"the call failed: {plain_error(error)}", True
        finally:
            if not task.done():
                task.cancel()
                task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def fail(self, error: Exception) -> None:
        """Start anew where the connection is gone, rather than where the server only refused."""
        code = getattr(getattr(error, "error", None), "code", None)
        if code == -32000 or code is None and not isinstance(error, (TimeoutError, ValueError)):
            self.why, self.state = plain_error(error), "failed"
            self.broken.set()


def plain_error(error: BaseException) -> str:
    """What went wrong, in one line of people's words."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    error = getattr(error, "os_error", error)  # aiohttp wraps the system's word in its own
    if isinstance(error, OSError) and error.strerror:
        return os.strerror(error.errno).lower() if error.errno in errno.errorcode else error.strerror
    return f"{error}".strip().splitlines()[0][:300] if f"{error}".strip() else type(error).__name__


def result_text(result) -> str:
    """A result as text: what is no text is named, not hidden; what is too long is cut, and says so."""
    pieces = [block_text(block) for block in result.content]
    if not pieces and result.structured_content is not None:
        pieces.append(encode_json(result.structured_content))
    text = valid("\n".join(pieces))
    left_out = len(text) - TOOL_TEXT
    return text if left_out <= 0 else f"{text[:TOOL_TEXT]}\n[cut: {left_out} of {len(text)} characters left out]"


def block_text(block) -> str:
    if block.type == "text":
        return block.text
    if block.type in ("image", "audio"):
        return f"[{block.type} {block.mime_type}, {base64_bytes(block.data)} bytes, not shown]"
    if block.type != "resource":
        return f"[{block.type} {getattr(block, 'uri', '')}]"
    if getattr(block.resource, "text", None) is not None:
        return f"[resource {block.resource.uri}]\n{block.resource.text}"
    return f"[resource {block.resource.uri}, {base64_bytes(block.resource.blob)} bytes, not shown]"


def base64_bytes(text: str) -> int:
    return len(text.rstrip("=")) * 3 // 4


class Tools:
    """The servers of mcp.json and our own, and what is allowed. Read again at a reply when the file has changed."""

    def __init__(self, domain: Domain):
        self.domain, self.servers, self.permissions = domain, {}, {"allow": [], "deny": []}
        self.wanted, self.seen, self.why = {}, None, None

    def reload(self) -> None:
        path = self.domain.settings.mcp
        if self.seen == (seen := stamp(path)) and self.servers:
            return
        self.seen, self.why = seen, None
        try:
            self.wanted, self.permissions = read_config(path) if seen else ({}, {"allow": [], "deny": []})
        except (OSError, ValueError, AttributeError, TypeError) as error:
            self.why = f"{path} cannot be used: {error}"  # what ran goes on: half a change must not stop a server
            log.error("%s", self.why)
        for name, one in list(self.servers.items()):
            if name != "liminal" and self.wanted.get(name) != one.config:
                self.servers.pop(name).task.cancel()
        for name, one in self.wanted.items():
            if name not in self.servers:
                self.servers[name] = ToolServer(name, one, http_client if "url" in one else stdio_client)
        if "liminal" not in self.servers:
            self.servers["liminal"] = ToolServer("liminal", {}, functools.partial(own_client, self.domain))

    async def offered(self, patterns: list[str] | None) -> dict[str, Tool]:
        """The tools of all servers, or those that match, by their wire names; the servers start in parallel."""
        await import_later("mcp")
        self.reload()
        found = await asyncio.gather(*[server.refresh() for server in self.servers.values()])
        chosen = [tool for tools in found for tool in tools if patterns is None or matches(tool, patterns)]
        return {tool.wire_name: tool for tool in chosen}

    def refusal(self, tool: Tool, allow: list[str]) -> str | None:
        """None where the tool may be called, else why not and what to add. Deny beats allow; reading is allowed."""
        name, path = tool.full_name, self.domain.settings.mcp
        if matches(tool, self.permissions["deny"]):
            return f"{name} is denied in {path} (permissions.deny)"
        if tool.read_only or matches(tool, self.permissions["allow"]) or matches(tool, allow):
            return None
        line = encode_json({"permissions": {"allow": [f"{tool.server.name}__*"]}})
        return f"{name} is not allowed: add {line} to {path}, or for one run --allow '{name}'"

    async def close(self) -> None:
        for server in self.servers.values():
            server.task.cancel()
        await asyncio.wait([server.task for server in self.servers.values()], timeout=3) if self.servers else None


def read_config(path: pathlib.Path) -> tuple[dict, dict]:
    """(the servers of mcp.json by name, its permissions); ValueError and the like where it makes no sense."""
    config = json.loads(path.read_text())
    wanted = {name: one for name, one in config.get("mcpServers", {}).items() if not one.get("disabled")}
    for name, one in wanted.items():
        if name == "liminal" or not (isinstance(one.get("command"), str) or isinstance(one.get("url"), str)):
            raise ValueError(f"the server {name!r} needs a name of its own and a command or a url")
        for word in ("connect_timeout", "call_timeout"):
            if not isinstance(one.get(word, 1), (int, float)) or not 0 < one.get(word, 1) < 1e6:
                raise ValueError(f"the server {name!r} has a {word} that is no number of seconds")
    permissions = config.get("permissions", {})
    for kind in ("allow", "deny"):
        if not isinstance(permissions.get(kind, []), list):
            raise ValueError(f"permissions.{kind} is no list of patterns")
    return wanted, {kind: [str(one) for one in permissions.get(kind, [])] for kind in ("allow", "deny")}


def matches(tool: Tool, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(tool.full_name, pattern) for pattern in patterns)


def stdio_client(server: ToolServer):
    import mcp

    return mcp.Client(stdio_transport(server), read_timeout_seconds=server.call_timeout)


@contextlib.asynccontextmanager
async def stdio_transport(server: ToolServer):
    """A child process as an MCP transport: ours, because a line is bounded (the SDK would take 100 MB in one), garbage
    between messages is passed over, and no child outlives the Domain. Its environment is what it needs, and no key."""
    import anyio
    from mcp.client.stdio import get_default_environment

    config = server.config
    own = {name: str(value) for name, value in (config.get("env") or {}).items()}
    process = await asyncio.create_subprocess_exec(
        config["command"],
        *map(str, config.get("args") or ()),
        env={**get_default_environment(), **own},
        cwd=config.get("cwd"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=None,  # the Domain's own log
        limit=TOOL_LINE,
        start_new_session=True,
        preexec_fn=die_with_parent() if sys.platform == "linux" else None,
    )
    inbox, read = anyio.create_memory_object_stream(0)
    write, outbox = anyio.create_memory_object_stream(0)
    tasks = [asyncio.create_task(work) for work in (read_child(server, process, inbox), write_child(process, outbox))]
    try:
        yield read, write
    finally:  # as the protocol asks: close its standard input, wait a moment, then end it
        process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await process.wait()
        kill(process)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_child(server: ToolServer, process, inbox) -> None:
    from mcp.shared.message import SessionMessage
    from mcp_types import jsonrpc_message_adapter

    async with inbox:
        try:
            while line := await process.stdout.readline():
                try:
                    line = line if b"\\ud" not in line.lower() else valid(encode_json(json.loads(line))).encode()
                    message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError:
                    log.warning("the MCP server %s wrote what is no message: %.100r", server.name, line)
                    continue
                await inbox.send(SessionMessage(message))
        except (ValueError, OSError):
            log.warning("the MCP server %s wrote a message of more than %d bytes and was ended", server.name, TOOL_LINE)
            kill(process)


async def write_child(process, outbox) -> None:
    with contextlib.suppress(OSError):
        async with outbox:
            async for message in outbox:
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                process.stdin.write(text.encode() + b"\n")
                await process.stdin.drain()


def kill(process) -> None:
    """The whole session of the child: its own children, too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def die_with_parent():
    """Runs in the child before the command: the kernel ends it when we end, however that happens."""
    import ctypes

    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextlib.asynccontextmanager
async def http_client(server: ToolServer):
    import httpx2
    import mcp
    from mcp.client.streamable_http import streamable_http_client

    async def bound(response):
        if response.request.method == "POST":  # an answer; the stream of notifications may go on for ever
            response.stream = BoundedStream(response.stream)

    class BoundedStream(httpx2.AsyncByteStream):
        """Fails past TOOL_LINE bytes: the SDK would take any amount."""

        def __init__(self, stream):
            self.stream = stream

        async def __aiter__(self):
            total = 0
            async for data in self.stream:
                total += len(data)
                if total > TOOL_LINE:
                    raise httpx2.ReadError(f"an answer of more than {TOOL_LINE} bytes")
                yield data

        async def aclose(self):
            await self.stream.aclose()

    timeout = httpx2.Timeout(server.call_timeout, connect=server.connect_timeout)
    more = {"event_hooks": {"response": [bound]}, "timeout": timeout, "trust_env": False}
    async with httpx2.AsyncClient(headers=server.config.get("headers") or {}, **more) as http:
        transport = streamable_http_client(server.config["url"], http_client=http, max_sse_event_size=TOOL_LINE)
        async with mcp.Client(transport, read_timeout_seconds=server.call_timeout) as client:
            yield client


async def call_tool(domain: Domain, reply: Run, call: dict) -> dict:
    """Execute one call and record its result; whatever goes wrong is the result."""
    tool = reply.tools.get(call["name"])
    if tool is None:
        text, failed = f"there is no tool {call['name']!r}; there are: {', '.join(reply.tools) or 'none'}", True
    elif refusal := domain.tools.refusal(tool, reply.allow):
        text, failed = refusal, True
    elif fault := await argument_fault(tool.schema, call["arguments"]):
        text, failed = f"the arguments do not fit: {fault}", True
    elif tool.server.client is None:
        text, failed = f"the MCP server {tool.server.name} is not running: {tool.server.why}", True
    else:
        CALLER.set(reply.user_id)
        text, failed = await tool.server.call(tool.name, call["arguments"])
    domain.metrics.count("liminal_tool_calls_total", outcome="error" if failed else "ok")
    result = {"type": "tool_result", **pick(call, "tool_call_id", "name"), "text": text, "is_error": failed}
    record(domain, reply, [result])
    return result


async def argument_fault(schema: dict, arguments: dict) -> str | None:
    """What the tool's own schema finds wrong; jsonschema comes with the SDK. No reference is ever fetched."""
    jsonschema, referencing = await import_later("jsonschema"), await import_later("referencing")
    try:
        unsafe = dict.fromkeys(
            ("pattern", "patternProperties")
        )  # a hostile one could stop the loop; the server checks them
        checked = jsonschema.validators.extend(jsonschema.Draft202012Validator, unsafe)
        validator = checked(schema, registry=referencing.Registry())
        fault = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
    except Exception as error:  # the schema itself is broken: the server may still know what to do with the call
        log.warning("a tool's schema cannot be used: %s", error)
        return None
    return fault and f"{'.'.join(map(str, fault.absolute_path)) or 'they'}: {fault.message[:300]}"


################ Tools of our own
# Read-only, as an MCP server in this process. A path is walked one folder at a time from a root, following no symbolic
# link, so that neither `..` nor a swap between check and use leads out; data/ is never readable.

CALLER = contextvars.ContextVar("caller")  # the user whose reply calls
FILE_BYTES, LIST_ENTRIES, SEARCH_LINES, SEARCH_SECONDS = 200_000, 1_000, 100, 5.0


def own_client(domain: Domain, server: ToolServer):
    import mcp
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp_types import ToolAnnotations

    own = MCPServer("liminal")
    roots, data = domain.settings.files_root.split(":"), domain.settings.data

    def tool(fn):
        @functools.wraps(fn)
        async def tell_why(*args, **named):
            try:
                return await fn(*args, **named)
            except ValueError as fault:
                raise ToolError(str(fault)) from None  # the SDK hides the words of any other error

        words = fn.__doc__.replace("the root", f"the root ({domain.settings.files_root})")
        hints = ToolAnnotations(read_only_hint=True)
        own.tool(description=words, annotations=hints, structured_output=False)(tell_why)

    @tool
    async def file_read(path: str, first_line: int = 1, lines: int = 2000) -> str:
        """Read lines of a text file. The path is relative to the root; first_line counts from 1."""
        return await asyncio.to_thread(read_file, roots, data, path, max(1, first_line), max(1, lines))

    @tool
    async def file_list(path: str = ".") -> str:
        """List a folder below the root: a line for each entry, folders end with a slash, files tell their bytes."""
        return await asyncio.to_thread(list_folder, roots, data, path)

    @tool
    async def file_search(text: str, path: str = ".", name: str = "*") -> str:
        """Find lines that contain a text, ignoring case, in the files below a folder whose names match a pattern."""
        return await asyncio.to_thread(search_files, roots, data, text, path, name)

    @tool
    async def messages_search(query: str) -> str:
        """Search the user's own earlier conversations for words."""
        found = await domain.messages.read(search_texts, {"user_id": CALLER.get(), "q": query, "limit": 20})
        rows = [f"[{one['created_at'][:10]} {one['role']}] {one['snippet']}" for one in found]
        return "\n\n".join(rows) or "nothing found"

    return mcp.Client(own)


@contextlib.contextmanager
def opened(roots: list[str], data: pathlib.Path, path: str):
    """A descriptor of what a path means below the first root that has it. ValueError says why not."""
    steps = [step for step in path.split("/") if step not in ("", ".")]
    absolute, fault = os.path.isabs(path), ValueError(f"{path!r} is outside of what may be read")
    for root in () if ".." in steps or "\0" in path else roots:
        above = [step for step in root.split("/") if step]
        if absolute and steps[: len(above)] != above:
            continue
        try:
            place = open_below(root, steps[len(above) :] if absolute else steps, data)
        except OSError as error:
            words = (
                "is a symbolic link, which is not followed" if error.errno == errno.ELOOP else error.strerror.lower()
            )
            fault = ValueError(f"{path!r}: {words}")
            continue
        try:
            yield place
        finally:
            os.close(place)
        return
    raise fault


def open_below(root: str, steps: list[str], data: pathlib.Path) -> int:
    if pathlib.Path(root).resolve().is_relative_to(data):
        raise PermissionError(errno.EPERM, "is outside of what may be read")
    place = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for step in (".", *steps):
            inner = os.open(step, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
            os.close(place)
            place = inner
            if is_hidden(os.fstat(place), data):
                raise PermissionError(errno.EPERM, "is outside of what may be read")
        return place
    except OSError:
        os.close(place)
        raise


def is_hidden(seen: os.stat_result, data: pathlib.Path) -> bool:
    """Whether this is data/, or a file with several names that is one of its own."""
    if not data.exists() or os.path.samestat(seen, os.stat(data)):
        return data.exists()
    if seen.st_nlink == 1 or not stat.S_ISREG(seen.st_mode):
        return False
    inside = (pathlib.Path(folder, name) for folder, _, names in os.walk(data) for name in names)
    return any(os.path.samestat(seen, one.lstat()) for one in inside)


def read_text(place: int, path: str, first_line: int = 1, count: int | None = None) -> str:
    """Lines of an opened regular file, at most FILE_BYTES of them."""
    seen = os.fstat(place)
    if not stat.S_ISREG(seen.st_mode):
        raise ValueError(f"{path!r} is no regular file")
    with open(os.dup(place), "rb") as file:
        if b"\0" in file.read(8192):
            raise ValueError(f"{path!r} is a binary file of {seen.st_size} bytes")
        file.seek(0)
        lines = iter(functools.partial(file.readline, FILE_BYTES), b"")
        chosen = itertools.islice(lines, first_line - 1, None if count is None else first_line - 1 + count)
        taken, total = [], 0
        for line in chosen:
            total += len(line)
            if total > FILE_BYTES:
                taken.append(
                    f"[cut at {FILE_BYTES} bytes of a file of {seen.st_size}: read on from a later line]".encode()
                )
                break
            taken.append(line)
    return b"".join(taken).decode("utf-8", "replace")


def read_file(roots: list[str], data: pathlib.Path, path: str, first_line: int, count: int) -> str:
    with opened(roots, data, path) as place:
        return read_text(place, path, first_line, count) or "(empty)"


def list_folder(roots: list[str], data: pathlib.Path, path: str) -> str:
    with opened(roots, data, path) as place:
        entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        rows = [list_row(entry) for entry in entries[:LIST_ENTRIES]]
    rows += [f"[{len(entries) - LIST_ENTRIES} more]"] if len(entries) > LIST_ENTRIES else []
    return "\n".join(rows) or "(empty)"


def list_row(entry) -> str:
    if entry.is_dir(follow_symlinks=False):
        return f"{entry.name}/"
    return f"{entry.name}  {entry.stat(follow_symlinks=False).st_size}"


def search_files(roots: list[str], data: pathlib.Path, text: str, path: str, name: str) -> str:
    found, deadline = [], time.monotonic() + SEARCH_SECONDS
    with opened(roots, data, path) as top:
        for folder, folders, files, place in os.fwalk(".", dir_fd=top, follow_symlinks=False):
            seen = {one: os.stat(one, dir_fd=place, follow_symlinks=False) for one in folders if one[0] != "."}
            folders[:] = [one for one in sorted(seen) if not is_hidden(seen[one], data)]
            for one in fnmatch.filter(sorted(files), name):
                if len(found) >= SEARCH_LINES or time.monotonic() > deadline:
                    return "\n".join([*found, "[there may be more: search for less, or in a smaller folder]"])
                inner = os.path.normpath(os.path.join(folder, one))
                with contextlib.suppress(ValueError), opened(roots, data, os.path.join(path, inner)) as file:
                    for number, line in enumerate(read_text(file, one).split("\n"), 1):
                        if text.lower() in line.lower():
                            found.append(
                                f"{os.path.normpath(os.path.join(path, inner))}:{number}: {line.strip()[:200]}"
                            )
    return "\n".join(found[:SEARCH_LINES]) or "nothing found"


################ Runs
# A reply being generated lives here, in a task of its own, whoever listens. It is kept as (position, event): the newest
# tokens as they came, older ones joined, so that any follower, live or late, reads on from its position on one path.


class Run:
    """One reply in the making. `stored` is the position on disk; `done` the last event, once there is one."""

    def __init__(self, call: Call, thread_id: str, user_message_id: str, provider: Provider, model: str):
        self.message_id, self.thread_id, self.user_id = str(uuid.uuid4()), thread_id, call.user_id
        self.user_message_id, self.speaker = user_message_id, None
        self.provider, self.model, self.request_id = provider, f"{provider.name}/{model}", call.request_id
        self.events, self.starts, self.compacted = [], [], 0
        self.position = self.stored = 0
        self.half = None  # (type, high surrogate) whose other half is still to come
        self.usages = [None]  # what the provider said, one for each round
        self.stop_reason = self.blocks = self.done = self.stopping = self.task = self.request = None
        self.calls, self.tools, self.allow = [], {}, []  # of this round; offered by wire name; allowed for this run
        self.created_at, self.began, self.first_at, self.called_at = now(), time.monotonic(), None, None
        self.heard_at = self.stored_at = self.began
        self.patience, self.late, self.storing, self.running, self.waiters = None, False, False, False, []
        self.inserted = asyncio.get_running_loop().create_future()  # its row is on disk
        self.ended = asyncio.get_running_loop().create_future()  # `done` may be told

    def expect(self, seconds: float | None) -> None:
        """The provider was just heard (or called), and has so long for its next byte; None: nothing is waited for."""
        self.heard_at, self.patience = time.monotonic(), seconds

    def stop(self, reason: Problem | str) -> None:
        """End the run: "cancelled", or a Problem. The first reason counts; once its end is being stored none does."""
        if self.stopping is None:
            self.stopping = reason
            if self.running:  # else its first step finds the reason
                self.task.cancel()

    def append(self, event: dict) -> None:
        self.starts.append(self.position)
        self.events.append(event)
        self.position += size(event)
        if len(self.events) - self.compacted > 2 * RECENT:
            self.compact()

    def compact(self) -> None:
        """Join what is older than the newest tokens: a block of RECENT becomes a piece or a few."""
        block = list(bounded_pieces(self.events[self.compacted : -RECENT]))
        starts = list(itertools.accumulate(map(size, block[:-1]), initial=self.starts[self.compacted]))
        self.events[self.compacted : -RECENT], self.starts[self.compacted : -RECENT] = block, starts
        self.compacted += len(block)

    def after(self, position: int, limit: int | None = PAGE) -> list[dict]:
        """The events strictly after a position, at most `limit` of them."""
        if position >= self.position:
            return []
        place = bisect.bisect_right(self.starts, position) - 1
        found = self.events[place : limit and place + limit]
        return cut(found, position - self.starts[place]) if position > self.starts[place] else found

    def wake(self) -> None:
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def changed(self) -> asyncio.Future:
        self.waiters.append(asyncio.get_running_loop().create_future())
        return self.waiters[-1]

    def tell(self, done: dict) -> None:
        """The last event, once."""
        self.done = self.done or {**done, "timing": {**NO_TIMING, **done["timing"]}}
        self.wake()

    def usage(self, whole: bool) -> dict:
        """Tokens summed over the rounds, and their cost; estimated where the provider did not say, or was cut off."""
        told = [usage for usage in self.usages if usage]
        counts = {name: sum(one[name] for one in told) for name in COUNTS}
        estimated = not whole or len(told) < len(self.usages)
        if estimated:
            said = sum(tokens_of(encode_json(event)) for event in self.events if event["type"] == "tool_call")
            said += tokens_of("".join(event["text"] for event in self.events if event["type"] in ("text", "thinking")))
            counts["output_tokens"] = max(counts["output_tokens"], said)
            counts["input_tokens"] = counts["input_tokens"] or self.request["tokens"]
        return {**counts, "cost": self.cost(counts), "estimated": estimated}

    def cost(self, counts: dict) -> float | None:
        name = self.model.partition("/")[2]
        for glob, (fresh, cached, output) in self.provider.prices.items():
            if fnmatch.fnmatchcase(name, glob):
                paid = (counts["input_tokens"] - counts["cached_tokens"]) * fresh + counts["cached_tokens"] * cached
                return round((paid + counts["output_tokens"] * output) / 1_000_000, 8)
        return None

    def timing(self) -> dict:
        ended = time.monotonic()
        seconds = ended - (self.first_at or ended)
        tokens = sum(usage["output_tokens"] for usage in self.usages if usage)
        since = {"provider_ttft_ms": self.called_at, "domain_ttft_ms": self.began, "total_ms": self.began}
        until = {**dict.fromkeys(since, self.first_at), "total_ms": ended}
        told = {name: then and until[name] and round((until[name] - then) * 1000, 2) for name, then in since.items()}
        return {**told, "tokens_per_s": round(tokens / seconds, 1) if tokens and seconds > 0.001 else None}


def bounded_pieces(events: list[dict]):
    """The events joined, but no text longer than CHUNK."""
    for event in joined(events):
        yield from in_chunks(event)


def in_chunks(event: dict):
    if size(event) <= CHUNK:
        return [event]
    return [{**event, "text": event["text"][begin : begin + CHUNK]} for begin in range(0, len(event["text"]), CHUNK)]


async def run(domain: Domain, reply: Run) -> None:
    """The life of one reply: what the provider sends is recorded until it ends, fails or is stopped; then its tail and
    its final status go to disk, and only then is `done` told and the thread free."""
    status, problem, reply.running = "complete", None, True
    try:
        if reply.stopping:
            raise asyncio.CancelledError
        wanted = reply.request["tools"]  # patterns, None for all, False for none; servers may take a while to start
        reply.tools = (
            {} if wanted is False or reply.model.startswith("demo/load") else await domain.tools.offered(wanted)
        )
        reply.request["tools"] = reply.tools
        for number in itertools.count(1):
            async with contextlib.aclosing(read_provider(domain, reply)) as events_read:
                reply.called_at = reply.called_at or time.monotonic()
                async for events in events_read:
                    record(domain, reply, events)
            reply.expect(None)
            if reply.blocks is None:
                words = f"{reply.provider.name} ended in mid-answer, without its end marker: retry"
                raise Problem("provider_incomplete", words)
            if reply.stop_reason != "tool_use" or not reply.calls:
                break
            if number > domain.settings.tool_rounds:
                reply.stop_reason = "tool_rounds"
                break
            await run_tools(domain, reply)
    except asyncio.CancelledError:
        problem = reply.stopping if reply.stopping != "cancelled" else None
        status = "error" if problem else "cancelled"
    except Problem as fault:
        status, problem = "error", fault
        fault.message = reply.provider.hide(fault.message)
    except Exception:
        log.exception("the run of %s failed", reply.message_id)
        status, problem = "error", Problem("internal", OUR_ERROR)
    reply.stopping = reply.stopping or "ended"
    reply.expect(None)
    await asyncio.shield(finish(domain, reply, status, problem))


async def run_tools(domain: Domain, reply: Run) -> None:
    """Execute a round's calls in parallel, and put what was said and what came of it into the next round's request, in
    the provider's own form: thinking, signatures and raw blocks go back unchanged."""
    calls, said = reply.calls, reply.blocks
    results = await asyncio.gather(*[call_tool(domain, reply, call) for call in calls])
    if reply.provider.kind == "anthropic":
        blocks = list(map(anthropic_block, results))
        told = [{"role": "assistant", "content": said}, {"role": "user", "content": blocks}]
    else:
        told = [said, *map(openai_result, results)]
    reply.request["rounds"] += told
    reply.calls, reply.blocks, reply.stop_reason = [], None, None
    reply.usages.append(None)


def record(domain: Domain, reply: Run, events: list[dict]) -> None:
    """Take the events of one read into the run and wake whoever follows it."""
    for event in events:
        kind = event["type"]
        if kind == "text" or kind == "thinking":
            event = whole_text(reply, event)
            if not event["text"]:
                continue
            domain.tokens += 1
        elif kind == "usage":
            reply.usages[-1] = pick(event, *COUNTS)
            continue
        elif kind == "end":
            reply.stop_reason, reply.blocks = event["stop_reason"], event["blocks"]
            continue
        else:
            release_half(reply, kind)
            reply.calls += [event] if kind == "tool_call" else []
        if domain.settings.check_events:
            check_event(event)
        if (
            kind in ("text", "thinking") and len(event["text"]) > CHUNK
        ):  # a delta of a size that no model sends, but a server may
            for piece in in_chunks(event):
                reply.append(piece)
        else:
            reply.append(event)
    if reply.position and reply.first_at is None:
        reply.first_at = time.monotonic()
        domain.metrics.observe("liminal_provider_ttft_seconds", reply.first_at - reply.called_at)
        domain.metrics.observe("liminal_domain_ttft_seconds", reply.first_at - reply.began)
    reply.wake()


def whole_text(reply: Run, event: dict) -> dict:
    """The event with valid Unicode: a surrogate half at its end waits for the next delta of its type."""
    kind, text = event["type"], event["text"]
    if not isinstance(text, str):
        raise Problem("provider_error", f"{reply.provider.name} sent {kind} that is no text")
    if reply.half is None and text.isascii():
        return event
    text = release_half(reply, kind) + text
    if text and "\ud800" <= text[-1] <= "\udbff":
        reply.half, text = (kind, text[-1]), text[:-1]
    return {"type": kind, "text": valid(text)}


def release_half(reply: Run, kind: str | None) -> str:
    """The held half, to be joined with more of its type; where another type follows it is lost and shown as U+FFFD."""
    held, reply.half = reply.half, None
    if held is None or held[0] == kind:
        return held[1] if held else ""
    reply.append({"type": held[0], "text": "\ufffd"})
    return ""


async def finish(domain: Domain, reply: Run, status: str, problem: Problem | None) -> None:
    """Store a reply's tail and final status, then tell `done`. Where the disk refuses, say so, and try again."""
    release_half(reply, None)
    error = problem and problem.detail(reply.request_id)
    rest = {"stop_reason": reply.stop_reason, "usage": reply.usage(status == "complete"), "timing": reply.timing()}
    done = {"type": "done", "status": status, "position": reply.position, **rest, "error": error}
    with contextlib.suppress(asyncio.CancelledError):
        await reply.inserted
    for wait in itertools.chain((0.5, 1, 2), itertools.repeat(5)):
        if reply.inserted.cancelled():  # its first commit failed: the client was told so, nothing of it exists
            break
        try:
            tail = reply.after(reply.stored, None)
            await domain.messages.write(finish_message, reply.message_id, reply.stored, tail, done)
            break
        except Exception as fault:  # nothing may leave a reply without its end
            told = fault if isinstance(fault, Problem) else Problem("internal", OUR_ERROR)
            log.error("the end of %s cannot be stored: %s", reply.message_id, fault, exc_info=told is not fault)
            reply.tell({**done, "status": "error", "error": told.detail(reply.request_id)})
            if told.code != "storage_full":
                break
            await asyncio.sleep(wait)
    reply.stored = reply.position
    reply.tell(done)
    domain.release(reply)
    reply.ended.set_result(None)
    domain.metrics.count("liminal_runs_total", status=reply.done["status"])
    if done["timing"]["tokens_per_s"]:
        domain.metrics.observe("liminal_tokens_per_second", done["timing"]["tokens_per_s"])
    if status == "cancelled":
        domain.metrics.count("liminal_cancellations_total")
    if error:
        domain.metrics.count("liminal_run_errors_total", code=error["code"])
        log.warning("%s of %s ended: %s (%s)", reply.message_id, reply.model, problem.message, problem.code)


async def tend(domain: Domain) -> None:
    """Twice a second, for all runs: store what the Edge has not brought, end what is silent for too long (only if a
    second look finds nothing either: a stopped process finds its data waiting), and wake followers for a ping."""
    for beat in itertools.count():
        await asyncio.sleep(0.5)
        clock = time.monotonic()
        for reply in list(domain.runs.values()):
            late = reply.patience is not None and clock - reply.heard_at > reply.patience
            if late and reply.late:
                words = f"{reply.provider.name} sent nothing for {reply.patience:g} s (LIMINAL_PROVIDER_TIMEOUTS)"
                reply.stop(Problem("provider_timeout", words))
            reply.late = late
            if reply.stored == reply.position:
                reply.stored_at = clock
            elif clock - reply.stored_at > LAG and reply.inserted.done() and not reply.storing:
                domain.background(store_run(domain, reply))
            if not beat % 2:
                reply.wake()


async def store_run(domain: Domain, reply: Run) -> None:
    """Store what a run holds beyond the disk: nobody else has brought it for LAG seconds."""
    reply.storing = True
    try:
        parts = reply.after(reply.stored, None)
        stored = await domain.messages.write(append_parts, reply.message_id, reply.stored, parts)
        reply.stored, reply.stored_at = max(reply.stored, stored), time.monotonic()
        domain.metrics.count("liminal_stored_by_domain_total")
    finally:
        reply.storing = False


async def stream_run(domain: Domain, call: Call, message_id: str, after: int) -> web.StreamResponse:
    """A reply's events strictly after a position as NDJSON: from its run while there is one, else from disk."""
    reply = domain.runs.get(message_id)
    row = None if reply else await domain.messages.read(find_message, {"message_id": message_id, "user_id": None})
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    with contextlib.suppress(ConnectionError):  # the Edge has gone: it detaches, the run goes on
        await response.prepare(call.request)
        if reply:
            await follow_live(response, reply, after)
        else:
            await replay_stored(domain, response, row, after)
    return response


async def follow_live(response: web.StreamResponse, reply: Run, position: int) -> None:
    await response.write(lines([start_of(vars(reply), position)]))
    written = time.monotonic()
    while True:
        if events := reply.after(position):
            position += sum(map(size, events))
            await response.write(lines(events))
        elif reply.done:
            return await response.write(lines([reply.done]))
        else:
            await reply.changed()
            if reply.position > position or reply.done or time.monotonic() - written < PING:
                continue
            await response.write(b"\n")
        written = time.monotonic()


async def replay_stored(domain: Domain, response: web.StreamResponse, row: dict, position: int) -> None:
    known = {**row, "message_id": row["id"], "user_message_id": row["parent_id"], "user_id": None}
    await response.write(lines([start_of(known, position)]))
    while pages := await domain.messages.read(read_chunks, row["id"], position, PAGE):
        for parts in pages:
            position += sum(map(size, parts))
            await response.write(lines(parts))
    await response.write(lines([done_of(await domain.messages.read(find_message, known))]))


def lines(events: list[dict]) -> bytes:
    return "".join([encode_json(event) + "\n" for event in events]).encode()


def start_of(known: dict, position: int) -> dict:
    named = pick(known, "message_id", "thread_id", "user_message_id", "speaker", "model")
    return {"type": "start", **named, "position": position}


def done_of(row: dict) -> dict:
    ended = pick(row, "status", "position", "stop_reason", "usage", "error")
    return {"type": "done", **ended, "timing": row["timing"] and {**NO_TIMING, **row["timing"]}}


################ Beginning and ending a reply
# Who repeats a request finds what the first one began. A thread has one running reply, held before the first await.


class Domain:
    """What the handlers share: settings, the two databases, the runs by message and by thread."""

    def __init__(self, settings: Settings):
        self.settings, self.metrics = settings, Metrics(METRICS)
        self.liminal, self.messages = Database(settings.data / "liminal.db"), Database(settings.data / "messages.db")
        self.runs: dict[str, Run] = {}
        self.busy: dict[str, Run] = {}
        self.deleting: set[str] = set()  # threads that take no new reply any more
        self.locks = weakref.WeakValueDictionary()  # (user, Idempotency-Key): held until its first commit
        self.own_providers, self.models, self.clients, self.tasks, self.tokens = [], {}, {}, set(), 0
        self.first_byte, self.next_byte = map(float, settings.provider_timeouts.split(","))
        self.http, self.public_key, self.tools = None, (None, None), Tools(self)
        self.metrics.gauges = {
            "liminal_running_replies": lambda: len(self.runs),
            "liminal_tokens_total": lambda: self.tokens,
        }

    def providers(self) -> dict[str, Provider]:
        self.settings = self.settings.fresh()
        return all_providers(self.settings, self.own_providers)

    def anthropic_client(self, anthropic, provider: Provider):
        """One client for each key and address; retries are ours, redirects (which would carry the key away) refused."""
        place = provider.base_url, provider.key
        if place not in self.clients:
            timeout = anthropic.Timeout(None, connect=CONNECT)
            http = anthropic.DefaultAioHttpClient(follow_redirects=False, timeout=timeout)
            client = anthropic.AsyncAnthropic(api_key=provider.key, base_url=provider.base_url, http_client=http)
            self.clients[place] = client.with_options(timeout=timeout, max_retries=0)
        return self.clients[place]

    def background(self, work) -> None:
        """Let something go on by itself; an error of it is logged."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.forget)

    def forget(self, task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("in the background: %s", task.exception())

    @contextlib.contextmanager
    def held(self, reply: Run):
        """The thread is this reply's, or Problem `thread_busy`; taken back where its first commit fails."""
        if reply.thread_id in self.deleting:
            raise Problem("not_found", "this thread is being deleted")
        if other := self.busy.get(reply.thread_id):
            words = "a reply is still being generated in this thread: attach to it, stop it, or wait"
            raise Problem("thread_busy", words, message_ids=[other.message_id])
        self.busy[reply.thread_id] = reply
        try:
            yield
        except BaseException:
            reply.inserted.cancel()
            reply.stop("cancelled")
            self.release(reply)
            if reply.task is None:
                reply.ended.set_result(None)
            raise

    def release(self, reply: Run) -> None:
        self.runs.pop(reply.message_id, None)
        if self.busy.get(reply.thread_id) is reply:
            del self.busy[reply.thread_id]


async def begin_once(domain: Domain, call: Call, begin) -> str:
    """The message id of the reply that this request began, now or at an earlier try with the same Idempotency-Key."""
    key = call.arguments["Idempotency-Key"] or str(uuid.uuid4())
    asked = [call.operation.id, dict(call.request.match_info), call.body]
    fingerprint = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    values = {"user_id": call.user_id, "key": key, "request_hash": fingerprint}
    async with domain.locks.setdefault((call.user_id, key), asyncio.Lock()):
        known = await domain.messages.read(find_idempotency_key, values)
        if not known:
            return await begin(domain, call, values)
    if known[0]["request_hash"] != fingerprint:
        raise Problem("conflict", KEY_USED, field="Idempotency-Key")
    return known[0]["message_id"]


async def begin_message(domain: Domain, call: Call, key: dict) -> str:
    """A user's message and the run of its reply; a new thread where none is named."""
    body = call.body
    if fresh := "thread_id" not in body:
        if "parent_id" in body:
            raise Problem("invalid_request", "parent_id needs the thread_id of its thread", field="parent_id")
        thread = new_thread(call, key["key"], title=title_of(body["content"]))
    else:
        thread = await domain.liminal.read(find_thread, asked(call))
    provider, model = await find_model(domain, body.get("model") or thread["model"])
    reply = Run(call, thread["id"], str(uuid.uuid4()), provider, model)
    with domain.held(reply):
        parent = None
        if not fresh:
            await domain.liminal.read(find_thread, vars(reply))  # it was not deleted before we held it
            parent = await find_parent(domain, reply.user_id, reply.thread_id, body.get("parent_id"))
        said = [{"type": "text", "text": body["content"]}]
        await make_request(domain, reply, body, parent, said, body.get("system", thread["system"]))
        await commit_start(domain, reply, thread if fresh else None, parent, said, key)
    return reply.message_id


async def begin_retry(domain: Domain, call: Call, key: dict) -> str:
    """A new reply to the user's message that this one is, or answers."""
    row = await domain.messages.read(find_message, asked(call))
    target = row["id"] if row["role"] == "user" else row["parent_id"]
    thread = await domain.liminal.read(find_thread, {"user_id": call.user_id, "thread_id": row["thread_id"]})
    provider, model = await find_model(domain, call.body.get("model") or row["model"] or thread["model"])
    reply = Run(call, thread["id"], target, provider, model)
    with domain.held(reply):
        await domain.messages.read(find_message, {"user_id": call.user_id, "message_id": target})
        await make_request(domain, reply, call.body, target, [], thread["system"])
        await commit_start(domain, reply, None, None, [], key)
    return reply.message_id


async def find_parent(domain: Domain, user_id: str, thread_id: str, ref: str | None) -> str | None:
    values = {"user_id": user_id, "thread_id": thread_id, "message_id": ref}
    if ref is None:
        return next((row["id"] for row in await domain.messages.read(newest_finished, values)), None)
    row = await domain.messages.read(find_message, values)
    if row["thread_id"] != thread_id:
        raise Problem("not_found", f"there is no message {ref!r} in this thread", field="parent_id")
    return row["id"]


async def make_request(
    domain: Domain, reply: Run, body: dict, parent: str | None, said: list, system: str | None
) -> None:
    """What a provider's reader needs. `tokens` estimates the prompt, for a provider that does not tell; `rounds` holds,
    in the provider's own form, what this run's tool rounds have added."""
    messages = await domain.messages.read(read_prompt, parent, said, system, domain.settings.context)
    tokens, reply.allow = tokens_of(system or "") + prompt_tokens(messages), body.get("allow") or []
    asked = {name: body.get(name) for name in ("max_tokens", "temperature", "tools")}
    asked |= {"model": reply.model.partition("/")[2], "options": body.get("options") or {}}
    reply.request = {**asked, "system": system, "messages": messages, "tokens": tokens, "rounds": []}


async def commit_start(domain: Domain, reply: Run, thread: dict | None, parent: str | None, said: list, key: dict):
    """Call the provider, and meanwhile put on disk what the client is about to be told: first a new thread, then a new
    user's message, the reply and the key, in one transaction. A failed insert closes the call."""
    domain.runs[reply.message_id] = reply
    reply.task = asyncio.create_task(run(domain, reply))
    if thread:
        await domain.liminal.write(insert_thread, thread)
    time, common = reply.created_at, pick(vars(reply), "thread_id", "user_id", "created_at")
    user = {"id": reply.user_message_id, "parent_id": parent, "role": "user", "model": None, "status": "complete"}
    answer = {"id": reply.message_id, "parent_id": reply.user_message_id, "role": "assistant", "model": reply.model}
    rows = [{**common, **user, "completed_at": time}] if said else []
    rows.append({**common, **answer, "status": "pending", "completed_at": None})
    key = {**key, "message_id": reply.message_id, "created_at": time}
    await domain.messages.write(insert_exchange, rows, said, key)
    reply.inserted.set_result(None)
    if not thread:
        title = title_of(said[0]["text"]) if said else None
        domain.background(domain.liminal.write(touch_thread, {"id": reply.thread_id, "time": time, "title": title}))


def new_thread(call: Call, key: str | None = None, **more) -> dict:
    """A thread's row. Its id is derived from user and Idempotency-Key: a repeated POST means the same thread."""
    fields = ("title", "system", "model", "forked_from_thread_id", "forked_from_message_id")
    key, time = key or call.arguments["Idempotency-Key"] or str(uuid.uuid4()), now()
    known = {"id": str(uuid.uuid5(uuid.UUID(call.user_id), key)), "created_at": time, "updated_at": time}
    return {**{name: call.body.get(name) for name in fields}, **more, **known, "user_id": call.user_id}


def title_of(content: str) -> str:
    """The first words of a message, at most TITLE characters."""
    words = " ".join(content[: 10 * TITLE].split())
    if len(words) <= TITLE:
        return words
    return (words[: TITLE - 1].rsplit(" ", 1)[0] if " " in words[:TITLE] else words[: TITLE - 1]) + "…"


################ Handlers: messages
# Bound by operationId. `call` is checked already; what is returned is checked on its way out.


def asked(call: Call) -> dict:
    """What a call asks by name, as values for statements; whose call it is cannot be asked."""
    return {**call.arguments, **(call.body or {}), "user_id": call.user_id, "time": now()}


def job(database: str, way: str, fn, name: str | None = None):
    """A handler that is one statement, of the call's own values; `name` is what its rows are called in the reply."""

    async def handler(domain: Domain, call: Call):
        found = await getattr(getattr(domain, database), way)(fn, asked(call))
        return {name: found} if name else found

    return handler


domain_add_reaction = job("messages", "write", insert_reaction, "reactions")
domain_remove_reaction = job("messages", "write", delete_reaction, "reactions")
domain_search_messages = job("messages", "read", search_texts, "results")
domain_list_threads = job("liminal", "read", select_threads, "threads")
domain_get_thread = job("liminal", "read", find_thread)
domain_update_thread = job("liminal", "write", change_thread)
domain_list_users = job("liminal", "read", select_users, "users")
domain_list_keys = job("liminal", "read", select_keys, "keys")
domain_revoke_key = job("liminal", "write", remove_key)
domain_create_session = job("liminal", "write", insert_session)
domain_delete_session = job("liminal", "write", remove_session)


async def domain_send_message(domain: Domain, call: Call):
    return await stream_run(domain, call, await begin_once(domain, call, begin_message), 0)


async def domain_retry_message(domain: Domain, call: Call):
    return await stream_run(domain, call, await begin_once(domain, call, begin_retry), 0)


async def domain_stream_message(domain: Domain, call: Call):
    row = await find_reply(domain, call)
    after, reply = call.arguments["after"] or 0, domain.runs.get(row["id"])
    interrupted = row["error"] and row["error"]["code"] == "interrupted"
    if after > (reply.position if reply else row["position"]) and not interrupted:
        raise Problem("invalid_request", f"position {after} is past the end of this reply", field="after")
    return await stream_run(domain, call, row["id"], after)


async def domain_get_message(domain: Domain, call: Call):
    return with_run(domain, await domain.messages.read(read_message, asked(call)))


async def domain_list_messages(domain: Domain, call: Call):
    thread = await domain.liminal.read(find_thread, asked(call))
    found = await domain.messages.read(select_messages, {**asked(call), "thread_id": thread["id"]})
    return {"messages": [with_run(domain, message) for message in found]}


def with_run(domain: Domain, message: dict) -> dict:
    """A message with what its run, if there is one, holds beyond the disk."""
    reply = domain.runs.get(message["id"])
    if reply is None:
        return message
    parts, status = joined(reply.after(0, None)), "streaming" if reply.position else "pending"
    return {**message, "parts": parts, "content": text_of(parts), "position": reply.position, "status": status}


async def domain_cancel_message(domain: Domain, call: Call):
    """The receipt. `upstream_closed` is true by construction: a run ends only after its provider's connection."""
    row = await find_reply(domain, call)
    if reply := domain.runs.get(row["id"]):
        reply.stop("cancelled")
        while not reply.done:
            await reply.changed()
    done = reply.done if reply else await domain.messages.read(find_message, {**asked(call), "message_id": row["id"]})
    return {"message_id": row["id"], **pick(done, "status", "position", "usage"), "upstream_closed": True}


async def find_reply(domain: Domain, call: Call):
    row = await domain.messages.read(find_message, asked(call))
    if row["role"] != "assistant":
        raise Problem("invalid_request", "this is a user's message, not a reply", field="message_id")
    return row


async def domain_list_runs(domain: Domain, call: Call):
    names = ("message_id", "thread_id", "user_id", "model", "speaker", "position", "stored", "created_at")
    mine = [reply for reply in domain.runs.values() if call.user_id in (None, reply.user_id) and reply.inserted.done()]
    return {"runs": [pick(vars(reply), *names) for reply in mine]}


async def domain_get_stats(domain: Domain, call: Call):
    told, models = domain.metrics, await domain.messages.read(sum_models, asked(call))
    ttft = {f"{hop}_ttft_ms": told.quantiles(f"liminal_{hop}_ttft_seconds", 1000) for hop in ("provider", "domain")}
    cancelled = int(told.value("liminal_cancellations_total"))
    rest = {"tokens": domain.tokens, "runs": len(domain.runs), "cancellations": cancelled, "models": models}
    return {**ttft, "tokens_per_s": told.quantile("liminal_tokens_per_second", 0.5), **rest}


async def domain_get_status(domain: Domain, call: Call):
    paths = [domain.settings.data / name for name in ("liminal.db", "messages.db")]
    return {"databases": {path.name: await asyncio.to_thread(check_database, path) for path in paths}}


async def domain_store_bundles(domain: Domain, call: Call):
    """Store what the Edge brings, in its order. A bundle above what is stored before it is filled up from the run."""
    ends, bundles = {}, []
    for bundle in call.body["bundles"]:
        message_id, end = bundle["message_id"], bundle["position"] + sum(map(size, bundle["parts"]))
        if reply := domain.runs.get(message_id):
            known = ends.get(message_id, reply.stored)
            if bundle["position"] > known:
                held = first_positions(reply.after(known, None), end - known)
                bundle = {**bundle, "position": known, "parts": held}
            ends[message_id] = max(known, end)
        bundles.append(bundle)
    stored = await domain.messages.write(lengthen, bundles)
    for message_id, position in stored.items():
        if (reply := domain.runs.get(message_id)) and position != "gone" and position > reply.stored:
            reply.stored, reply.stored_at = position, time.monotonic()
    domain.metrics.count("liminal_stored_bundles_total", len(bundles))
    return {"messages": stored}


################ Handlers: threads, models, providers, users, keys


async def domain_create_thread(domain: Domain, call: Call):
    return await create_thread(domain, new_thread(call))


async def create_thread(domain: Domain, thread: dict) -> dict:
    """A new thread, or the one that the same request made before; `conflict` where its key was used for another."""
    await domain.liminal.write(insert_thread, thread)
    found = await domain.liminal.read(find_thread, {**thread, "thread_id": thread["id"]})
    untouched = found["updated_at"] == found["created_at"]
    names = ("forked_from", "title", "system", "model") if untouched else ("forked_from",)
    if pick(found, *names) != pick(thread_of(thread), *names):
        raise Problem("conflict", KEY_USED, field="Idempotency-Key")
    return found


async def domain_fork_thread(domain: Domain, call: Call):
    """The copy's new ids are derived, so that a repeated POST makes no second one; the thread is written first."""
    old = await domain.liminal.read(find_thread, asked(call))
    last = await find_parent(domain, call.user_id, old["id"], call.body["message_id"])
    if last in domain.runs:
        words = "this reply is still being generated: stop it or wait, then fork"
        raise Problem("thread_busy", words, message_ids=[last])
    more = {"forked_from_thread_id": old["id"], "forked_from_message_id": last, **pick(old, "title", "system", "model")}
    thread = new_thread(call, **more)
    made = await create_thread(domain, thread)
    await domain.messages.write(copy_way, last, thread["id"])
    return made


async def domain_delete_thread(domain: Domain, call: Call):
    await delete_threads(domain, [(await domain.liminal.read(find_thread, asked(call)))["id"]])


async def delete_threads(domain: Domain, ids: list[str]) -> None:
    """Let no reply begin in the threads, cancel what runs there, then delete them, first where it is said which exist."""
    domain.deleting.update(ids)
    try:
        while running := [domain.busy[thread_id] for thread_id in ids if thread_id in domain.busy]:
            for reply in running:
                reply.stop("cancelled")
            await asyncio.wait([reply.ended for reply in running])
        for thread_id in ids:
            await domain.liminal.write(remove_thread, {"id": thread_id})
        await domain.messages.write(remove_messages, ids)
    finally:
        domain.deleting.difference_update(ids)


async def domain_list_models(domain: Domain, call: Call):
    providers = list(domain.providers().values())
    answers = await asyncio.gather(*[ask_models(domain, provider) for provider in providers])
    default, models = await default_model(domain), []
    for provider, (found, why) in zip(providers, answers):
        why = why or (None if found else "it has no models")
        for model in found or ["*"]:
            name = f"{provider.name}/{model}"
            known = {"id": name, "provider": provider.name, "default": name == default}
            models.append({**known, "available": why is None, "why": why})
    return {"models": models}


async def domain_list_tools(domain: Domain, call: Call):
    await domain.tools.offered(None)
    servers = [describe_server(domain, server) for server in domain.tools.servers.values()]
    return {"servers": servers, "why": domain.tools.why}


def describe_server(domain: Domain, server: ToolServer) -> dict:
    tools = []
    for tool in server.tools:
        why = domain.tools.refusal(tool, [])
        tools.append({"name": tool.full_name, "description": tool.description, "allowed": why is None, "why": why})
    return {**pick(vars(server), "name", "state", "why"), "tools": tools}


async def domain_list_providers(domain: Domain, call: Call):
    return {"providers": [describe(provider) for provider in domain.providers().values()]}


def describe(provider: Provider) -> dict:
    return {**{name: value for name, value in vars(provider).items() if name != "key"}, "key_set": bool(provider.key)}


async def domain_put_provider(domain: Domain, call: Call):
    name, body = call.arguments["name"], call.body
    if name in all_providers(domain.settings, []):
        raise Problem("conflict", f"{name} is built in; its variables change it (see `liminal --help`)", field="name")
    words = "a provider of this kind needs"
    if body["kind"] != "demo" and not body.get("base_url"):
        raise Problem("invalid_request", f"{words} its base_url", field="base_url")
    if body["kind"] == "anthropic" and not body.get("key_env"):
        raise Problem("invalid_request", f"{words} a key: name its variable in key_env", field="key_env")
    lists = {"models": body.get("models") or [], "prices": body.get("prices") or {}}
    row = {**dict.fromkeys(("base_url", "key_env")), **body, **lists, "name": name}
    await domain.liminal.write(replace_provider, row)
    domain.own_providers = await domain.liminal.read(select_providers)
    return describe(domain.providers()[name])


async def domain_delete_provider(domain: Domain, call: Call):
    if not await domain.liminal.write(remove_provider, asked(call)):
        raise Problem("not_found", f"there is no provider {call.arguments['name']!r} of your own")
    domain.own_providers = await domain.liminal.read(select_providers)


async def domain_create_user(domain: Domain, call: Call):
    user = {"role": "member", **call.body, "id": str(uuid.uuid4()), "created_at": now()}
    return await domain.liminal.write(insert_user, user)


async def domain_delete_user(domain: Domain, call: Call):
    user = await domain.liminal.read(find_user, call.arguments)
    if user["id"] == call.user_id:
        raise Problem("conflict", "you cannot delete yourself")
    threads = await domain.liminal.read(thread_ids, {"user_id": user["id"]})
    await delete_threads(domain, [thread["id"] for thread in threads])
    await domain.messages.write(remove_user_keys, user)
    await domain.liminal.write(remove_user, user)
    return user


async def domain_find_caller(domain: Domain, call: Call):
    """Noting when the key was used must neither delay the answer nor, on a full disk, refuse it."""
    caller = await domain.liminal.read(find_caller, asked(call))
    domain.background(domain.liminal.write(touch_key, {"time": now(), "key_id": caller["key_id"]}))
    return caller


async def domain_create_key(domain: Domain, call: Call):
    owner_id = call.user_id
    if ref := call.body.get("user_id"):
        caller = await domain.liminal.read(find_user, {"user_id": call.user_id})
        if caller["role"] != "owner" and ref != call.user_id:
            raise Problem("forbidden", "only an owner makes keys for others", field="user_id")
        owner_id = (await domain.liminal.read(find_user, {"user_id": ref}))["id"]
    secret = make_secret()
    key = new_key(owner_id, call.body["name"], secret)
    await domain.liminal.write(insert_key, key)
    return {**{name: value for name, value in key.items() if name != "hash"}, "secret": secret}


def make_secret() -> str:
    return "lt_sk_" + secrets.token_urlsafe(32)


def new_key(user_id: str, name: str, secret: str) -> dict:
    """A key's row. A secret of 256 random bits needs no salt and no slow hash."""
    known = {"id": str(uuid.uuid4()), "user_id": user_id, "name": name, "prefix": secret[:10]}
    return {**known, "hash": hashlib.sha256(secret.encode()).hexdigest(), "created_at": now(), "last_used_at": None}


async def health(domain: Domain, call: Call):
    return {"status": "ok", "server": "domain", "version": version(), "instance": domain.settings.instance}


async def metrics(domain: Domain, call: Call):
    return web.Response(text=domain.metrics.text(), content_type="text/plain", charset="utf-8")


################ The service JWT
# The Edge signs each call (EdDSA); the public key is read when a token first needs it, and again when its file changes.

LIFETIME = 60  # seconds between `iat` and `exp` at the most: a strict decode alone would take one of ten years


async def authenticate(domain: Domain, call: Call) -> None:
    import jwt

    scheme, _, token = call.request.headers.get("Authorization", "").partition(" ")
    if scheme != "Bearer":
        raise Problem("unauthorized", "the Domain takes only calls that the Edge has signed", field="Authorization")
    required = ["iss", "sub", "aud", "iat", "exp", "jti", "scopes"]
    try:
        given = {"algorithms": ["EdDSA"], "audience": "liminal-domain", "issuer": "liminal-edge"}
        claims = jwt.decode(token, edge_public_key(domain), options={"require": required}, **given)
    except jwt.PyJWTError as error:
        raise Problem("unauthorized", f"the Edge's token is not valid: {error}", field="Authorization") from None
    times = [claims[name] for name in ("iat", "exp") if isinstance(claims[name], (int, float))]
    fits = claims["sub"] == "edge-service" and len(times) == 2 and times[1] - times[0] <= LIFETIME
    if not fits or not isinstance(claims["scopes"], list):
        words = "its subject, lifetime or scopes are not as agreed"
        raise Problem("unauthorized", f"the Edge's token is not valid: {words}", field="Authorization")
    lacking = set(call.operation.security["edge"]) - set(map(str, claims["scopes"]))
    if lacking:
        raise Problem("forbidden", f"the Edge's token lacks the scope {min(lacking)}")


def edge_public_key(domain: Domain):
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    given = domain.settings.edge_public_key
    path = pathlib.Path(given or domain.settings.data / "edge_public_key.pem")
    seen = given if "-----BEGIN" in given else stamp(path)
    if seen != domain.public_key[0] or not seen:
        try:
            text = given.replace("\\n", "\n") if "-----BEGIN" in given else path.read_text()
            domain.public_key = seen, load_pem_public_key(text.encode())
        except (OSError, ValueError) as error:
            words = f"the Edge's public key cannot be read ({error}): start the Edge once"
            raise Problem("unauthorized", words, field="Authorization") from None
    return domain.public_key[1]


################ The server

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
RATES = (1, 5, 10, 20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500, 1000, 5000)
METRICS = {
    "liminal_running_replies": ("replies being generated now", None),
    "liminal_runs_total": ("replies ended, by status", None),
    "liminal_cancellations_total": ("replies cancelled", None),
    "liminal_run_errors_total": ("replies ended with an error, by its code", None),
    "liminal_tokens_total": ("tokens received from providers", None),
    "liminal_provider_retries_total": ("calls repeated because a provider was overloaded", None),
    "liminal_tool_calls_total": ("tool calls, by outcome", None),
    "liminal_stored_bundles_total": ("bundles that the Edge brought", None),
    "liminal_stored_by_domain_total": ("times a running reply was stored because the Edge was behind", None),
    "liminal_errors_total": ("requests refused, by code", None),
    "liminal_provider_ttft_seconds": ("from the call of a provider to its first token", SECONDS),
    "liminal_tokens_per_second": ("rate of a whole reply, from its first token on", RATES),
    "liminal_domain_ttft_seconds": ("from the Edge's request to the first token", SECONDS),
}


async def make_app(settings: Settings) -> web.Application:
    """Open the databases, mend what the last end cut off, bind the contract."""
    domain = Domain(settings)
    own = {name: fn for name, fn in globals().items() if name.startswith("domain_") or name in ("health", "metrics")}
    handlers = {name: functools.partial(fn, domain) for name, fn in own.items()}
    app = make_application("domain", handlers, functools.partial(authenticate, domain), settings, domain.metrics)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT)
    domain.http = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
    await make_owner(domain)
    domain.own_providers = await domain.liminal.read(select_providers)
    fault = Problem("interrupted", "the Domain ended while this reply was being generated: retry")
    values = {"error": encode_json(fault.detail(None)), "time": now()}
    if count := await domain.messages.write(interrupt_unfinished, values):
        log.warning("%d replies had been interrupted", count)
    domain.background(sweep(domain))
    domain.background(tend(domain))
    app.on_shutdown.append(lambda app: interrupt_runs(domain))
    app.on_cleanup.append(lambda app: close(domain))
    return app


async def make_owner(domain: Domain) -> None:
    """At the first start: an owner, whose key goes to data/cli.key. The file comes first, so that a crash between the
    two leaves a key that the next start takes up."""
    if await domain.liminal.read(select_users):
        return
    path = domain.settings.data / "cli.key"
    if not path.exists():
        write_private(path, make_secret() + "\n")
    secret, user_id = path.read_text().strip(), str(uuid.uuid4())

    def insert_owner(db):
        insert_user(db, {"id": user_id, "name": "owner", "role": "owner", "created_at": now()})
        insert_key(db, new_key(user_id, "cli", secret))

    await domain.liminal.write(insert_owner)


async def sweep(domain: Domain) -> None:
    """Delete messages of no thread: liminal.db says which exist. In this order no new thread can seem a lost one."""
    found = {row["thread_id"] for row in await domain.messages.read(message_threads)}
    known = {row["id"] for row in await domain.liminal.read(thread_ids, {"user_id": None})}
    if lost := sorted(found - known):
        log.warning("%d threads had left messages behind", len(lost))
        await domain.messages.write(remove_messages, lost)


async def interrupt_runs(domain: Domain) -> None:
    """SIGTERM: what came is stored as `interrupted`, and every follower is told."""
    running = list(domain.runs.values())
    for reply in running:
        reply.stop(Problem("interrupted", "the Domain was stopped while this reply was being generated: retry"))
    if running:
        await asyncio.wait([reply.ended for reply in running], timeout=5)


async def close(domain: Domain) -> None:
    await domain.tools.close()
    for task in domain.tasks:
        task.cancel()
    await domain.http.close()
    for client in domain.clients.values():
        await client.close()
    domain.liminal.close()
    domain.messages.close()


if __name__ == "__main__":
    serve("domain", make_app)
