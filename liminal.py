"""Liminal, the part that everything shares: the wire, the client and the commands.

Owns: settings, errors, the contract and its checker, positions, Server-Sent Events, serving helpers, the command line.
Never: opens a database, speaks to an LLM, imports the servers. Only the standard library on top: the CLI starts fast.

A token's way: provider -> liminal_domain.py: read_provider, run, record, stream_run
-> liminal_edge.py: follow_run, bundle, stream_events -> here: Client.stream, show.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import math
import operator
import os
import pathlib
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid

HERE = pathlib.Path(__file__).resolve().parent
SCRIPTS = ("liminal.py", "liminal_domain.py", "liminal_edge.py", "contracts.json")
log = logging.getLogger("liminal")


################ Settings
# One frozen dataclass, from the environment and data/env (NAME=value lines; the environment wins).
# Nothing else in the project reads the environment.


def setting(name: str, default, meaning: str, shown: bool = True):
    return dataclasses.field(default=default, repr=shown, metadata={"name": name, "meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a process was told. `values` holds every variable, for the providers' own keys, and is never printed."""

    data: pathlib.Path = setting("LIMINAL_DATA", HERE / "data", "folder of databases, keys and logs")
    domain_port: int = setting("LIMINAL_DOMAIN_PORT", 8766, "port of the Domain")
    edge_port: int = setting("LIMINAL_EDGE_PORT", 8765, "port of the Edge")
    domain_url: str = setting("LIMINAL_DOMAIN_URL", "", "http address of the Domain (default: this host, its port)")
    url: str = setting("LIMINAL_URL", "", "http address of the Edge, for the CLI (default: this host, its port)")
    host: str = setting("LIMINAL_HOST", "127.0.0.1", "address both servers listen on")
    api_key: str = setting("LIMINAL_API_KEY", "", "key of the CLI (default: the one in data/cli.key)", False)
    model: str = setting("LIMINAL_MODEL", "", "model where neither request nor thread names one, as provider/model")
    context: int = setting("LIMINAL_CONTEXT", 100_000, "tokens that a prompt may hold, estimated at 3 bytes each")
    mcp: pathlib.Path = setting("LIMINAL_MCP", None, "file that names the MCP servers (default: data/mcp.json)")
    files_root: str = setting("LIMINAL_FILES_ROOT", str(HERE), "folders that file tools may read, joined by ':'")
    tool_rounds: int = setting("LIMINAL_TOOL_ROUNDS", 10, "times that a reply may call tools and go on")
    queue_size: int = setting("LIMINAL_QUEUE_SIZE", 1_000, "database bundles that the Edge holds in memory")
    provider_timeouts: str = setting("LIMINAL_PROVIDER_TIMEOUTS", "600,120", "seconds to first byte, and between two")
    check_events: bool = setting("LIMINAL_CHECK_EVENTS", False, "1: check every event against the contract (for tests)")
    edge_private_key: str = setting("EDGE_PRIVATE_KEY", "", "PEM or path (default: data/edge_private_key.pem)", False)
    edge_public_key: str = setting("EDGE_PUBLIC_KEY", "", "PEM or path (default: data/edge_public_key.pem)")
    anthropic_api_key: str = setting("ANTHROPIC_API_KEY", "", "key of the provider anthropic", False)
    anthropic_base_url: str = setting("ANTHROPIC_BASE_URL", "https://api.anthropic.com", "address of anthropic")
    openai_api_key: str = setting("OPENAI_API_KEY", "", "key of the provider openai", False)
    openai_base_url: str = setting("OPENAI_BASE_URL", "https://api.openai.com/v1", "address of the provider openai")
    ollama_host: str = setting("OLLAMA_HOST", "127.0.0.1:11434", "address of the provider ollama")
    values: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)
    read_from: tuple = dataclasses.field(default=(), repr=False, compare=False)

    @classmethod
    def load(cls) -> Settings:
        """The settings as they stand now; SystemExit with one line where a value makes no sense."""
        data = pathlib.Path(os.environ.get("LIMINAL_DATA") or HERE / "data").expanduser().resolve()
        found = {"read_from": stamp(data / "env")}  # before it is read: a change in between is seen by `fresh`
        found["values"] = {**read_env(data / "env"), **os.environ, "LIMINAL_DATA": str(data)}
        for field in dataclasses.fields(cls):
            if text := found["values"].get(field.metadata.get("name"), "").strip():
                found[field.name] = convert(field, text)
        made = cls(**found)
        missing, host = {"mcp": data / "mcp.json"}, f"http://{listen_host(made.host)}"
        missing |= {"domain_url": f"{host}:{made.domain_port}", "url": f"{host}:{made.edge_port}"}
        return dataclasses.replace(made, **missing | found)

    def fresh(self) -> Settings:
        """These settings, or newly read ones when data/env has changed since (one stat, about 2 us)."""
        if (seen := stamp(self.data / "env")) == self.read_from:
            return self
        try:
            return Settings.load()
        except SystemExit as fault:
            log.error("%s; the settings stay as they were", fault)
            return dataclasses.replace(self, read_from=seen)

    @staticmethod
    def environment(name: str) -> str:
        """A variable of this process's own environment, whatever data/env says; "" where it is not set."""
        return os.environ.get(name, "")

    @property
    def instance(self) -> str:
        """Which data folder this is, without telling its path."""
        return hashlib.sha256(str(self.data).encode()).hexdigest()[:12]


def convert(field, text: str):
    """One variable's text as its field's type, which is text here, too, since annotations are postponed."""
    value, fits = text, True
    try:
        if field.type == "int":
            value, most = int(text), 65535 if field.name.endswith("_port") else (1 << 31) - 1
            fits = 0 < value <= most
        elif field.type == "bool":
            value = text not in ("0", "false", "no")
        elif field.type == "pathlib.Path":
            value = pathlib.Path(text).expanduser().resolve()
        elif field.name == "provider_timeouts":
            first, between = map(float, text.split(","))
            fits = 0 < first < math.inf and 0 < between < math.inf
        elif field.name in ("url", "domain_url"):
            parts, value = urllib.parse.urlsplit(text), text.rstrip("/")
            fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        raise SystemExit(f"liminal: {field.metadata['name']}={text!r} makes no sense: {field.metadata['meaning']}")
    return value


def read_env(path: pathlib.Path) -> dict[str, str]:
    """The NAME=value lines of a file, `#` begins a comment line, quotes around a value are taken off; {} without it."""
    try:
        lines = path.read_text().split("\n") if path.exists() else []
    except (OSError, UnicodeError) as error:
        raise SystemExit(f"liminal: {path} cannot be read as NAME=value lines: {error}") from None
    pairs = (line.removeprefix("export ").partition("=") for line in map(str.strip, lines) if line and line[0] != "#")
    return {name.strip(): value.strip().strip("\"'") for name, sign, value in pairs if sign}


def stamp(path: pathlib.Path) -> tuple:
    """Changes whenever the file does."""
    try:
        seen = path.stat()
        return seen.st_mtime_ns, seen.st_size, seen.st_ino
    except OSError:
        return ()


def listen_host(host: str) -> str:
    """The address at which a server that listens on `host` is reached from its own machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


@functools.cache
def version() -> str:
    """A hash of the scripts and the contract as this process read them."""
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in SCRIPTS)).hexdigest()[:12]


def now(later: float = 0) -> str:
    """The time now, or so many seconds later: ISO 8601, UTC, milliseconds."""
    seconds = time.time() + later
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1000) % 1000:03d}Z"


def write_private(path: pathlib.Path, data: str) -> None:
    """Write a file of mode 0600 whole or not at all: aside, synced, renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
    finally:
        aside.unlink(missing_ok=True)


################ Problem
# One exception, raised anywhere, becomes the one error answer. Status, retriability of a code stand in contracts.json.


class Problem(Exception):
    """An error for the client: `code` is one of contracts.json's, `message` says what to do, `more`: field, message_ids
    `retry_after` (seconds) is what a provider asked for."""

    def __init__(self, code: str, message: str, retry_after: float | None = None, **more):
        super().__init__(message)
        self.code, self.message, self.retry_after, self.more = code, message, retry_after, more

    @property
    def status(self) -> int:
        return contract()["x-errors"][self.code]["status"]

    def detail(self, request_id: str | None) -> dict:
        """{code, message, request_id, retriable, field?, message_ids?}: what stands under "error" everywhere."""
        retriable = contract()["x-errors"][self.code]["retriable"]
        message = self.message.encode("utf-8", "replace").decode()  # it may quote what came in as bytes
        return {"code": self.code, "message": message, "request_id": request_id, "retriable": retriable, **self.more}


################ JSON
# Strict on the way in: what another parser might read differently, or SQLite cannot hold, is refused here, once.


def parse_json(data: bytes):
    """One JSON value out of UTF-8, or ValueError: no NaN, duplicate keys, lone surrogates, integers past 63 bits."""
    try:
        value = decode_json(data.decode())
        encode_json(value).encode()
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeError:
        raise ValueError("it holds text that is not valid UTF-8") from None


def unique(pairs: list) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return made


def bounded(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 63:
        raise ValueError("it holds an integer of more than 63 bits")
    return int(text)


def finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"it holds the number {text[:20]}")
    return float(text)


encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
STRICT = {"object_pairs_hook": unique, "parse_int": bounded, "parse_float": finite, "parse_constant": finite}
decode_json = json.JSONDecoder(**STRICT).decode


################ The contract
# contracts.json binds, checks and documents both servers. The checker knows the keywords that we use and refuses all
# others at start, so that no rule is ever silently ignored. A schema is compiled once, to closures: 1 us an object.

ANNOTATIONS = {"$schema", "$id", "$comment", "$defs", "title", "description", "default", "format", "examples"}
ANNOTATIONS |= {"deprecated"}


@functools.cache
def contract() -> dict:
    return json.loads((HERE / "contracts.json").read_bytes())


def faults(schema: dict | bool, value, root: dict | None = None) -> list[tuple[str, str]]:
    """The first fault of a value as [(field, why)], or [] where it fits. ValueError: we cannot check that schema."""
    fault = Checker(schema if root is None else root).compile(schema)(value)
    return [(dotted(fault), fault[1])] if fault else []


def dotted(fault: tuple) -> str:
    return ".".join(map(str, fault[0]))


class Checker:
    """Compiles the schemas of one document. A compiled check gives None, or (path, why) of the first fault.
    RULES tell whether a value fits by itself, NESTED are about what it holds and about other schemas."""

    def __init__(self, root):
        self.root, self.made = root, {}

    def compile(self, schema):
        if isinstance(schema, bool):
            return lambda value: None if schema else ([], "is not allowed")
        if not isinstance(schema, dict):
            raise ValueError(f"a schema is an object or a boolean, not {schema!r:.60}")
        if unknown := schema.keys() - RULES.keys() - NESTED.keys() - OBJECT - ANNOTATIONS:
            raise ValueError(f"the checker does not know the keyword {sorted(unknown)[0]!r}")
        try:
            for inner in schema.get("$defs", {}).values():
                self.compile(inner)
            checks = [alone(*RULES[word](schema[word])) for word in RULES if word in schema]
            checks += [self.object(schema)] if OBJECT & schema.keys() else []
            checks += [NESTED[word](self, schema[word], schema) for word in NESTED if word in schema]
        except (KeyError, TypeError, AttributeError, re.error) as fault:
            raise ValueError(f"the schema {shown(schema)} makes no sense: {fault!r}") from None
        return checks[0] if len(checks) == 1 else lambda value: first(check(value) for check in checks)

    def resolve(self, part):
        """What a `$ref` refers to within the document; all else is given back as it is."""
        if not isinstance(part, dict) or "$ref" not in part:
            return part
        pointer, found = part["$ref"], self.root
        if pointer != "#" and not pointer.startswith("#/"):
            raise ValueError(f"only references to places within the document are known, not {pointer!r}")
        for step in urllib.parse.unquote(pointer[1:]).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(step)] if isinstance(found, list) and step.isdigit() else found[step]
            except (KeyError, IndexError, TypeError):
                raise ValueError(f"{pointer!r} refers to nothing") from None
        return found

    def reference(self, pointer, schema):
        """Compiled at the first use, so that a schema may refer to itself."""
        target = self.resolve({"$ref": pointer})

        def check(value):
            if pointer not in self.made:
                self.made[pointer] = self.compile(target)
            return self.made[pointer](value)

        return check

    def object(self, schema):
        """properties, required and additionalProperties in one pass over the object."""
        known = {name: self.compile(inner) for name, inner in schema.get("properties", {}).items()}
        extra, required = schema.get("additionalProperties", True), schema.get("required", ())
        other = self.compile(extra)
        if extra is False:
            why = "is not a known field" + (f"; known are {', '.join(known)}" if known else "")
            other = lambda value: ([], why)

        def check(value):
            if not isinstance(value, dict):
                return None
            for name in required:
                if name not in value:
                    return [name], "is missing"
            for name, inner in value.items():
                if fault := known.get(name, other)(inner):
                    return [name, *fault[0]], fault[1]
            return None

        return check

    def items(self, inner, schema):
        item = self.compile(inner)

        def check(value):
            for place, one in enumerate(value if isinstance(value, list) else ()):
                if fault := item(one):
                    return [place, *fault[0]], fault[1]
            return None

        return check

    def none_of(self, inner, schema):
        check = self.compile(inner)
        return lambda value: None if check(value) else ([], "has a form that is not allowed")


def alone(fits, why: str):
    return lambda value: None if fits(value) else ([], f"{why}, not {shown(value)}")


def forms(judge):
    """A rule about several schemas: `judge` gets the faults of a value in each, None where it fits."""

    def rule(checker, schemas, schema):
        if not isinstance(schemas, list) or not schemas:
            raise TypeError("a list of schemas is needed")
        checks = [checker.compile(one) for one in schemas]
        return lambda value: judge([check(value) for check in checks])

    return rule


def first(results):
    return next((result for result in results if result), None)


def deepest(results):
    """None where one form fitted, else the fault of the form that came furthest: the one that was probably meant."""
    return None if None in results else max(results, key=lambda fault: len(fault[0]))


def only(results):
    return ([], "fits more than one of its forms") if results.count(None) > 1 else deepest(results)


def shown(value) -> str:
    return shorten(json.dumps(value, ensure_ascii=False), 60)


def same(a, b) -> bool:
    """Equality as JSON has it: 1 is 1.0, but true is not 1, at any depth."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


TYPES = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: TYPES["number"](value) and (isinstance(value, int) or value.is_integer()),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def typed(names):
    names = [names] if isinstance(names, str) else names
    tests = [TYPES[name] for name in names]
    fits = tests[0] if len(tests) == 1 else lambda value: any(test(value) for test in tests)
    return fits, f"must be {' or '.join(names)}"


def listed(values):
    return lambda value: any(same(value, one) for one in values), f"must be one of {', '.join(map(shown, values))}"


def distinct(wanted):
    fits = lambda value: not any(same(a, b) for place, a in enumerate(value) for b in value[:place])
    return lambda value: not wanted or not isinstance(value, list) or fits(value), "must hold each item only once"


def matching(pattern):
    """Searched anywhere in the text, as ECMA 262 has it: `$` is the very end, never before a last line break."""
    known = {"$": r"\Z", r"\p{Letter}": r"[^\W\d_]", r"\p{L}": r"[^\W\d_]", r"\p{digit}": r"\d", r"\p{Nd}": r"\d"}
    known[r"\d"] = "[0-9]"
    pieces = r"\\p\{\w+\}|\\.|\[(?:\\.|[^\]\\])*\]|\$"
    found = re.compile(re.sub(pieces, lambda piece: known.get(piece[0], piece[0]), pattern)).search
    form = pattern if len(pattern) <= 80 else "the form that contracts.json gives"
    return lambda value: not isinstance(value, str) or found(value), f"must match {form}"


def bound(kind: str, compare, why: str):
    """A rule on the size of a value of this kind; of a number, on the number itself."""
    applies, measure = TYPES[kind], operator.pos if kind == "number" else len
    return lambda limit: (lambda value: not applies(value) or compare(measure(value), limit), why % limit)


RULES = {  # keyword: what the schema has there -> (whether a value fits, what it must be)
    "type": typed,
    "const": lambda wanted: (lambda value: same(value, wanted), f"must be {shown(wanted)}"),
    "enum": listed,
    "pattern": matching,
    "minLength": bound("string", operator.ge, "must have at least %s characters"),
    "maxLength": bound("string", operator.le, "must have at most %s characters"),
    "minItems": bound("array", operator.ge, "must have at least %s items"),
    "maxItems": bound("array", operator.le, "must have at most %s items"),
    "minProperties": bound("object", operator.ge, "must have at least %s fields"),
    "maxProperties": bound("object", operator.le, "must have at most %s fields"),
    "minimum": bound("number", operator.ge, "must be at least %s"),
    "maximum": bound("number", operator.le, "must be at most %s"),
    "exclusiveMinimum": bound("number", operator.gt, "must be more than %s"),
    "exclusiveMaximum": bound("number", operator.lt, "must be less than %s"),
    "uniqueItems": distinct,
}
OBJECT = {"properties", "required", "additionalProperties"}
NESTED = {  # keyword: what the schema has there, and the schema itself -> a compiled check
    "$ref": Checker.reference,
    "items": Checker.items,
    "oneOf": forms(only),
    "anyOf": forms(deepest),
    "allOf": forms(first),
    "not": Checker.none_of,
}

# What a server binds a handler to and a client may rely on. The checks are compiled; replies: {status: check}.
Parameter = collections.namedtuple("Parameter", "name where required type default check")
Operation = collections.namedtuple("Operation", "id method path security parameters body body_required status replies")


@functools.cache
def checker() -> Checker:
    return Checker(contract())


@functools.cache
def schema_check(name: str):
    return checker().compile(contract()["components"]["schemas"][name])


@functools.cache
def operations(tag: str) -> dict[str, Operation]:
    """The operations of one server by operationId; SystemExit with one line where any cannot be checked."""
    found = {}
    try:
        for name in contract()["components"]["schemas"]:
            schema_check(name)
        for response in contract()["components"]["responses"].values():
            json_check(response)
        for path, methods in contract()["paths"].items():
            for method, spec in methods.items():
                made = operation(method.upper(), path, spec)
                if made.id in found:
                    raise ValueError(f"the operationId {made.id!r} stands twice")
                found[made.id] = made, spec["tags"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as fault:
        raise SystemExit(f"liminal: contracts.json cannot be used: {' '.join(str(fault).split())}") from None
    return {name: made for name, (made, tags) in found.items() if tag in tags}


def operation(method: str, path: str, spec: dict) -> Operation:
    parameters = []
    for given in map(checker().resolve, spec.get("parameters", ())):
        schema = checker().resolve(given["schema"])
        rest = given.get("required", False), schema.get("type"), schema.get("default"), checker().compile(schema)
        parameters.append(Parameter(given["name"], given["in"], *rest))
    security = {scheme: needed for one in spec["security"] for scheme, needed in one.items()}
    body = json_check(spec["requestBody"]) if "requestBody" in spec else None
    body_required = spec.get("requestBody", {}).get("required", False)
    checks = {code: json_check(reply) for code, reply in spec["responses"].items()}
    replies = {int(code): test for code, test in checks.items() if code.isdigit()}
    rest = security, parameters, body, body_required, min(replies), replies
    return Operation(spec["operationId"], method, path, *rest)


def json_check(part: dict):
    """The check of a body's JSON form, None where it has none; the schemas of its other forms are compiled as well."""
    forms = checker().resolve(part).get("content", {})
    return {kind: checker().compile(form["schema"]) for kind, form in forms.items()}.get("application/json")


def check(test, value, what: str) -> None:
    """Raise where something of ours breaks the contract: a defect, loud on purpose."""
    if fault := test(value):
        raise Problem("internal", f"{what} breaks the contract: {dotted(fault) or 'it'} {fault[1]}")


def check_event(event: dict) -> None:
    kind = str(event.get("type"))
    name = "".join(map(str.capitalize, kind.split("_"))) + "Event"  # tool_call is a ToolCallEvent
    if name not in contract()["components"]["schemas"]:
        raise Problem("internal", f"an event breaks the contract: there is no type {kind!r}")
    check(schema_check(name), event, f"the event {kind}")


################ Positions
# What a reply holds is counted in Unicode code points and tool events, never tokens or bytes: so any two parties agree
# on a place in it however it was cut into bundles. Three functions are the whole arithmetic.

TEXTS, PARTS = ("text", "thinking"), ("text", "thinking", "tool_call", "tool_result")


def size(event: dict) -> int:
    """How far an event moves the position."""
    kind = event["type"]
    return len(event["text"]) if kind in TEXTS else 1 if kind in PARTS else 0


def joined(events: list[dict]) -> list[dict]:
    """The same content in as few events as there are parts: neighbours of one type become one text."""
    made = []
    for kind, run in itertools.groupby(events, operator.itemgetter("type")):
        run = list(run)
        several = kind in TEXTS and len(run) > 1
        made += [{"type": kind, "text": "".join([event["text"] for event in run])}] if several else run
    return made


def cut(events: list[dict], count: int) -> list[dict]:
    """The events without their first `count` positions, in the middle of a text if need be."""
    for place, event in enumerate(events):
        length = size(event)
        if count < length or length == 0 and count == 0:
            return [{**event, "text": event["text"][count:]}, *events[place + 1 :]] if count else events[place:]
        count -= length
    return []


################ Server-Sent Events
# One encoder (the Edge calls it) and one decoder without I/O (the Domain for providers, the CLI for the Edge).

MAX_LINE = 16 << 20  # bytes; a longer line is no stream we know, and would only eat memory


def sse(event: dict, position: int | None = None) -> bytes:
    place = "" if position is None else f"id: {position}\n"
    return f"event: {event['type']}\n{place}data: {encode_json(event)}\n\n".encode()


class Decoder:
    """Bytes in, (event, data, id) out, as the HTML specification has it, wherever the bytes are cut."""

    def __init__(self):
        self.tail, self.after_cr, self.begun = b"", False, False
        self.event, self.data, self.id, self.size = "", [], "", 0

    def feed(self, data: bytes) -> list[tuple[str, str, str]]:
        if self.after_cr and data:
            data, self.after_cr = data.removeprefix(b"\n"), False
        if b"\r" in data:
            self.after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self.tail = (self.tail + data).split(b"\n")
        if max(map(len, lines), default=0) > MAX_LINE or len(self.tail) > MAX_LINE:
            raise ValueError(f"a line of more than {MAX_LINE} bytes")
        if lines and not self.begun:
            self.begun, lines[0] = True, lines[0].removeprefix(b"\xef\xbb\xbf")
        found = []
        for line in lines:
            if line:
                self.field(line)
                continue
            if self.data:
                found.append((self.event or "message", "\n".join(self.data), self.id))
            self.event, self.data, self.size = "", [], 0
        return found

    def field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            self.data.append(text)
            self.size += len(line)
            if self.size > MAX_LINE:
                raise ValueError(f"an event of more than {MAX_LINE} bytes")
        elif name == b"event":
            self.event = text
        elif name == b"id" and "\0" not in text:
            self.id = text


################ Serving
# What both servers share: handlers bound by operationId, requests and JSON replies checked, one error shape, metrics.
# aiohttp is imported inside: the CLI never pays for it.

GRACE = 10  # seconds from SIGTERM to the end of a server


class Metrics:
    """Counters and histograms in Prometheus' text format. `declared`: name -> (help, bucket limits or None)."""

    def __init__(self, declared: dict[str, tuple[str, tuple | None]]):
        self.declared, self.gauges = declared, {}
        self.counters = collections.defaultdict(collections.Counter)  # name -> {sorted labels: number}
        histograms = {name: len(limits) + 1 for name, (_, limits) in declared.items() if limits}
        self.histograms = {name: [0] * count + [0.0] for name, count in histograms.items()}  # by bucket, and the sum

    def count(self, name: str, n: float = 1, **labels: str) -> None:
        self.counters[name][tuple(sorted(labels.items()))] += n

    def observe(self, name: str, value: float) -> None:
        counts = self.histograms[name]
        counts[bisect.bisect_left(self.declared[name][1], value)] += 1
        counts[-1] += value

    def value(self, name: str, **labels: str) -> float:
        return self.counters[name][tuple(sorted(labels.items()))]

    def by_label(self, name: str, label: str, **labels: str) -> dict[str, int]:
        """A counter's values by one label, where the others are as given."""
        series = [(dict(key), int(n)) for key, n in self.counters[name].items()]
        return {key[label]: n for key, n in series if labels.items() <= key.items()}

    def quantiles(self, name: str, scale: float = 1) -> dict[str, float | None]:
        """{p50, p95, p99} as the upper limits of the buckets that hold them; None where nothing was observed."""
        found = {f"p{int(q * 100)}": self.quantile(name, q) for q in (0.5, 0.95, 0.99)}
        return {q: value and round(value * scale, 3) for q, value in found.items()}

    def quantile(self, name: str, q: float) -> float | None:
        """The upper limit of the bucket that holds this quantile; None where nothing was observed."""
        *counts, _ = self.histograms[name]
        limits = self.declared[name][1]
        for limit, seen in zip((*limits, limits[-1]), itertools.accumulate(counts)):
            if seen and seen >= q * sum(counts):
                return limit
        return None

    def text(self) -> str:
        lines = []
        for name, (meaning, limits) in self.declared.items():
            kind = "histogram" if limits else "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            if limits:
                *counts, total = self.histograms[name]
                sums = zip((*limits, "+Inf"), itertools.accumulate(counts))
                lines += [f'{name}_bucket{{le="{limit}"}} {seen}' for limit, seen in sums]
                lines += [f"{name}_sum {total}", f"{name}_count {sum(counts)}"]
                continue
            series = {(): self.gauges[name]()} if name in self.gauges else self.counters[name] or {(): 0}
            for labels, n in series.items():
                inside = ",".join(f"{label}={json.dumps(value, ensure_ascii=False)}" for label, value in labels)
                lines.append(f"{name}{{{inside}}} {n}" if inside else f"{name} {n}")
        return "\n".join(lines) + "\n"


class Call:
    """One request as its handler sees it: who calls, what was asked, already checked."""

    def __init__(self, request, operation: Operation):
        self.request, self.operation = request, operation
        self.request_id = re.sub(r"[^\w.-]", "", request.headers.get("x-request-id", ""))[:64] or str(uuid.uuid4())
        self.user_id = self.key_id = self.user = None
        self.arguments, self.body = {}, None


def make_application(tag: str, handlers: dict, authenticate, settings: Settings, metrics: Metrics):
    """An aiohttp application with a handler bound to each of the contract's operations of one server, by operationId.
    `authenticate(call)` raises or fills in the caller. SystemExit where contract and handlers differ, either way."""
    from aiohttp import web

    known = operations(tag)
    if known.keys() != handlers.keys():
        missing, extra = sorted(known.keys() - handlers.keys()), sorted(handlers.keys() - known.keys())
        words = f"without a handler {missing}, without an operation {extra}"
        raise SystemExit(f"liminal: contract and {tag} differ: {words}")
    urls = (settings.url, settings.domain_url)
    names = {"localhost", "127.0.0.1", "::1", settings.host, *(urllib.parse.urlsplit(url).hostname for url in urls)}

    @web.middleware
    async def answer_problems(request, handler):
        request["id"], headers = None, {}
        try:
            refuse_strangers(request, names)
            return await handler(request)
        except Problem as problem:
            fault = problem
        except ConnectionError:
            fault = Problem("invalid_request", "the client went away in mid-request")  # nobody reads this any more
        except web.HTTPException as error:
            fault = http_problem(error.status, request)
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            fault = Problem("internal", "an error of our own; the server's log tells more")
        metrics.count("liminal_errors_total", code=fault.code)
        if fault.code == "internal":
            log.error("%s %s: %s", request.method, request.path, fault.message)
        return error_answer(fault, request["id"], headers)

    app = web.Application(client_max_size=contract()["x-limits"]["body_bytes"], middlewares=[answer_problems])
    for name, handler in handlers.items():
        app.router.add_route(known[name].method, known[name].path, bound_handler(known[name], handler, authenticate))
    return app


def error_answer(fault: Problem, request_id: str | None = None, headers: dict | None = None):
    from aiohttp import web

    body = {"error": fault.detail(request_id or str(uuid.uuid4()))}
    return web.json_response(text=encode_json(body), status=fault.status, headers=headers)


def http_problem(status: int, request) -> Problem:
    """What aiohttp refuses by itself: routes that do not exist, and bodies that are too large."""
    if status == 413:
        limit = contract()["x-limits"]["body_bytes"]
        return Problem("too_large", f"the body is larger than the limit of {limit} bytes")
    if status == 405:
        return Problem("method_not_allowed", f"{request.path} does not take {request.method}")
    words = f"there is no {request.method} {request.path}; see /contracts.json"
    return Problem("not_found" if status == 404 else "invalid_request", words)


def bound_handler(operation: Operation, handler, authenticate):
    """The request handler of one operation: authenticate, check, call, check the reply."""
    from aiohttp import web

    async def handle(request):
        call = Call(request, operation)
        request["id"] = call.request_id
        if operation.security:
            await authenticate(call)
        call.arguments = {given.name: argument(given, request) for given in operation.parameters}
        call.user_id = call.arguments.get("x-user-id", call.user_id)
        if operation.body:
            call.body = await read_body(request, operation)
        result = await handler(call)
        if isinstance(result, web.StreamResponse):
            return result
        status, value = result if isinstance(result, tuple) else (operation.status, result)
        if operation.replies[status] is None:
            return web.Response(status=status)
        check(operation.replies[status], value, f"the reply of {operation.id}")
        return web.json_response(text=encode_json(value), status=status)

    return handle


def argument(given: Parameter, request):
    """One parameter of a request, as its type and checked; its default where it is not given."""
    value = {"path": request.match_info, "query": request.query, "header": request.headers}[given.where].get(given.name)
    if value is None:
        if given.required:
            raise Problem("invalid_request", f"{given.name} is missing", field=given.name)
        return given.default
    if given.type == "integer" and re.fullmatch(r"-?[0-9]+", value):
        with contextlib.suppress(ValueError):
            value = bounded(value)
    if fault := given.check(value):
        raise Problem("invalid_request", f"{given.name} {fault[1]}", field=given.name)
    return value


async def read_body(request, operation: Operation):
    data = await request.read()
    if not data and not operation.body_required:
        return {}
    try:
        body = parse_json(data)
    except ValueError as fault:
        raise Problem("invalid_request", f"the body is not JSON that can be taken: {fault}") from None
    if fault := operation.body(body):
        field = dotted(fault)
        raise Problem("invalid_request", f"{field or 'the body'} {fault[1]}", field=field)
    return body


def refuse_strangers(request, names: set[str]) -> None:
    """A web page must not reach us through a name of its own (DNS rebinding) or from another origin."""
    host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        own = origin is None or urllib.parse.urlsplit(origin).netloc == host
    except ValueError:
        name, own = "", False
    wildcard = names & {"0.0.0.0", "::"} and re.fullmatch(r"[\d.]+|[\da-f:]+", name)
    if name not in names and not wildcard:
        raise Problem("forbidden", f"this server does not go by the name {host[:100]!r}; set LIMINAL_URL to add it")
    if not own:
        raise Problem("forbidden", f"requests from the origin {origin[:100]!r} are not taken")


def answer_no_http(protocol, request, status=500, exc=None, message=None):
    """In place of aiohttp's plain text: what its parser refuses (no HTTP, long headers) in the one error shape."""
    if request.writer.output_size > 0:
        raise ConnectionError("the answer has begun already")
    if status >= 500:
        log.error("a request failed before its handler", exc_info=exc)
    words = f"this is no request that can be taken: {' '.join(str(message or exc).split())[:200]}"
    answer = error_answer(Problem("internal" if status >= 500 else "invalid_request", words))
    answer.force_close()
    return answer


def lock(settings: Settings, name: str) -> int:
    """Hold this server's part of the data folder while the process lives; SystemExit where another holds it."""
    try:
        settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = os.open(settings.data / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        words = f"process {os.read(held, 20).decode()} already is the {name} of {settings.data}"
        raise SystemExit(f"liminal: {words}") from None
    except OSError as error:
        raise SystemExit(f"liminal: the data folder {settings.data} cannot be used: {error.strerror}") from None
    os.truncate(held, 0)
    os.write(held, str(os.getpid()).encode())
    return held


def serve(name: str, make_app) -> None:
    """Run one server in the foreground until SIGTERM or SIGINT. `make_app(settings)` is awaited for the application."""
    import asyncio

    os.umask(0o077)
    settings = Settings.load()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    for chatty in ("httpx", "httpx2", "mcp"):  # they log addresses, and an address may hold a token
        logging.getLogger(chatty).setLevel(logging.WARNING)
    lock(settings, name)
    asyncio.run(listen(name, getattr(settings, f"{name}_port"), settings, make_app))


async def listen(name: str, port: int, settings: Settings, make_app) -> None:
    import asyncio
    import sqlite3

    from aiohttp import web

    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    web.RequestHandler.handle_error = answer_no_http
    operations(name)  # a contract that cannot be used stops the start before anything is opened
    limits = dict.fromkeys(("max_field_size", "max_line_size"), contract()["x-limits"]["header_bytes"])
    try:
        app = await make_app(settings)
    except (Problem, sqlite3.Error) as error:
        raise SystemExit(f"liminal: the {name} cannot use {settings.data}: {storage_problem(error)}") from None
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=GRACE / 2, **limits)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, port, backlog=2048).start()
    except OSError as error:
        words = f"cannot listen on {settings.host}:{port} ({error.strerror})"
        raise SystemExit(f"liminal: the {name} {words}; set LIMINAL_{name.upper()}_PORT or LIMINAL_HOST") from None
    else:
        print(f"liminal {name} ready on http://{listen_host(settings.host)}:{port}", flush=True)
        await stopped.wait()
    finally:
        loop.call_later(GRACE, os._exit, 1)  # whatever still hangs by then is given up: what is acknowledged is on disk
        await runner.cleanup()


################ Databases
# One writing connection a database, in a thread of its own, and one that only reads: never the event loop.
# Whatever has queued up while the disk was busy is committed together: one fdatasync (WAL, synchronous=FULL) for many.


class Database:
    """One SQLite file. `await db.write(fn, *args)` runs fn(connection, *args) in a transaction, and returns when it is
    on disk; `await db.read(fn, *args)` sees the last commit. Problem `storage_full` or `internal` where it refuses."""

    def __init__(self, path: pathlib.Path):
        self.jobs, self.asked = queue.SimpleQueue(), queue.SimpleQueue()
        self.writer, self.reader = open_database(path), open_database(path)
        self.reader.execute("pragma query_only = on")
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self.keep_writing, self.keep_reading)]
        for thread in self.threads:
            thread.start()

    def write(self, fn, *args):
        return self.hand(self.jobs, fn, args)

    def read(self, fn, *args):
        return self.hand(self.asked, fn, args)

    def hand(self, jobs, fn, args):
        """The future of a job, which is done even if nobody awaits it any more: cancelling the await loses no write."""
        import asyncio

        loop = asyncio.get_running_loop()
        future = loop.create_future()
        jobs.put((fn, args, loop, future))
        return future

    def keep_reading(self) -> None:
        while job := self.asked.get():
            fn, args, *to = job
            try:
                answer(*to, fn(self.reader, *args), None)
            except Exception as error:
                answer(*to, None, error)

    def keep_writing(self) -> None:
        while job := self.jobs.get():
            jobs = [job]
            with contextlib.suppress(queue.Empty):
                while len(jobs) < 256 and jobs[-1]:
                    jobs.append(self.jobs.get_nowait())
            if last := jobs[-1] is None:
                jobs.pop()
            for (_, _, *to), outcome in zip(jobs, self.commit(jobs)):
                answer(*to, *outcome)
            if last:
                return

    def commit(self, jobs: list) -> list[tuple]:
        """(result, error) of each job. One that fails takes only itself back, unless the disk failed: then all fail."""
        db, outcomes = self.writer, []
        try:
            db.execute("begin immediate")
            for fn, args, *_ in jobs:
                db.execute("savepoint job")
                try:
                    outcomes.append((fn(db, *args), None))
                except Exception as error:
                    if not db.in_transaction:
                        raise
                    outcomes.append((None, error))
                    db.execute("rollback to job")
                db.execute("release job")
            db.execute("commit")
            return outcomes
        except Exception as error:
            if db.in_transaction:
                db.execute("rollback")
            return [(None, error)] * len(jobs)

    def close(self) -> None:
        """Do what is queued, then close."""
        for jobs, thread in zip((self.jobs, self.asked), self.threads):
            jobs.put(None)
            thread.join(5)
        self.reader.close()
        self.writer.close()


def open_database(path: pathlib.Path):
    """A connection with its section of schema.sql carried out, which begins with `-- NAME.db:`."""
    import sqlite3

    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    db.row_factory = sqlite3.Row
    sections = re.split(r"(?m)^-- (\w+\.db):", (HERE / "schema.sql").read_text())
    db.executescript("--" + dict(zip(sections[1::2], sections[2::2]))[path.name])
    return db


def check_database(path: pathlib.Path) -> str:
    """The first thing that SQLite finds wrong, else "ok"; over a connection that only reads."""
    import sqlite3

    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path), '/')}?mode=ro", uri=True)) as db:
            return db.execute("pragma quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        return str(error)


def answer(loop, future, result, error) -> None:
    """Settle a job's future in its own loop; an error of SQLite becomes one that people understand."""

    def settle():
        if future.cancelled():
            if error:
                log.error("a database job that nobody waits for failed: %r", error)
        elif error:
            future.set_exception(storage_problem(error))
        else:
            future.set_result(result)

    with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
        loop.call_soon_threadsafe(settle)


def storage_problem(error: Exception) -> Exception:
    import sqlite3

    if not isinstance(error, sqlite3.Error):
        return error
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return Problem("storage_full", "the disk of the data folder is full: make room and try again")
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        return Problem("storage_full", f"the data folder cannot be written ({error}): mend the disk and try again")
    log.error("database error", exc_info=error)
    return Problem("internal", f"the database refused: {error}")


################ The client
# http.client and the Decoder: a reply is read over as many connections as it takes, from where the last one ended.

SILENCE = 45  # seconds without a byte (the Edge pings every 15) after which a connection counts as lost
PATIENCE = 30  # seconds for which a lost server is looked for


class Lost(Exception):
    """The connection broke, at its opening or later."""


class Unreachable(Exception):
    """No server answers; the text says what to do. Exit status 3."""


def quote(text: str, safe: str = "") -> str:
    return urllib.parse.quote(text, safe)


class Client:
    """The Edge's API as the commands use it. Problem where it refuses, Unreachable where nobody answers. A path that
    does not begin with / is one of /api/v1, and the key is sent with it."""

    def __init__(self, settings: Settings, timeout: float = SILENCE, url: str = "", key: str | None = None):
        self.settings, self.url, self.timeout, self.given_key = settings, url or settings.url, timeout, key
        self.base, self.connection, self.sent = urllib.parse.urlsplit(self.url), None, None
        self.warned = False

    @functools.cached_property
    def key(self) -> str:
        path = self.settings.data / "cli.key"
        try:
            key = self.given_key or self.settings.api_key or path.read_text().strip()
        except (OSError, UnicodeError) as error:
            words = f"no key: LIMINAL_API_KEY is not set and {path} cannot be read: {error}"
            raise Problem("unauthorized", words) from None
        if not re.fullmatch(r"[!-~]+", key):
            raise Problem("unauthorized", f"that is no key: look at LIMINAL_API_KEY, or at {path}")
        return key

    def send(self, method: str, path: str, body=None, headers: dict | None = None):
        """One request on the kept connection; one that went stale is opened anew, once, for what may repeat."""
        import http.client

        headers = {"Content-Type": "application/json", **(headers or {})}
        if not path.startswith("/"):
            path, headers["Authorization"] = f"/api/v1/{path}", f"Bearer {self.key}"
        data = None if body is None else encode_json(body).encode()
        stale = self.connection is not None and (method == "GET" or "Idempotency-Key" in headers)
        if self.connection is None:
            kind = http.client.HTTPSConnection if self.base.scheme == "https" else http.client.HTTPConnection
            self.connection = kind(self.base.hostname, self.base.port, timeout=self.timeout)
        try:
            self.receive(self.connection.request, method, self.base.path + path, data, headers)
            return self.receive(self.connection.getresponse)
        except Lost:
            self.close()
            if not stale:
                raise
        return self.send(method, path.removeprefix("/api/v1/"), body, headers)

    def receive(self, read, *args):
        import http.client

        try:
            return read(*args)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Lost(str(error) or type(error).__name__) from None

    def close(self) -> None:
        if self.connection:
            self.connection.close()
        self.connection = None

    def ask(self, method: str, path: str, body=None, headers: dict | None = None):
        """The parsed answer of a JSON operation, None where it has no body."""
        try:
            response = self.send(method, path, body, headers)
            data = self.receive(response.read)
        except Lost as error:
            raise Unreachable(f"{self.url} does not answer ({error}): `liminal up` starts it") from None
        if response.status >= 400:
            raise refused(response.status, data)
        try:
            return json.loads(data) if data else None
        except ValueError:
            raise refused(response.status, data) from None

    def get(self, path: str):
        return self.ask("GET", path)

    def list(self, kind: str, query: str = "") -> list:
        """What is listed at /api/v1/<kind> under that name."""
        return self.get(kind + query)[kind]

    def stream(self, method: str, path: str, body=None, position: int | None = None):
        """The events of one reply to its `done`, over a connection of its own, another where that one breaks; a note
        on standard error says so."""
        wire, message_id, lost_at = Client(self.settings), None, None
        headers = {"Idempotency-Key": str(uuid.uuid4()), **({"Last-Event-ID": str(position)} if position else {})}
        self.sent = method, path, body, headers
        while True:
            try:
                for event, place in wire.read_stream(method, path, body, headers):
                    lost_at = None
                    if event["type"] == "start":
                        if message_id:
                            continue
                        message_id = event["message_id"]
                    position = place or position
                    yield event
                    if event["type"] == "done":
                        return wire.close()
            except Lost as error:
                log.debug("lost the stream: %r", error)
            except Problem as problem:
                if lost_at is None or problem.code != "domain_unavailable":
                    raise
            wire.close()
            self.wait_for_server(lost_at)
            lost_at = lost_at or time.monotonic()
            if message_id:
                method, path, body = "GET", f"messages/{message_id}/stream", None
                headers = {} if position is None else {"Last-Event-ID": str(position)}

    def find_sent(self) -> str:
        """The message id of the reply that `stream` asked for last: its Idempotency-Key attaches to it again."""
        for event, _ in Client(self.settings, timeout=5).read_stream(*self.sent):
            return event["message_id"]
        raise Unreachable(f"{self.url} gave no reply to stop")

    def read_stream(self, method: str, path: str, body, headers: dict):
        response = self.send(method, path, body, {**headers, "Accept": "text/event-stream"})
        if response.status >= 400:
            raise refused(response.status, self.receive(response.read))
        decoder = Decoder()
        while data := self.receive(response.read1, 65536):
            events = decoder.feed(data)
            for _, text, place in events:
                yield json.loads(text), place
            if not events:
                self.look_after_domain()

    def look_after_domain(self) -> None:
        """A ping, but no event: the Domain may be away; at the default address it is started again."""
        if not self.warned and Client(self.settings, timeout=3).get("/health")["domain"] != "ok":
            self.warned = True
            note("the Domain is away; the reply ends, with what came, when it is back")
            with contextlib.suppress(Unreachable):
                connect(self.settings)

    def wait_for_server(self, lost_at: float | None) -> None:
        away = time.monotonic() - (lost_at or time.monotonic())
        if lost_at is None:
            note("the connection was lost; the reply goes on, reconnecting (`liminal up` starts the servers) ...")
        elif away > PATIENCE:
            raise Unreachable(f"{self.url} does not answer; nothing is lost: `liminal chat -c` attaches again")
        else:
            time.sleep(min(2, 0.1 + away / 4))


def refused(status: int, data: bytes) -> Exception:
    try:
        error = json.loads(data)["error"]
        return Problem(error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        return Unreachable(f"what answers is not Liminal (status {status}); see LIMINAL_URL and LIMINAL_EDGE_PORT")


################ Starting and stopping the servers
# Each in its own session, so that a closed terminal never reaches them; the lock tells who runs, even after a kill -9.


def holder(settings: Settings, name: str) -> int | None:
    """The process that holds a server's lock, None where it does not run."""
    with contextlib.suppress(OSError), open(settings.data / f"{name}.lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read() or 0) or None
    return None


def start_servers(settings: Settings) -> None:
    """Start what does not run, and wait until both are well; Unreachable with the log's last line where one is not."""
    settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("domain", "edge"):
        if not holder(settings, name):
            path = settings.data / f"{name}.log"
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as out:
                command = [sys.executable, str(HERE / f"liminal_{name}.py")]
                quiet = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "cwd": HERE}
                process = subprocess.Popen(command, start_new_session=True, **quiet)
            wait_until_well(settings, name, process, path)


def wait_until_well(settings: Settings, name: str, process, path: pathlib.Path) -> None:
    url = f"http://{listen_host(settings.host)}:{getattr(settings, f'{name}_port')}"
    probe, deadline = Client(settings, timeout=1, url=url), time.monotonic() + 15
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(Unreachable, Problem, KeyError, TypeError):
            if probe.get("/health")["instance"] == settings.instance:
                return
        time.sleep(0.02)
    if not holder(settings, name):  # another start may have been faster, and then all is well
        last = path.read_text().strip().splitlines() or ["it says nothing"]
        raise Unreachable(f"the {name} does not start: {last[-1]} (more in {path})")


def stop_server(settings: Settings, name: str) -> bool:
    """Stop one server, whether it was started in the background or not; False where it did not run."""
    pid = holder(settings, name)
    if not pid:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE + 2
    while holder(settings, name):
        if time.monotonic() > deadline:
            words = f"process {pid}, the {name}, does not stop: `kill -9 {pid}` loses nothing acknowledged"
            raise Problem("internal", words)
        time.sleep(0.02)
    return True


def connect(settings: Settings) -> Client:
    """A client of running servers: they are started where nothing answers at the default address. Says so when they are
    older than the files, or belong to another data folder."""
    client, default = Client(settings), "LIMINAL_URL" not in settings.values
    try:
        health = client.get("/health")
    except Unreachable:
        if not default:
            raise
        note("starting Liminal ...")
        start_servers(settings)
        health = client.get("/health")
    if not isinstance(health, dict) or "instance" not in health:
        raise Unreachable(f"what answers at {settings.url} is not Liminal: set LIMINAL_EDGE_PORT to a free port")
    if not default:
        return client
    if health["instance"] != settings.instance:
        note(f"the servers at {settings.url} belong to another data folder than {settings.data}: set LIMINAL_EDGE_PORT")
    elif health["version"] != version():
        note("the running servers are older than the files: `liminal down` and `liminal up` renew them")
    elif health["domain"] != "ok":
        start_servers(settings)
    return client


################ Showing
# The reply goes to standard output and nothing else does; every note goes to standard error. On a terminal nothing that
# a model says can be a control sequence, and bundles are smoothed to a steady hand.

STEP, SPREAD = 0.015, 0.12  # seconds between two strokes of the typewriter; within which a bundle is written
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text that a terminal cannot take for a command: control characters, C1 and bidi overrides are made visible."""
    return UNSAFE.sub(lambda found: ("\\x%02x" if found[0] < "\u0100" else "\\u%04x") % ord(found[0]), text)


def coloured(file) -> bool:
    return file.isatty() and not Settings.environment("NO_COLOR")


def note(text: str) -> None:
    text = printable(text)
    print(f"\x1b[2m{text}\x1b[0m" if coloured(sys.stderr) else text, file=sys.stderr, flush=True)


def say(text: str, end: str = "\n") -> None:
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def say_json(value) -> None:
    say(encode_json(value))


def smooth(events):
    """The events, with each text cut into strokes so that it appears steadily, at most SPREAD behind the stream."""
    inbox, held, due, ended = queue.SimpleQueue(), "", 0.0, False
    threading.Thread(target=pump, args=(events, inbox), daemon=True).start()
    while not ended or held:
        try:
            item = inbox.get(timeout=STEP if held else None) if not ended else time.sleep(STEP)
        except queue.Empty:
            item = None
        if isinstance(item, dict) and item["type"] == "text":
            held, due = held + item["text"], time.monotonic() + SPREAD
        elif item is not None:
            if held:
                yield {"type": "text", "text": held}
                held = ""
            if isinstance(item, BaseException):
                raise item
            yield item
            ended = item["type"] == "done"
        if held:
            count = max(1, int(len(held) * STEP / max(STEP, due - time.monotonic())))
            yield {"type": "text", "text": held[:count]}
            held = held[count:]


def pump(events, inbox) -> None:
    try:
        for event in events:
            inbox.put(event)
    except BaseException as error:
        inbox.put(error)


class Screen:
    """One reply on standard output, event by event; what is no text of it becomes a note on a line of its own."""

    def __init__(self):
        self.last, self.calls = "\n", {}  # the last character written; tool calls without a result: (event, begun at)

    def show(self, event: dict) -> None:
        if event["type"] == "text":
            say(event["text"], end="")
            self.last = event["text"][-1]
        elif event["type"] == "tool_call":
            self.calls[event["tool_call_id"]] = event, time.monotonic()
        elif event["type"] == "tool_result":
            self.end_line()
            note(call_words(*self.calls.get(event["tool_call_id"], (event, time.monotonic())), event))
        elif event["type"] == "done":
            self.end_line()
            if event["error"]:
                fail(error_words(event["error"]), 1)
            elif event["status"] == "cancelled":
                note("this reply was cancelled")
            elif event["stop_reason"] == "max_tokens":
                note("cut off at the limit of tokens (max_tokens)")

    def end_line(self) -> None:
        if self.last != "\n":
            say("")
        self.last = "\n"


def show(client: Client, events, as_json: bool = False) -> dict:
    """Print a reply as it comes; returns its `done`. Ctrl-C cancels it, on the server too, and shows the receipt."""
    screen, message_id = Screen(), None
    try:
        for event in smooth(events) if sys.stdout.isatty() and not as_json else events:
            message_id = event["message_id"] if event["type"] == "start" else message_id
            (say_json if as_json else screen.show)(event)
            if event["type"] == "done":
                return event
    except KeyboardInterrupt:
        screen.end_line()
        receipt = client.ask("POST", f"messages/{message_id or client.find_sent()}/cancel")
        note(receipt_words(receipt))
        return {"type": "done", **receipt, "error": None}
    raise Unreachable("the stream ended without an end")


def follow(client: Client, message_id: str, position: int | None = None) -> dict:
    return show(client, client.stream("GET", f"messages/{message_id}/stream", position=position))


class Measure:
    """Watches the events of one reply: when they came, how large they were, where they were thin."""

    def __init__(self):
        self.asked, self.first, self.last, self.gap = time.monotonic(), None, None, 0.0
        self.texts, self.done, self.thread_id, self.message_id, self.position = [], None, None, None, 0

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def watch(self, events):
        for event in events:
            if event["type"] in PARTS:
                came = time.monotonic()
                self.gap = max(self.gap, came - self.last) if self.last else 0.0
                self.first, self.last = self.first or came, came
                self.position += size(event)
                if event["type"] == "text":
                    self.texts.append(event["text"])
            elif event["type"] == "start":
                self.thread_id, self.message_id = event["thread_id"], event["message_id"]
            elif event["type"] == "done":
                self.done = event
            yield event

    def ttft_ms(self) -> float | None:
        return self.first and round((self.first - self.asked) * 1000, 1)

    def rate(self) -> float | None:
        tokens, seconds = (self.done or {}).get("usage"), (self.last or 0) - (self.first or 0)
        return round(tokens["output_tokens"] / seconds, 1) if tokens and seconds > 0.001 else None

    def figures(self, ttft: bool, rate: bool) -> dict:
        """What is asked for, in ms and tokens/s; the hops' own figures are in `done`."""
        timing, figures = (self.done or {}).get("timing") or {}, {}
        if ttft:
            figures["ttft_client_ms"] = self.ttft_ms()
            figures |= {f"ttft_{hop}_ms": timing.get(f"{hop}_ttft_ms") for hop in ("edge", "domain", "provider")}
        if rate:
            count, characters = len(self.texts), len(self.text)
            figures |= {"tokens_per_s": self.rate(), "bundles": count}
            figures |= {"characters_per_bundle": round(characters / count, 1) if count else None}
            figures |= {"longest_gap_ms": round(self.gap * 1000, 1)}
        return figures


def table(rows) -> None:
    """Rows in columns; the last one takes what it needs."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        say("  ".join(map(str.ljust, row, widths)).rstrip())


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def error_words(error: dict) -> str:
    return f"{error['message']} ({error['code']})"


def call_words(call: dict, began: float, result: dict) -> str:
    """A line for one tool call: name, short arguments, duration, size of the result, and what went wrong."""
    arguments = shorten(encode_json(call.get("arguments", {})), 80)
    words = f"· {call['name']} {arguments} · {time.monotonic() - began:.1f} s · {len(result['text'])} characters"
    return words + (f" · failed: {result['text'][:300]}" if result["is_error"] else "")


def receipt_words(receipt: dict) -> str:
    kept = f"{receipt['position']} characters kept" if receipt["position"] else "nothing had come"
    status = "stopped" if receipt["status"] == "cancelled" else receipt["status"]
    return f"{status}: {kept}, message {receipt['message_id'][:8]}"


def usage_words(usage: dict | None) -> str:
    if not usage:
        return "no usage"
    about = "about " if usage["estimated"] else ""
    cost = "" if usage["cost"] is None else f", ${usage['cost']:.4f}"
    tokens_in = f"{about}{usage['input_tokens']} tokens in ({usage['cached_tokens']} cached)"
    return f"{tokens_in}, {usage['output_tokens']} out{cost}"


def reaction_words(found: dict) -> str:
    return "  ".join(f"{one['emoji']} {one['count']}" for one in found["reactions"]) or "no reactions"


def title_of(thread: dict) -> str:
    return thread["title"] or "(untitled)"


def local_time(text: str) -> str:
    import calendar

    seconds = calendar.timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S"))
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def headline(message: dict, place: str = "") -> str:
    who = "you" if message["role"] == "user" else message["model"]
    state = "" if message["status"] == "complete" else f" · {message['status']}"
    reactions = "".join(f" {one['emoji']}{one['count'] if one['count'] > 1 else ''}" for one in message["reactions"])
    return f"── {who} · {local_time(message['created_at'])} · {message['id'][:8]}{place}{state}{reactions}"


def places(messages: list[dict]) -> list[str]:
    """What tells where a message hangs, where that is not plainly behind the one before: branches and retries."""
    words, before, beside = [], None, collections.defaultdict(list)
    for message in messages:
        beside[message["parent_id"], message["role"]].append(message["id"])
    for message in messages:
        parent, kind = message["parent_id"], "reply" if message["role"] == "assistant" else "branch"
        ids = beside[parent, message["role"]]
        word = f" · {kind} {ids.index(message['id']) + 1} of {len(ids)}" if len(ids) > 1 else ""
        words.append(word + (f" to {parent[:8]}" if parent not in (None, before) else ""))
        before = message["id"]
    return words


################ Commands
# One short function each, of the settings or (with a first parameter `client`) of a connected client. Its docstring is
# its help: what it does, an example, and a line for each argument, as in `-t --thread ID`, `[thread]` (or none),
# `words...` (one or more), `-f --file PATH...` (repeatable),
# `-n COUNT=20` (a default), `--kill edge|domain` (a choice), `--format FORMAT=md|jsonl` (and its default).

COMMANDS = {}  # name -> (run(settings, options), what it does, an example, lines of arguments)


def command(fn):
    meaning, example, *arguments = [line.strip() for line in fn.__doc__.split("\n")]
    needs_client = fn.__code__.co_varnames[0] == "client"
    run = (lambda settings, options: fn(connect(settings), options)) if needs_client else fn
    COMMANDS[example.split()[1]] = run, meaning, example, arguments
    return fn


def add_argument(parser, line: str) -> None:
    names, meaning = re.split("  +", line, maxsplit=1)
    flags = [word for word in names.replace("[no-]", "").split() if word.startswith("-")]
    values = [word for word in names.split() if not word.startswith("-")]
    given = {"help": meaning}
    if not values:
        offered = "[no-]" in names
        given |= {"action": argparse.BooleanOptionalAction if offered else "store_true", "default": offered}
        return parser.add_argument(*flags, **given)
    optional, repeated = names.startswith("["), names.rstrip("]").endswith("...")
    name, _, default = values[-1].strip("[.]").partition("=")
    choices = (default or name).split("|")
    given["default"] = choices[0] if default else None
    if len(choices) > 1:
        given["choices"] = choices
    elif default.isdigit():
        given |= {"type": int, "default": int(default)}
    if flags:
        given |= {"action": "append"} if repeated else {}
        given |= {"nargs": 2, "metavar": (*values[:-1], name)} if len(values) > 1 else {}
        given |= {"metavar": name} if len(values) == len(choices) == 1 else {}
    else:
        flags = [name]
        given["nargs"] = {(True, True): "*", (False, True): "+", (True, False): "?"}.get((optional, repeated))
    parser.add_argument(*flags, **given)


@command
def chat(settings: Settings, options) -> int:
    """send a message and read the reply; without one, talk on
    liminal chat "why is the sky blue?"
    [message...]  the message; standard input, where it is piped, comes before it
    -m --model MODEL  provider/model (see `liminal models`)
    -s --system TEXT  the system text of a new thread, or of this one reply
    -c --continue  go on with the newest thread
    -t --thread ID  go on with this thread (an id, or 4 or more of its first characters)
    -f --file FILE...  put a text file into the message, with its name (repeatable)
    -o --option KEY VALUE...  pass an option to the provider (repeatable)
    -u --usage  show usage, cost, time to first token and rate on standard error
    --no-stream  print the reply when it is whole
    --background  print the reply's id and leave; `liminal attach` shows it
    --[no-]tools  offer tools to the model (see `liminal tools`)
    -T PATTERN...  offer only tools that match, as in 'git__*' (repeatable)
    --allow PATTERN...  allow these tools for this run (repeatable)
    --json  the reply's events as JSON lines
    --measure-ttft  show the time to the first token, by hop
    --measure-token-rate  show token rate, bundles and gaps"""
    parts = piped().strip("\n"), *map(read_file, options.file or ()), " ".join(options.message)
    content = "\n\n".join(filter(None, parts))
    if not content.isprintable() and content != content.encode("utf-8", "replace").decode():
        raise Problem("invalid_request", "the message is not valid UTF-8")
    if not content.strip() and not sys.stdin.isatty():
        raise Problem("invalid_request", "there is nothing to send: give a message or pipe one in")
    client = connect(settings)
    tell_unseen_keys(client)
    thread_id = options.thread and find_thread(client, options.thread)["id"]
    if getattr(options, "continue") and not thread_id:
        for thread in client.list("threads", "?limit=1"):
            thread_id = thread["id"]
            if not content:
                show_last_turn(client, thread_id)
    fields = present(
        model=find_model(client, options.model or (not thread_id and settings.model) or None),
        system=options.system,
        thread_id=thread_id,
        tools=options.T if options.tools else False,
        allow=options.allow,
        options=options.option and {key: option_value(value) for key, value in options.option},
    )
    if not content:
        return Chat(client, options, fields).talk()
    if options.background or options.no_stream:
        return send_quietly(client, {"content": content, **fields}, options)
    return exit_code(Chat(client, options, fields).send(content))


def present(**fields) -> dict:
    return {name: value for name, value in fields.items() if value is not None}


def read_file(name: str) -> str:
    try:
        text = pathlib.Path(name).read_text().rstrip()
        if "\0" in text:
            raise UnicodeError("it is a binary file")
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        return f"File {name}:\n\n{fence}\n{text}\n{fence}"
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise Problem("invalid_request", f"{name} cannot be sent as text: {why}") from None


def option_value(text: str):
    """JSON where it is, else the text itself: `-o seed 7` is a number, `-o user ada` a word."""
    if text in ("NaN", "Infinity", "-Infinity"):
        raise Problem("invalid_request", f"{text} is no number that can be sent")
    try:
        return parse_json(text.encode("utf-8", "surrogateescape"))
    except ValueError:
        return text


def find_model(client: Client, name: str | None) -> str | None:
    """The model that a part of its name means, as in `-m haiku`; what names a provider is left as it is."""
    if not name or "/" in name:
        return name
    found = [one["id"] for one in client.list("models") if name in one["id"] and one["available"]]
    exact = [one for one in found if name in one.split("/", 1)] or found
    if len(exact) == 1:
        return exact[0]
    if any(one.startswith(f"{name}/") for one in found):
        return name
    if not found and (unusable := [one for one in client.list("models") if name in one["id"] and one["why"]]):
        raise Problem("unknown_model", f"{unusable[0]['id']} cannot be used: {unusable[0]['why']}")
    several = f"{name!r} could be {', '.join(found[:8])}: give more of it"
    words = several if found else f"no usable model has {name!r} in its name"
    raise Problem("unknown_model", f"{words} (`liminal models`)")


def send_quietly(client: Client, body: dict, options) -> int:
    """Without a stream: the id of a reply in the background, or a whole reply at once."""
    body |= {"background": True} if options.background else {"stream": False}
    client.sent = request = "POST", "messages", body, {"Idempotency-Key": str(uuid.uuid4())}
    try:
        found = client.ask(*request)
    except KeyboardInterrupt:
        client.close()
        client.sent = *request[:2], {**body, "stream": True, "background": False}, request[3]
        note(receipt_words(client.ask("POST", f"messages/{client.find_sent()}/cancel")))
        return 130
    if options.json or options.background:
        say(encode_json(found) if options.json else found["message_ids"][0])
    else:
        say(found["content"], end="" if found["content"].endswith("\n") else "\n")
    if options.background:
        return 0
    if options.usage:
        timing = found["timing"] or {}
        note(
            measured_words(
                found["usage"], timing.get("edge_ttft_ms") or timing.get("domain_ttft_ms"), timing.get("tokens_per_s")
            )
        )
    return fail(error_words(found["error"]), 1) if found["error"] else 0


def measured_words(usage: dict | None, ttft_ms: float | None, rate: float | None) -> str:
    speed = f", {rate} tokens/s" if rate else ""
    return usage_words(usage) + (f", first token after {ttft_ms} ms" if ttft_ms else "") + speed


def exit_code(done: dict) -> int:
    return 130 if done["status"] == "cancelled" else 1 if done["error"] else 0


def show_last_turn(client: Client, thread_id: str) -> None:
    messages = all_messages(client, thread_id)
    asked = [message for message in messages if message["role"] == "user"][-1:]
    replies = [message for message in messages if asked and message["parent_id"] == asked[0]["id"]]
    for message in asked + replies:
        note(headline(message))
        if message["status"] in ("pending", "streaming"):
            follow(client, message["id"])
        else:
            say(message["content"].rstrip("\n"))


class Chat:
    """Messages of one thread: `fields` go with each of them, `message_id` is the last reply. A method slash_x is the
    command /x of the interactive chat, its docstring what /help tells of it."""

    def __init__(self, client: Client, options, fields: dict):
        self.client, self.options, self.fields, self.message_id = client, options, fields, None

    def send(self, content: str) -> dict:
        """Send a message and show its reply; gives its `done`. A reply that still runs in the thread is shown first."""
        client, options, seen = self.client, self.options, Measure()
        thread_id = self.fields.get("thread_id")
        for run in client.list("runs") if thread_id else ():
            if run["thread_id"] == thread_id:
                note("a reply is still being generated in this thread; here it is")
                follow(client, run["message_id"])
        seen.asked = time.monotonic()
        events = client.stream("POST", "messages", {"content": content, **self.fields})
        done = show(client, seen.watch(events), options.json)
        figures = seen.figures(options.measure_ttft, options.measure_token_rate)
        if figures and options.json:
            say_json({"type": "measure", **figures})
        elif figures:
            note("\n".join(f"{name.replace('_', ' '):<24} {value}" for name, value in figures.items()))
        if options.usage:
            note(measured_words(done["usage"], seen.ttft_ms(), seen.rate()))
        self.message_id = seen.message_id
        self.fields |= present(thread_id=seen.thread_id)
        return done

    def talk(self) -> int:
        """One message after another, until the end of input."""
        remember = keep_history(self.client.settings)
        note("Ctrl-C stops a reply, Ctrl-D leaves, /help shows more")
        while True:
            try:
                content = read_message()
            except (EOFError, KeyboardInterrupt):
                content = "/quit"
                say("")
            word, _, rest = content.strip().partition(" ")
            if word == "/quit":
                remember()
                return 0
            try:
                if slash := getattr(self, f"slash_{word[1:]}", None) if word.startswith("/") else None:
                    slash(rest.strip())
                elif re.fullmatch("/[a-z]+", word):
                    note(f"there is no {word}: /help shows what there is")
                elif word:
                    self.send(content)
            except KeyboardInterrupt:
                self.client.close()
            except (Problem, Unreachable) as error:
                report(error)

    @property
    def last_reply(self) -> str:
        if not self.message_id and (thread_id := self.fields.get("thread_id")):
            messages = all_messages(self.client, thread_id)
            self.message_id = next((one["id"] for one in reversed(messages) if one["role"] == "assistant"), None)
        if not self.message_id:
            raise Problem("invalid_request", "there is no reply yet in this chat")
        return f"messages/{self.message_id}"

    def slash_help(self, rest: str) -> None:
        """show this"""
        methods = {name.removeprefix("slash_"): method for name, method in vars(Chat).items() if "slash_" in name}
        table([*((f"/{name}", method.__doc__) for name, method in methods.items()), ("/quit", "leave, as Ctrl-D does")])

    def slash_model(self, rest: str) -> None:
        """show or change the model: /model haiku"""
        self.fields |= {"model": find_model(self.client, rest)} if rest else {}
        note(f"model: {self.fields.get('model') or 'the default'}")

    def slash_system(self, rest: str) -> None:
        """show or change the system text: /system Answer in French. (/system none takes it away)"""
        if rest:
            self.fields["system"] = "" if rest == "none" else rest
        known = self.fields.get("system")
        if known is None and (thread_id := self.fields.get("thread_id")):
            known = find_thread(self.client, thread_id)["system"]
        note(f"system: {known or 'none'}")

    def slash_retry(self, rest: str) -> None:
        """another reply to the same message, with another model if named"""
        body, seen = {"model": find_model(self.client, rest)} if rest else {}, Measure()
        events = self.client.stream("POST", f"{self.last_reply}/retry", body)
        show(self.client, seen.watch(events), self.options.json)
        self.message_id = seen.message_id

    def slash_fork(self, rest: str) -> None:
        """go on in a copy of this thread"""
        body = {"message_id": self.last_reply.removeprefix("messages/")}
        thread = self.client.ask("POST", f"threads/{self.fields['thread_id']}/fork", body)
        self.fields["thread_id"], self.message_id = thread["id"], None
        note(f"going on in a copy of this thread, {thread['id'][:8]}")

    def slash_react(self, rest: str) -> None:
        """react to the last reply: /react 👍"""
        note(reaction_words(self.client.ask("POST", f"{self.last_reply}/reactions", {"emoji": rest})))

    def slash_tools(self, rest: str) -> None:
        """offer tools: /tools on, /tools off, /tools git__*"""
        chosen = {"": self.fields.get("tools"), "on": None, "off": False}.get(rest, rest.split())
        self.fields = present(**{**self.fields, "tools": chosen})
        note(f"tools: {'off' if chosen is False else ' '.join(chosen or ['all'])}")


def keep_history(settings: Settings):
    """Line editing and a history in data/chat_history (0600); returns what saves it."""
    try:
        import readline
    except ImportError:
        return lambda: None
    path = settings.data / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)

    def remember():
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            readline.write_history_file(path)

    return remember


def read_message() -> str:
    """One message from the terminal: a line, with what follows a backslash at its end, or a whole pasted block."""
    ahead = bool(select.select([sys.stdin], [], [], 0)[0])  # typed while a reply ran: lines of their own
    block = [input("> ")]
    whole = ahead or block[0].startswith("/")
    while block[-1].endswith("\\") or not whole and select.select([sys.stdin], [], [], 0.03)[0]:
        continued = block[-1].endswith("\\")
        block[-1] = block[-1].removesuffix("\\")
        block.append(input("… " if continued else ""))
    return "\n".join(block)


def tell_unseen_keys(client: Client) -> None:
    """A key that stands in this terminal's environment is no use to servers that were started without it."""
    for provider in client.list("providers"):
        name = provider["key_env"]
        if name and Settings.environment(name) and not provider["key_set"]:
            mend = f"`liminal down` and `liminal up`, or `liminal providers key {provider['name']}`"
            note(f"{name} is set here, but the running servers do not have it: {mend}")


def all_messages(client: Client, thread_id: str) -> list[dict]:
    found, page = [], None
    while page is None or len(page) == 1000:
        after = found[-1]["number"] if found else 0
        page = client.get(f"threads/{thread_id}/messages?limit=1000&after={after}")["messages"]
        found += page
    return found


def find_thread(client: Client, ref: str | None) -> dict:
    """A thread by its id, else the newest one."""
    if ref:
        return client.get(f"threads/{quote(ref)}")
    if newest := client.list("threads", "?limit=1"):
        return newest[0]
    raise Problem("not_found", 'there is no thread yet: `liminal chat "hello"` begins one')


def find_reply(client: Client, ref: str | None, running: bool = False) -> dict:
    """A reply by its id, else the newest one that runs, else (where that will do) the newest of the newest thread."""
    if ref:
        return client.get(f"messages/{quote(ref)}")
    if runs := client.list("runs"):
        return client.get(f"messages/{max(runs, key=lambda run: run['created_at'])['message_id']}")
    threads = [] if running else client.list("threads", "?limit=1")
    messages = all_messages(client, threads[0]["id"]) if threads else []
    replies = [message for message in messages if message["role"] == "assistant"]
    if not replies:
        raise Problem("not_found", "no reply is being generated now" if running else "there is no reply yet")
    return replies[-1]


@command
def threads(client: Client, options) -> None:
    """list your threads, newest first
    liminal threads
    -n COUNT=20  how many"""
    found = client.list("threads", f"?limit={options.n}")
    table((thread["id"][:8], local_time(thread["updated_at"]), title_of(thread)) for thread in found)


@command
def show_thread(client: Client, options) -> None:
    """print a thread, with its usage and cost at the end
    liminal show 3f2a
    [thread]  an id or its first characters; without one, the newest thread"""
    thread = find_thread(client, options.thread)
    say(f"# {title_of(thread)}  ({thread['id'][:8]})")
    messages = all_messages(client, thread["id"])
    for message, place in zip(messages, places(messages)):
        say(f"\n{headline(message, place)}")
        say(message["content"].rstrip("\n"))
        if message["error"]:
            say(f"[{message['error']['message']}]")
    told = [message["usage"] for message in messages if message["usage"]]
    costs = [usage["cost"] for usage in told if usage["cost"] is not None]
    total = {name: sum(usage[name] for usage in told) for name in ("input_tokens", "cached_tokens", "output_tokens")}
    total |= {"cost": sum(costs) if costs else None, "estimated": any(usage["estimated"] for usage in told)}
    say(f"\n{usage_words(total)}")


@command
def search(client: Client, options) -> int:
    """find messages that hold all the words
    liminal search blue sky
    words...  what to look for"""
    found = client.get(f"search?q={quote(' '.join(options.words))}")["results"]
    bold, plain = ("\x1b[1m", "\x1b[0m") if coloured(sys.stdout) else ("", "")
    for one in found:
        say(f"{one['thread_id'][:8]} {one['message_id'][:8]} {local_time(one['created_at'])} {one['role']}")
        for piece in re.split("([\x02\x03])", re.sub("[ \\t\\r\\n]+", " ", one["snippet"])):
            print({"\x02": bold, "\x03": plain}.get(piece, printable(piece)), end="")
        say("\n")
    return 0 if found else fail("nothing found", 1)


@command
def fork(client: Client, options) -> None:
    """go on from a message in a copy of its thread
    liminal fork 7be1
    [message]  the last message of the copy; without one, the newest reply"""
    message = find_reply(client, options.message)
    thread = client.ask("POST", f"threads/{message['thread_id']}/fork", {"message_id": message["id"]})
    say(thread["id"])
    note(f'go on with: liminal chat -t {thread["id"][:8]} "..."')


@command
def rename(client: Client, options) -> None:
    """give a thread another title
    liminal rename 3f2a "blue skies"
    thread  an id or its first characters
    title  the new title"""
    thread = client.ask("PATCH", f"threads/{quote(options.thread)}", {"title": options.title})
    say(f"{thread['id'][:8]}  {thread['title']}")


@command
def delete(client: Client, options) -> None:
    """delete a thread and its messages
    liminal delete 3f2a
    thread  an id or its first characters
    -y --yes  do not ask"""
    thread = find_thread(client, options.thread)
    if not options.yes:
        confirm(f"delete {title_of(thread)!r} ({thread['id'][:8]}) with all its messages?")
    remove(client, "threads", thread["id"])


def remove(client: Client, kind: str, name: str) -> None:
    client.ask("DELETE", f"{kind}/{quote(name)}")
    say("deleted")


def confirm(question: str) -> None:
    """Ask on a terminal; Problem where the answer is not yes, or nobody can be asked."""
    answer = ""
    with contextlib.suppress(EOFError):
        answer = input(f"{printable(question)} [y/N] ") if sys.stdin.isatty() else ""
    if answer.strip().lower() not in ("y", "yes"):
        raise Problem("invalid_request", "nothing was done (-y does not ask)")


@command
def export(client: Client, options) -> None:
    """print a thread as Markdown, or as JSON lines
    liminal export 3f2a --format jsonl
    [thread]  an id or its first characters; without one, the newest thread
    --format FORMAT=md|jsonl  Markdown, or every message with all that is known of it"""
    thread = find_thread(client, options.thread)
    if options.format == "md":
        say(f"# {title_of(thread)}")
    for message in all_messages(client, thread["id"]):
        if options.format == "jsonl":
            say_json(message)
        else:
            who = "You" if message["role"] == "user" else message["model"]
            say(f"\n## {who}\n\n{message['content'].rstrip()}")


@command
def react(client: Client, options) -> None:
    """react to a message with an emoji, or take it back
    liminal react 7be1 👍
    message  an id or its first characters (see `liminal show`)
    emoji  one emoji, or :name:
    --remove  take the reaction back"""
    path = f"messages/{quote(options.message)}/reactions"
    if options.remove:
        found = client.ask("DELETE", f"{path}/{quote(options.emoji)}")
    else:
        found = client.ask("POST", path, {"emoji": options.emoji})
    say(reaction_words(found))


@command
def runs(client: Client, options) -> None:
    """list the replies being generated now
    liminal runs"""
    rows = [(run["message_id"], run["model"], run["position"], run["created_at"]) for run in client.list("runs")]
    table((one[:8], model, f"at {position}", local_time(began)) for one, model, position, began in rows)


@command
def attach(client: Client, options) -> int:
    """follow a reply, from its beginning or from now on
    liminal attach 7be1
    [message]  an id or its first characters; without one, the newest
    --from-now  only what comes from now on"""
    reply = find_reply(client, options.message)
    return exit_code(follow(client, reply["id"], reply["position"] if options.from_now else None))


@command
def stop(client: Client, options) -> None:
    """stop a reply; what came is kept
    liminal stop
    [message]  an id or its first characters; without one, the newest"""
    reply = find_reply(client, options.message, running=True)
    say(receipt_words(client.ask("POST", f"messages/{reply['id']}/cancel")))


@command
def retry(client: Client, options) -> int:
    """generate another reply to the same message
    liminal retry -m ollama/llama3.2
    [message]  an id or its first characters; without one, the newest
    -m --model MODEL  with this model (default: the same)"""
    path = f"messages/{find_reply(client, options.message)['id']}/retry"
    return exit_code(show(client, client.stream("POST", path, present(model=find_model(client, options.model)))))


@command
def overflow(client: Client, options) -> None:
    """list database bundles that wait for the Domain
    liminal overflow
    --json  as one JSON object"""
    found = client.get("overflow?limit=1000")
    if options.json:
        return say_json(found)
    table(map(waiting_row, found["waiting"]))
    kept = f"{found['queue']} in the queue, {found['overflow']} in overflow.db"
    say(f"{kept}, {found['left_to_domain']} left to the Domain")


def waiting_row(one: dict) -> tuple:
    place, age, tries = f"at {one['position']}", f"{one['age_s']:.1f} s", f"{one['tries']} tries"
    return one["message_id"][:8], place, age, tries, one["where"]


@command
def stats(client: Client, options) -> None:
    """figures of both servers: time to first token, rate, bundles, cost
    liminal stats
    --json  as one JSON object"""
    found = client.get("stats")
    if options.json:
        return say_json(found)
    queued, bundles, consumers = found["queue"], found["bundles"], ("client", "database")
    waits = queued.pop("wait_ms")
    rows = [(f"ttft {hop}, ms up to", spread(found["ttft_ms"][hop])) for hop in ("provider", "domain", "edge")]
    rows += [(f"{who} bundles by", spread(bundles[who])) for who in consumers]
    rows += [(f"{who} bundles, tokens", spread(bundles[f"{who}_tokens"])) for who in consumers]
    rows += [("queue", spread(queued)), ("queue wait, ms up to", spread(waits))]
    names = ("tokens", "tokens_per_s", "runs", "clients", "resumes", "cancellations")
    table(rows + [(name.replace("_", " "), "-" if found[name] is None else found[name]) for name in names])
    say("")
    table([("model", "replies", "errors", "tokens in", "out", "cost"), *map(model_row, found["models"])])


def spread(figures: dict) -> str:
    return "  ".join(f"{name} {'-' if value is None else f'{value:g}'}" for name, value in figures.items())


def model_row(one: dict) -> tuple:
    cost = "-" if one["cost"] is None else f"${one['cost']:.4f}"
    return one["model"], one["runs"], one["errors"], one["input_tokens"], one["output_tokens"], cost


@command
def models(client: Client, options) -> None:
    """list what can be used now, and why not where it cannot
    liminal models"""
    found = client.list("models")
    table(("*" if one["default"] else " ", one["id"], "" if one["available"] else f"no: {one['why']}") for one in found)


@command
def tools(client: Client, options) -> None:
    """list MCP servers and their tools, and which are allowed
    liminal tools"""
    found = client.get("tools")
    if found["why"]:
        note(found["why"])
    for server in found["servers"]:
        say(f"{server['name']}: {server['state']}" + (f" ({server['why']})" if server["why"] else ""))
        table(map(tool_row, server["tools"]))


def tool_row(tool: dict) -> tuple:
    words = (tool["description"] if tool["allowed"] else tool["why"]).strip().split("\n")[0]
    return f"  {tool['name']}", "allowed" if tool["allowed"] else "refused", shorten(words, 150)


def named(options) -> str:
    if not options.name:
        raise Problem("invalid_request", f"`liminal {options.command} {options.action}` needs a name or an id")
    return options.name


@command
def keys(client: Client, options) -> None:
    """list, create or revoke API keys
    liminal keys create "my phone"
    [action=list|create|revoke]  what to do
    [name]  the new key's name, or the id of the one to revoke
    --user NAME  make the key for this user, by name or id (owners only)"""
    if options.action == "list":
        keys = client.list("keys")
        table((one["id"][:8], one["prefix"] + "...", one["name"], one["last_used_at"] or "never used") for one in keys)
    elif options.action == "create":
        user_id = find_user(client, options.user)["id"] if options.user else None
        made = client.ask("POST", "keys", present(name=named(options), user_id=user_id))
        note("this is shown once; LIMINAL_API_KEY takes it")
        say(made["secret"])
    else:
        ids = [one["id"] for one in client.list("keys") if one["id"].startswith(named(options))]
        gone = client.ask("DELETE", f"keys/{quote(ids[0] if len(ids) == 1 else options.name)}")
        say(f"revoked {gone['name']} ({gone['prefix']}...)")


@command
def users(client: Client, options) -> None:
    """list, create or delete users (owners only)
    liminal users create ada
    [action=list|create|delete]  what to do
    [name]  the new user's name, or the name or id of the one to delete
    -y --yes  do not ask"""
    if options.action == "list":
        table((one["id"][:8], one["role"], one["name"]) for one in client.list("users"))
    elif options.action == "create":
        made = client.ask("POST", "users", {"name": named(options)})
        say(f"{made['id']}  {made['name']}")
        note(f"now give them a key: `liminal keys create NAME --user {made['name']}`")
    else:
        user = find_user(client, named(options))
        if not options.yes:
            confirm(f"delete the user {user['name']!r} with all keys, threads and messages?")
        remove(client, "users", user["id"])


def find_user(client: Client, ref: str) -> dict:
    """A user by name, or by the first characters of the id."""
    found = [one for one in client.list("users") if ref == one["name"] or len(ref) >= 4 and one["id"].startswith(ref)]
    if len(found) != 1:
        raise Problem("not_found", f"there is no user {ref!r}" if not found else f"{ref!r} means more than one user")
    return found[0]


@command
def providers(client: Client, options) -> None:
    """list, add or delete providers, or give one its key
    liminal providers key anthropic
    [action=list|add|delete|key]  what to do
    [name]  the provider's name
    --kind KIND=openai  how it is spoken to: openai, anthropic or demo
    --base-url URL  its address, as in https://openrouter.ai/api/v1
    --key-env NAME  the variable that holds its key, as in OPENROUTER_API_KEY
    --model MODEL...  a model of it, the default one first (repeatable)"""
    if options.action == "list":
        table(map(provider_row, client.list("providers")))
    elif options.action == "add":
        fields = {name: getattr(options, name) for name in ("kind", "base_url", "key_env")} | {"models": options.model}
        made = client.ask("PUT", f"providers/{quote(named(options))}", fields)
        say(f"{made['name']} is there: use it as {made['name']}/MODEL")
        if made["key_env"] and not made["key_set"]:
            note(f"now give it its key: `liminal providers key {made['name']}`")
    elif options.action == "delete":
        remove(client, "providers", named(options))
    else:
        set_key(client, named(options))


def provider_row(one: dict) -> tuple:
    return one["name"], one["kind"], one["key_env"] or "-", "set" if one["key_set"] else "-", one["base_url"] or "-"


def set_key(client: Client, name: str) -> None:
    """Ask for a provider's key without echo and write it to data/env, which the Domain reads again by itself."""
    import getpass

    known = {one["name"]: one["key_env"] for one in client.list("providers")}
    variable = known.get(name)
    if not variable:
        takers = ", ".join(name for name, needed in known.items() if needed)
        raise Problem("invalid_request", f"{name} takes no key; these do: {takers}")
    secret = ""
    with contextlib.suppress(EOFError):
        secret = (getpass.getpass(f"{variable}: ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
    if not secret or not secret.isprintable() or set(secret) & set(" \"'#"):
        raise Problem("invalid_request", "that is no key: nothing was changed")
    path = client.settings.data / "env"
    lines = path.read_text().rstrip("\n").split("\n") if path.exists() else []
    own = re.compile(rf"\s*(export )?\s*{re.escape(variable)}\s*(=|$)")
    write_private(path, "\n".join([*(line for line in lines if not own.match(line)), f"{variable}={secret}"]) + "\n")
    say(f"{variable} is in {path}; the next message uses it")
    if Settings.environment(variable) not in ("", secret):
        note(f"another {variable} stands in this environment, and wins in servers that are started from it")


@command
def up(settings: Settings, options) -> None:
    """start both servers in the background
    liminal up"""
    start_servers(settings)
    connect(settings)
    say(f"Liminal is up at {settings.url}")


@command
def down(settings: Settings, options) -> None:
    """stop both servers, the Edge first; nothing is lost
    liminal down"""
    stopped = [name for name in ("edge", "domain") if stop_server(settings, name)]
    say(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")


@command
def status(settings: Settings, options) -> int:
    """what runs, where, which version, and whether all is well
    liminal status"""
    addresses = {"domain": settings.domain_url, "edge": settings.url}
    told = {name: server_words(settings, name, url) for name, url in addresses.items()}
    well, rows = all(told.values()), [("data", settings.data)]
    rows += [(name, told[name] or f"not running at {url}: `liminal up` starts it") for name, url in addresses.items()]
    paths = [settings.data, *settings.data.glob("*")] if settings.data.is_dir() else ()
    if open_files := sorted(path.name for path in paths if path.stat().st_mode & 0o077):
        mend = f"chmod -R go= {settings.data}"
        rows.append(("files", f"readable by others: {' '.join(open_files)}; mend it with {mend}"))
    faults = []
    if told["edge"]:
        for row in system_rows:
            try:
                rows += row(Client(settings))
            except (Problem, Unreachable) as error:
                if getattr(error, "code", "") not in ("forbidden", "domain_unavailable"):
                    faults.append(error)
    bad = [name for name, words in rows if name.endswith(".db") and words != "ok"]
    table(rows)
    for error in faults[-1:]:
        report(error)
    return 3 if not well else 1 if faults or bad else 0


def server_words(settings: Settings, name: str, url: str) -> str:
    """What there is to say of a server that is well, "" of any other."""
    try:
        seen, process = Client(settings, timeout=3, url=url).get("/health"), holder(settings, name)
        age = "" if seen["version"] == version() else ", older than the files: `liminal down` and `liminal up`"
        other = "" if seen["instance"] == settings.instance else ", of another data folder: set its port"
        return f"well at {url}{f', process {process}' if process else ''}, version {seen['version']}{age}{other}"
    except (Unreachable, Problem, KeyError, TypeError):
        return ""


def key_rows(client: Client) -> list[tuple]:
    known = [(one, one["key_env"]) for one in client.list("providers") if one["key_env"]]
    mend = "not set: `liminal providers key {}`"
    return [(one["name"], f"{env} {'is set' if one['key_set'] else mend.format(one['name'])}") for one, env in known]


def database_rows(client: Client) -> list[tuple]:
    found = client.get("status")["databases"].items()
    return [
        (name, "ok" if state == "ok" else f"{' '.join(state.split())}: restore it from a backup")
        for name, state in found
    ]


def queue_rows(client: Client) -> list[tuple]:
    waits = client.get("overflow?limit=1")
    return [("queue", f"{waits['queue']} bundles wait, {waits['overflow']} in overflow.db (`liminal overflow`)")]


system_rows = (key_rows, database_rows, queue_rows)


################ Breaking things on purpose
# The same promises that the test suite checks, against any running system and model: every stream whole, in order,
# and equal to what is stored. They make threads of their own, and delete them.


@command
def test(client: Client, options) -> int:
    """measure and break a running system on purpose
    liminal test network --simulate-disconnect --at-token 20 --times 3
    what=concurrent|network|contract|all  many streams; lost connections and killed servers; every operation; all three
    -m --model MODEL=demo/load-200-50  the model to test with (default: demo/load-200-50)
    --sessions COUNT=10  concurrent: how many at once
    --messages COUNT=1  concurrent: how many messages in each
    --simulate-disconnect  network: drop the connection and resume (always done)
    --at-token COUNT=20  network: drop it after so many words
    --times COUNT=1  network: drop it so often
    --kill edge|domain  network: kill -9 this server in mid-reply, and start it again
    -y --yes  do not ask before killing
    --json  the figures as one JSON object"""
    failed, options.model = False, find_model(client, options.model)
    if min(options.sessions, options.messages, options.times, options.at_token) < 1:
        raise Problem("invalid_request", "the numbers must be at least 1")
    kinds = {"concurrent": test_concurrent, "network": test_network, "contract": test_contract}
    for name in kinds if options.what == "all" else [options.what]:
        figures, faults = kinds[name](client, options)
        failed |= bool(faults)
        if options.json:
            say_json({"test": name, **figures, "faults": faults})
        else:
            table((word.replace("_", " "), value) for word, value in figures.items())
            for fault in faults:
                say(f"WRONG: {fault}")
    return 1 if failed else 0


def compare_stored(client: Client, seen: Measure) -> list[str]:
    """What is wrong with a finished stream, against the message on disk and what the load model must have sent."""
    stored, done, text = client.get(f"messages/{seen.message_id}"), seen.done, seen.text
    faults = []
    if stored["status"] != done["status"]:
        faults.append(f"status {done['status']} is stored as {stored['status']}")
    if stored["content"] != text:
        faults.append(f"{len(text)} characters came, {len(stored['content'])} others are stored")
    if load := re.fullmatch(r"demo/load-(\d+)-\d+", stored["model"]):
        whole = "".join(f" t{number}" for number in range(int(load[1])))
        if text != (whole if stored["status"] == "complete" else whole[: len(text)]):
            faults.append("the text is not what the load model sent")
    if not stored["position"] == seen.position == done["position"]:
        faults.append(f"position {seen.position} is stored as {stored['position']}, told as {done['position']}")
    return [f"message {seen.message_id[:8]}: {fault}" for fault in faults]


def test_concurrent(client: Client, options) -> tuple[dict, list[str]]:
    """Many sessions at once: every stream complete, ordered and equal to what is stored."""
    seen, faults, wanted = [], [], options.sessions * options.messages

    def session():
        own, body = Client(client.settings), {"content": "load test", "model": options.model}
        try:
            for _ in range(options.messages):
                one = Measure()
                collections.deque(one.watch(own.stream("POST", "messages", body)), maxlen=0)
                faults.extend(compare_stored(own, one))
                if one.done["status"] != "complete":
                    faults.append(f"message {one.message_id[:8]} ended as {one.done['status']}")
                body["thread_id"] = one.thread_id
                seen.append(one)
            own.ask("DELETE", f"threads/{body['thread_id']}")
        except (Problem, Unreachable, OSError) as error:
            faults.append(f"a session broke off: {error}")

    threads = [threading.Thread(target=session, daemon=True) for _ in range(options.sessions)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    while running := [thread for thread in threads if thread.is_alive()]:
        progress(len(seen), wanted)
        running[-1].join(0.2)
    progress(None, 0)
    if len(seen) < wanted and not faults:
        faults.append(f"only {len(seen)} of {wanted} messages came through")
    return load_figures(seen, time.monotonic() - began), faults


def load_figures(seen: list[Measure], seconds: float) -> dict:
    tokens = sum((one.done["usage"] or {}).get("output_tokens", 0) for one in seen)
    ttft = sorted(one.ttft_ms() for one in seen if one.first)
    figures = {"messages": len(seen), "tokens": tokens, "seconds": round(seconds, 2)}
    figures["tokens_per_s"] = round(tokens / seconds, 1)
    for percent in (50, 95, 99):
        figures[f"ttft_p{percent}_ms"] = ttft[min(len(ttft) - 1, len(ttft) * percent // 100)] if ttft else None
    return figures | {"longest_gap_ms": round(max((one.gap for one in seen), default=0) * 1000, 1)}


def test_network(client: Client, options) -> tuple[dict, list[str]]:
    """One reply whose connection is dropped again and again, and resumed: nothing lost, nothing twice."""
    settings, victim = client.settings, options.kill
    if victim and not holder(settings, victim):
        raise Problem("invalid_request", f"the {victim} of {settings.data} does not run here: there is nothing to kill")
    if victim and client.get("/health")["instance"] != settings.instance:
        raise Problem(
            "invalid_request", f"{client.url} belongs to another data folder than {settings.data}: nothing was killed"
        )
    if victim and not options.yes:
        confirm(f"kill -9 the {victim}, process {holder(settings, victim)}?")
    seen, drops, began = Measure(), 0, time.monotonic()
    request = "POST", "messages", {"content": "network test", "model": options.model}
    while not seen.done:
        for event in seen.watch(client.stream(*request, position=seen.position if seen.message_id else None)):
            if drops < options.times and len(seen.text.split()) >= options.at_token * (drops + 1):
                drops += 1
                break
        client.close()
        progress(drops, options.times)
        request = "GET", f"messages/{seen.message_id}/stream", None
        if victim and drops == options.times and not seen.done:
            kill_and_start(settings, victim)
            victim = None
    progress(None, 0)
    faults, error = compare_stored(client, seen), seen.done["error"]
    if error and not (options.kill == "domain" and error["code"] == "interrupted"):
        faults.append(f"the reply failed: {error_words(error)}")
    if drops < options.times:
        faults.append(f"the reply was over after {drops} drops: take a smaller --at-token or a longer reply")
    client.ask("DELETE", f"threads/{seen.thread_id}")
    figures = {"drops": drops, "status": seen.done["status"], "characters": seen.position}
    figures["seconds"] = round(time.monotonic() - began, 2)
    figures["verdict"] = "not as promised" if faults else "as promised: nothing lost, nothing twice"
    return figures | {"sha256": hashlib.sha256(seen.text.encode()).hexdigest()[:16]}, faults


def kill_and_start(settings: Settings, name: str) -> None:
    """kill -9 a server of this data folder, and start it again."""
    os.kill(holder(settings, name), signal.SIGKILL)
    while holder(settings, name):
        time.sleep(0.01)
    start_servers(settings)


def progress(done: int | None, of: int) -> None:
    """A bar on standard error while it is a terminal; None clears it."""
    if sys.stderr.isatty():
        bar = "" if done is None else f"[{'#' * (30 * done // max(1, of)):<30}] {done}/{of}"
        print(f"\r\x1b[K{bar}", end="", file=sys.stderr, flush=True)


class Trial:
    """Calls operations of the Edge and holds every answer and event against the contract; gathers `faults`."""

    def __init__(self, client: Client):
        self.client, self.operations, self.faults = client, operations("edge"), []
        self.calls, self.owner = collections.Counter(), client.send("GET", "users").status == 200
        client.close()  # that answer's body stays unread

    def call(self, name: str, /, body=None, status: int | None = None, key: str | None = None, query="", **names):
        """One call; the parsed answer, or a stream's first event. `status` is what must come (by default, success)."""
        operation, self.calls[name] = self.operations[name], self.calls[name] + 1
        path = operation.path.format_map({place: quote(value) for place, value in names.items()}) + query
        client = Client(self.client.settings, timeout=30, key=key)
        response = client.send(operation.method, path.removeprefix("/api/v1/"), body)
        data, kind = response.read(), response.getheader("Content-Type", "")
        if response.status != (status or operation.status):
            words = f"status {response.status} instead of {status or operation.status}"
            self.faults.append(f"{name}: {words}: {data[:200]!r}")
        if "event-stream" in kind:
            return self.check_stream(name, data)
        try:
            value = json.loads(data) if data and "json" in kind else None
        except ValueError:
            self.faults.append(f"{name}: what came is no JSON: {data[:100]!r}")
            return collections.defaultdict(str)
        error = response.status >= 400
        self.check(name, schema_check("Error") if error else operation.replies.get(response.status), value)
        return value

    def check(self, what: str, test, value) -> None:
        if fault := test and test(value):
            self.faults.append(f"{what}: {dotted(fault)} {fault[1]}")

    def check_stream(self, name: str, data: bytes) -> dict:
        events = [json.loads(text) for _, text, _ in Decoder().feed(data)]
        for event in events:
            self.check(f"{name}: {event['type']}", schema_check("Event"), event)
        if [event["type"] for event in events if event["type"] in ("start", "done")] != ["start", "done"]:
            self.faults.append(f"{name}: the stream has not exactly one start, first, and one done, last")
        return events[0]

    def good_input(self) -> None:
        call, small = self.call, {"content": "contract test", "model": "demo/load-20-0"}
        started = call("send_message", small)
        reply, thread = {"message_id": started["message_id"]}, {"thread_id": started["thread_id"]}
        call("send_message", {**small, "stream": False, **thread})
        later = call("send_message", {**small, "background": True}, 202)
        call("stream_message", message_id=later["message_ids"][0])
        for name in ("get_message", "stream_message", "cancel_message", "retry_message"):
            call(name, **reply)
        call("add_reaction", {"emoji": "👍"}, **reply)
        call("remove_reaction", emoji="👍", **reply)
        made = call("create_thread", {"title": "contract test"})
        for name, body in {"get_thread": None, "update_thread": {"title": "changed"}, "list_messages": None}.items():
            call(name, body, **thread)
        forked = call("fork_thread", reply, **thread)
        call("search_messages", query="?q=%22contract")
        call("list_threads", query="?limit=1")
        lists = ("list_runs", "list_models", "list_tools", "list_providers", "list_keys")
        for name in (*lists, "get_stats", "health", "metrics", "contract"):
            call(name)
        for one in {thread["thread_id"], later["thread_id"], made["id"], forked["id"]}:
            call("delete_thread", thread_id=one)

    def keys_and_owners(self) -> None:
        call = self.call
        made = call("create_key", {"name": "contract test"})
        call("create_session", key=made["secret"])
        call("delete_session", status=401)  # a key is no session
        call("revoke_key", key_id=made["id"])
        call("list_threads", status=401, key=made["secret"])
        for name in ("list_users", "list_overflow", "get_status"):
            call(name, status=None if self.owner else 403)
        if self.owner:
            user = call("create_user", {"name": f"contract test {made['id'][:4]} {os.getpid()}"})
            call("delete_user", user_id=user["id"])
            call("put_provider", {"kind": "openai", "base_url": "http://127.0.0.1:9/v1"}, name="contract-test")
            call("delete_provider", name="contract-test")

    def bad_input(self) -> None:
        """No key, a field that is not known, things that do not exist."""
        strange = {"emoji": "👍", "name": "no-such-thing"}
        for name, operation in self.operations.items():
            places = [given.name for given in operation.parameters if given.where == "path"]
            nothing = {place: strange.get(place, "00000000-0000-4000-8000-000000000000") for place in places}
            needed = operation.security.get("key")
            if operation.security:
                self.call(name, {} if operation.body else None, 401, key="none", **nothing)
            if needed is not None and operation.body_required and (self.owner or "owner" not in needed):
                self.call(name, {"no such field": 1}, 400, **nothing)
            elif places and operation.method in ("GET", "DELETE") and (self.owner or "owner" not in (needed or ())):
                self.call(name, None, 404, **nothing)


def test_contract(client: Client, options) -> tuple[dict, list[str]]:
    """Every operation of contracts.json with good and with bad input; every answer and event is held against it."""
    trial = Trial(client)
    for part in (trial.good_input, trial.keys_and_owners, trial.bad_input):
        part()
    trial.faults += [f"{name} was not called" for name in trial.operations if not trial.calls[name]]
    return {"operations": len(trial.operations), "calls": trial.calls.total()}, trial.faults


################ The command line


def make_parser() -> argparse.ArgumentParser:
    fields = [field.metadata for field in dataclasses.fields(Settings) if field.metadata]
    lines = [f"  {field['name']:<24} {field['meaning']}" for field in fields]
    words = "\n".join(["settings (environment, or lines of data/env):", *lines])
    words += "\n\nexit status: 0 done, 1 failed, 2 wrong usage, 3 no server, 130 interrupted"
    shape = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    about = "Chat with any LLM; a reply is never lost. Without a command: chat."
    parser = argparse.ArgumentParser("liminal", description=about, epilog=words, **shape)
    parser.add_argument("--version", action="version", version=f"liminal {version()}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    for name, (fn, meaning, example, arguments) in COMMANDS.items():
        sub = commands.add_parser(name, help=meaning, description=meaning, epilog=f"example: {example}", **shape)
        sub.set_defaults(run=fn)
        for line in arguments:
            add_argument(sub, line)
    return parser


def with_command(words: list[str]) -> list[str]:
    """`liminal "a question"` and `liminal -m x "..."` mean chat; a single unknown word is more likely a slip."""
    first = words[0] if words else "-"
    if first.startswith("-"):
        return words if first in ("-h", "--help", "--version") else ["chat", *words]
    means_chat = first not in COMMANDS and (" " in first or piped().strip())
    return ["chat", *words] if means_chat else words


@functools.cache
def piped() -> str:
    """What is piped in, "" at a terminal."""
    try:
        return "" if sys.stdin.isatty() else sys.stdin.buffer.read().decode()
    except UnicodeError:
        raise Problem("invalid_request", "standard input is not valid UTF-8") from None


def main() -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w" if number else "r"))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        options = make_parser().parse_args(with_command(sys.argv[1:]))
        code = options.run(Settings.load(), options) or 0
        sys.stdout.flush()
    except (Problem, Unreachable, Lost) as error:
        code = report(error)
    except KeyboardInterrupt:
        code = fail("interrupted", 130)
    except BrokenPipeError:
        code = drop_output(0)  # whoever read us has read enough; a running reply goes on
    except OSError as error:
        code = drop_output(fail(f"{error.filename or 'standard output'}: {error.strerror or error}", 1))
    sys.exit(code)


def drop_output(code: int) -> int:
    """Let nothing more be written, so that the end of the process is quiet."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def report(error: Exception) -> int:
    """Say what went wrong; the exit status."""
    if isinstance(error, Problem):
        return fail(error_words(vars(error)), 1)
    return fail(f"the connection was lost: {error}" if isinstance(error, Lost) else str(error), 3)


def fail(words: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"liminal: {printable(' '.join(words.split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
