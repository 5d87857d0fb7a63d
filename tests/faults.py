"""The fault run: servers are killed, stopped and restarted under many numbered streams, and nothing is lost.

    python tests/faults.py --seed 7 --seconds 1200

Client threads send messages and read their replies through an SSE decoder that is not ours (httpx2.EventSource), drop
their own connections at random bytes, and resume by Last-Event-ID after every break. Beside them a chaos loop breaks
things, in an order that its seed gives; what it breaks in mid-stream is given by bytes that clients have received.
Afterwards `faults_of` holds everything that was acknowledged against the three databases. Prints figures as JSON, and
exits with 1 where a promise was broken. Doubles nothing of ours: only the provider is fake.

Order: clients, chaos, what is checked, main.
"""

import argparse
import json
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import httpx2

from conftest import Liminal, Stream, with_provider
from provider import Provider

CLIENTS = 12
WIRES = ("anthropic", "openai")
RATES = (40, 100, 250)  # tokens a second
SECONDS = (0.2, 0.5, 1, 2, 4, 16)  # of a reply; the longest outlast an Edge that is away
FAULTS = ("cut", "end", "err")  # of the provider, see provider.py
FAULT_CHANCE, DROP_CHANCE, NEW_THREAD_CHANCE = 0.15, 0.6, 0.3
LAG = 2.0  # seconds of text that may be lost where both servers die: the design's worst case
TOGETHER = (
    3.0  # seconds within which the deaths of both servers may count as one: LAG, and the Domain's half-second beat
)
KINDS = {  # what the chaos loop does, and how often in one round
    "kill domain": 4,
    "kill edge": 4,
    "kill both": 3,
    "kill edge for 10 s, then domain": 1,
    "stop domain": 2,
    "stop edge": 2,
    "term domain": 1,
    "term edge": 1,
}


def numbered(n: int) -> str:
    return "".join(f" t{i}" for i in range(n))


################ Clients


@dataclass
class Sent:
    """One message and what its client saw of the reply; `start` is None until it is acknowledged."""

    content: str
    tokens: int
    rate: int
    fault: tuple[str, int] | None
    start: dict | None = None
    text: str = ""
    done: dict | None = None
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None


class Dropped(Exception):
    """The client has closed its own connection."""


class Cut:
    """A response of which only so many bytes are read."""

    def __init__(self, response, budget: int | None, count):
        self.response, self.budget, self.count = response, budget, count
        self.headers, self.request = response.headers, response.request

    def iter_text(self):
        for piece in self.response.iter_text():
            self.count(len(piece))
            if self.budget is not None and len(piece) >= self.budget:
                yield piece[: self.budget]
                raise Dropped
            self.budget = self.budget and self.budget - len(piece)
            yield piece


class Client(threading.Thread):
    """Sends one message after the other until `stop` is set, and follows each reply to its `done`, whatever breaks."""

    def __init__(self, run: "FaultRun", number: int):
        super().__init__(daemon=True)
        self.fault_run, self.number, self.sent, self.count = run, number, [], Counter()
        self.random = random.Random(f"{run.seed} client {number}")
        self.thread_id, self.wrong = None, []

    def run(self):
        try:
            while not self.fault_run.stop.is_set() and not self.wrong:
                self.send()
        except Exception as error:
            self.wrong.append(f"client {self.number} failed: {error!r}")

    def send(self):
        rate, wire = self.random.choice(RATES), self.random.choice(WIRES)
        tokens = max(5, int(rate * self.random.choice(SECONDS)))
        fault = (
            (self.random.choice(FAULTS), self.random.randint(1, tokens))
            if self.random.random() < FAULT_CHANCE
            else None
        )
        model = f"{wire}/say-{tokens}-{rate}" + (f"-{fault[0]}@{fault[1]}" if fault else "")
        if self.random.random() < NEW_THREAD_CHANCE:
            self.thread_id = None
        body = {"content": f"client {self.number} message {len(self.sent)}", "model": model}
        body |= {"thread_id": self.thread_id} if self.thread_id else {}
        sent = Sent(body["content"], tokens, rate, fault)
        self.sent.append(sent)
        headers, place = {"idempotency-key": str(uuid.UUID(int=self.random.getrandbits(128)))}, None
        while not sent.done and not self.wrong:
            if sent.start is None:
                place = self.follow(sent, "POST", "/api/v1/messages", body, headers)
            else:
                resume = {} if place is None else {"last-event-id": place}
                path = f"/api/v1/messages/{sent.start['message_id']}/stream"
                place = self.follow(sent, "GET", path, None, resume, place)
                self.count["resumes"] += 1
        sent.ended = time.monotonic()

    def follow(self, sent: Sent, method, path, body, headers, place=None) -> str | None:
        """Read one connection to its end, or drop it; the last event id seen."""
        budget = int(10 ** self.random.uniform(0, 4)) if self.random.random() < DROP_CHANCE else None
        try:
            with self.fault_run.liminal.stream(body, path, method, headers) as stream:
                if stream.status != 200:
                    return self.refused(stream, place)
                for event in httpx2.EventSource(Cut(stream.response, budget, self.fault_run.received)):
                    place = event.id or place
                    if event.data:
                        self.take(sent, json.loads(event.data))
            self.count["streams ended by a server"] += not sent.done
        except Dropped:
            self.count["dropped by the client"] += 1
        except httpx2.HTTPError:
            self.count["broken"] += 1
            time.sleep(0.1)
        return place

    def refused(self, stream: Stream, place):
        """Only an absent Domain is a reason to try again."""
        error = stream.body()["error"]
        if stream.status != 503:
            self.wrong.append(f"{self.sent[-1].content!r} got {stream.status} {error} after {place}")
        self.count["503"] += 1
        time.sleep(0.1)
        return place

    def take(self, sent: Sent, data: dict):
        if data["type"] == "start":
            if sent.start and sent.start["message_id"] != data["message_id"]:
                self.wrong.append(f"{sent.content!r} became another reply")
            sent.start = sent.start or data
            self.thread_id = data["thread_id"]
            if data["position"] != len(sent.text):
                self.wrong.append(f"{sent.content!r} resumed at {data['position']}, not {len(sent.text)}")
        elif data["type"] == "text":
            sent.text += data["text"]
        elif data["type"] == "done":
            sent.done = data


################ Chaos


class FaultRun:
    """One installation, its clients and what was done to it. `deaths`: (server, from, to, signal) of each end of
    a process."""

    def __init__(self, liminal: Liminal, seed: int):
        self.liminal, self.seed, self.random = liminal, seed, random.Random(seed)
        self.stop, self.changed, self.bytes = threading.Event(), threading.Condition(), 0
        self.deaths, self.done = [], Counter()
        self.clients = [Client(self, number) for number in range(CLIENTS)]

    def received(self, n: int):
        with self.changed:
            self.bytes += n
            self.changed.notify_all()

    def wait_bytes(self):
        """Until clients have received so many more bytes, or nothing comes."""
        with self.changed:
            aim = self.bytes + self.random.randint(1, 15_000)
            self.changed.wait_for(lambda: self.bytes >= aim, 3)

    def run(self, seconds: float) -> "FaultRun":
        """Break things for so long, then let everything end."""
        end = time.monotonic() + seconds
        for client in self.clients:
            client.start()
        while time.monotonic() < end and not any(client.wrong for client in self.clients):
            bag = [kind for kind, times in KINDS.items() for _ in range(times)]
            self.random.shuffle(bag)
            for kind in bag:
                if time.monotonic() < end:
                    self.wait_bytes()
                    self.act(kind)
                    self.done[kind] += 1
        self.stop.set()
        for client in self.clients:
            client.join(90)
            if client.is_alive():
                client.wrong.append(f"client {client.number} hangs in {client.sent[-1]}")
        return self

    def act(self, kind: str):
        action, _, what = kind.partition(" ")
        if what == "both":
            servers = self.random.sample(["edge", "domain"], 2)
            for name in servers:
                self.end(name, signal.SIGKILL)
                time.sleep(self.random.choice([0, 0, 0.1]))
            self.liminal.start(*self.random.sample(servers, 2))
        elif what.startswith("edge for 10 s"):
            self.end("edge", signal.SIGKILL)
            time.sleep(10.5)
            self.wait_at_domain()
            self.end("domain", signal.SIGKILL)
            self.liminal.start("domain", "edge")
        elif action == "stop":
            process = self.liminal.servers[what].process
            process.send_signal(signal.SIGSTOP)
            time.sleep(self.random.uniform(0.5, 4))
            process.send_signal(signal.SIGCONT)
        else:
            self.end(what, signal.SIGKILL if action == "kill" else signal.SIGTERM)
            time.sleep(self.random.choice([0, 0, 0.5, 3]))
            self.liminal.start(what)

    def wait_at_domain(self):
        """A moment of its own for the Domain's death, away from its half-second beat."""
        time.sleep(self.random.uniform(0, 0.5))

    def end(self, name: str, number: int):
        begun = time.monotonic()
        code = self.liminal.stop(name, number)
        self.deaths.append((name, begun, time.monotonic(), number))
        if number == signal.SIGTERM and code != 0:
            self.clients[0].wrong.append(f"the {name} exited with {code} after SIGTERM")

    @property
    def sent(self) -> list[Sent]:
        return [sent for client in self.clients for sent in client.sent]

    def domain_ended(self, sent: Sent) -> bool:
        """Whether the Domain ended while the reply ran, so that it may be `interrupted`."""
        return any(name == "domain" for name, *_ in self.deaths_during(sent))

    def deaths_during(self, sent: Sent) -> list[tuple]:
        return [death for death in self.deaths if sent.began <= death[2] and death[1] <= (sent.ended or death[1])]

    def both_died(self, sent: Sent) -> bool:
        """Whether both were killed at once while the reply ran: the Edge before the Domain had everything from it."""
        died = [(name, time) for name, _, time, number in self.deaths_during(sent) if number == signal.SIGKILL]
        domain, edge = [[time for name, time in died if name == which] for which in ("domain", "edge")]
        return any(abs(one - other) < TOGETHER for one in domain for other in edge)

    def wait_quiet(self):
        """Both up: until nothing runs and nothing waits."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            waiting, runs = self.liminal.api("GET", "/api/v1/overflow"), self.liminal.api("GET", "/api/v1/runs")
            if waiting[0] == runs[0] == 200 and not waiting[1]["waiting"] and not runs[1]["runs"]:
                return waiting[1]
            time.sleep(0.1)
        raise AssertionError(f"it does not become quiet: {waiting} {runs}")

    def figures(self) -> dict:
        counts = sum((client.count for client in self.clients), Counter())
        ends = Counter((one.done or {}).get("status", "no end") for one in self.sent)
        kills = Counter(name for name, *_, number in self.deaths if number == signal.SIGKILL)
        return {
            "seed": self.seed,
            "done": dict(self.done),
            "kills": {**kills, "all": sum(kills.values())},
            "replies checked": len(self.sent),
            "ended as": dict(ends),
            "bytes received": self.bytes,
            "clients": dict(counts),
        }


################ What is checked


def faults_of(run: FaultRun) -> list[str]:
    """Every promise that was broken, in words; the servers must have ended, so that the files hold all."""
    wrong = [words for client in run.clients for words in client.wrong]
    databases = {name: sqlite3.connect(run.liminal.data / f"{name}.db") for name in ("liminal", "messages", "overflow")}
    for name, db in databases.items():
        if (found := db.execute("pragma integrity_check").fetchall()) != [("ok",)]:
            wrong.append(f"{name}.db: {found}")
    if left := databases["overflow"].execute("select count(*) from overflow").fetchone()[0]:
        wrong.append(f"{left} bundles stay in overflow.db")
    messages = databases["messages"]
    wrong += faults_of_tree(messages, {row[0] for row in databases["liminal"].execute("select id from threads")})
    stored = {}
    for row in messages.execute(
        "select id, parent_id, role, status, position, json_extract(error, '$.code') from messages"
    ):
        wrong += faults_of_chunks(messages, row[0], row[4])
        stored[row[0]] = (*row[1:], content(messages, row[0]))
    for db in databases.values():
        db.close()
    for sent in run.sent:
        wrong += [f"{sent.content!r} ({sent.tokens} tokens): {words}" for words in faults_of_reply(run, sent, stored)]
    said = Counter(text for _, role, *_, text in stored.values() if role == "user")
    wrong += [f"{text!r} is stored {times} times" for text, times in said.items() if times != 1]
    return wrong + [f"{text!r} was never sent" for text in said.keys() - {sent.content for sent in run.sent}]


def faults_of_tree(db, threads: set[str]) -> list[str]:
    """Numbers 1 to n in each thread, only threads that exist, one reply to each message, nothing running."""
    rows = db.execute("select thread_id, number from messages order by thread_id, number").fetchall()
    wrong = []
    for thread_id, some in groupby(rows, lambda row: row[0]):
        numbers = [row[1] for row in some]
        wrong += [f"thread {thread_id} has numbers {numbers}"] if numbers != list(range(1, len(numbers) + 1)) else []
        wrong += [] if thread_id in threads else [f"thread {thread_id} does not exist"]
    replies = "select parent_id, count(*) from messages where role = 'assistant' group by 1 having count(*) != 1"
    wrong += [f"message {parent} has {count} replies" for parent, count in db.execute(replies)]
    running = "select id, status from messages where status not in ('complete', 'error')"
    return wrong + [f"message {message_id} is {status}" for message_id, status in db.execute(running)]


def faults_of_chunks(db, message_id: str, position: int) -> list[str]:
    """Each row begins where the last one ended, and the last one ends at the message's position."""
    at, wrong = 0, []
    for end, parts in db.execute("select position, parts from chunks where message_id = ? order by 1", (message_id,)):
        at += sum(len(part["text"]) for part in json.loads(parts))
        wrong += [f"a row of {message_id} ends at {end}, not {at}"] if at != end else []
    return wrong + ([f"{message_id} has {at} characters at position {position}"] if at != position else [])


def content(db, message_id: str) -> str:
    rows = db.execute("select parts from chunks where message_id = ? order by position", (message_id,))
    return "".join(part["text"] for row in rows for part in json.loads(row[0]))


def faults_of_reply(run: FaultRun, sent: Sent, stored: dict) -> list[str]:
    """One acknowledged message, held against what is stored of it and its reply."""
    if sent.start is None or sent.done is None:
        return ["it was never acknowledged, or never ended"]
    if sent.start["user_message_id"] not in stored or sent.start["message_id"] not in stored:
        return ["it was acknowledged, and is not stored"]
    _, _, status, _, _, said = stored[sent.start["user_message_id"]]
    parent, _, end, position, code, text = stored[sent.start["message_id"]]
    wrong = (
        [] if (said, status, parent) == (sent.content, "complete", sent.start["user_message_id"]) else ["it changed"]
    )
    whole = numbered(sent.fault[1] if sent.fault else sent.tokens)
    told = sent.done["status"], (sent.done["error"] or {}).get("code")
    if (end, code) != told:
        wrong.append(f"it was told as {told}, and is stored as {(end, code)}")
    if not whole.startswith(text) or not whole.startswith(sent.text):
        wrong.append(f"{len(text)} stored characters are no prefix of what the provider sent, or {len(sent.text)} seen")
    if code == "interrupted" and not run.domain_ended(sent):
        wrong.append("it was interrupted, though the Domain did not end")
    if code != "interrupted":
        wrong += faults_of_end(sent, end, code, text == whole)
    lost = len(sent.text) - len(text)
    allowed = sent.rate * LAG * len(f" t{sent.tokens}") if code == "interrupted" and run.both_died(sent) else 0
    if lost > allowed:
        wrong.append(f"{lost} characters were seen that are not stored, {allowed} are allowed")
    if lost < 0:
        wrong.append(f"{-lost} characters are stored that were not seen before `done`")
    if not allowed and sent.done["position"] != len(sent.text):
        wrong.append(f"`done` told position {sent.done['position']} after {len(sent.text)} characters")
    return wrong


def faults_of_end(sent: Sent, status: str, code: str | None, whole: bool) -> list[str]:
    """A reply that the Domain saw to its end: complete, or failed by its provider as was asked for."""
    expected = {
        "cut": ("provider_error",),
        "end": ("provider_incomplete",),
        "err": ("provider_overloaded", "provider_error"),
    }
    if sent.fault is None:
        return [] if status == "complete" and whole else [f"it ended as {status} {code}, whole: {whole}"]
    kind = sent.fault[0]
    fits = status == "error" and code in expected[kind] and (whole or kind == "cut")  # a reset may overtake data
    return [] if fits else [f"the fault {kind} ended as {status} {code}, whole: {whole}"]


################ main


def run_faults(folder: Path, seed: int, seconds: float) -> tuple[dict, list[str]]:
    """(figures, faults) of one run in a fresh installation."""
    with closing(Provider()) as provider:
        with closing(Liminal(folder / "data", provider, **with_provider(provider, {}))) as liminal:
            run = FaultRun(liminal.start(), seed).run(seconds)
            figures = run.figures()
            figures["left to the Domain"] = run.wait_quiet()["left_to_domain"]
            for name in ("edge", "domain"):
                liminal.stop(name)
            faults = faults_of(run)
            for name in ("domain", "edge"):
                if "Traceback (most recent call last)" in liminal.log(name):
                    faults.append(f"the {name} logged a traceback, see {liminal.log_path(name)}")
            return figures, faults


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill, stop and restart both servers under load; nothing may be lost.")
    parser.add_argument("--seed", type=int, default=7, help="gives the order of what is broken (default: 7)")
    parser.add_argument("--seconds", type=float, default=100, help="how long to break things (default: 100)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="liminal-faults-"))
    figures, faults = run_faults(folder, options.seed, options.seconds)
    print(json.dumps({**figures, "faults": faults}, indent=2))
    if not faults:
        shutil.rmtree(folder)
        return 0
    print(f"see {folder}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
