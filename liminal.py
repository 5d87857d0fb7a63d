"""Liminal, the part that everything shares: the wire, the client and the commands.

Owns: settings, errors, the contract and its checker, positions, Server-Sent Events, serving helpers, the command line.
Never: opens a database, speaks to an LLM, imports the servers. Only the standard library at the top: the CLI starts fast.

A token's way: provider -> liminal_domain.py: read_provider, run, record, stream_run
-> liminal_edge.py: follow_run, bundle, stream_events -> here: Client.stream, show.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
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
    domain_url: str = setting("LIMINAL_DOMAIN_URL", "", "where the Edge finds the Domain (default: this host, its port)")
    url: str = setting("LIMINAL_URL", "", "where the CLI finds the Edge (default: this host, its port)")
    host: str = setting("LIMINAL_HOST", "127.0.0.1", "address both servers listen on")
    api_key: str = setting("LIMINAL_API_KEY", "", "key of the CLI (default: the one in data/cli.key)", False)
    model: str = setting("LIMINAL_MODEL", "", "model where neither request nor thread names one, as provider/model")
    context: int = setting("LIMINAL_CONTEXT", 100_000, "tokens that a prompt may hold, estimated at 3 bytes each")
    mcp: pathlib.Path = setting("LIMINAL_MCP", None, "file that names the MCP servers (default: data/mcp.json)")
    files_root: str = setting("LIMINAL_FILES_ROOT", str(HERE), "folders that file tools may read, joined by ':'")
    tool_rounds: int = setting("LIMINAL_TOOL_ROUNDS", 10, "times that a reply may call tools and go on")
    queue_size: int = setting("LIMINAL_QUEUE_SIZE", 1_000, "database bundles that the Edge holds in memory")
    provider_timeouts: str = setting("LIMINAL_PROVIDER_TIMEOUTS", "600,120", "seconds to a provider's first byte, and between two")
    check_events: bool = setting("LIMINAL_CHECK_EVENTS", False, "1: check every event against the contract (for tests)")
    edge_private_key: str = setting("EDGE_PRIVATE_KEY", "", "PEM text or path (default: data/edge_private_key.pem)", False)
    edge_public_key: str = setting("EDGE_PUBLIC_KEY", "", "PEM text or path (default: data/edge_public_key.pem)")
    anthropic_api_key: str = setting("ANTHROPIC_API_KEY", "", "key of the provider anthropic", False)
    anthropic_base_url: str = setting("ANTHROPIC_BASE_URL", "https://api.anthropic.com", "address of the provider anthropic")
    openai_api_key: str = setting("OPENAI_API_KEY", "", "key of the provider openai", False)
    openai_base_url: str = setting("OPENAI_BASE_URL", "https://api.openai.com/v1", "address of the provider openai")
    ollama_host: str = setting("OLLAMA_HOST", "127.0.0.1:11434", "address of the provider ollama")
    values: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)
    read_from: tuple = dataclasses.field(default=(), repr=False, compare=False)

    @classmethod
    def load(cls) -> Settings:
        """The settings as they stand now; SystemExit with one line where a value makes no sense."""
        data = pathlib.Path(os.environ.get("LIMINAL_DATA") or HERE / "data").expanduser().resolve()
        read_from = stamp(data / "env")
        values = {**read_env(data / "env"), **os.environ, "LIMINAL_DATA": str(data)}
        found = {"values": values, "read_from": read_from}
        for field in dataclasses.fields(cls):
            value = values.get(field.metadata.get("name"), "").strip()
            if value:
                found[field.name] = convert(field, value)
        made = cls(**found)
        missing = {"mcp": data / "mcp.json"} if made.mcp is None else {}
        for name, port in (("domain_url", made.domain_port), ("url", made.edge_port)):
            missing[name] = checked_url(name, getattr(made, name)) or f"http://{listen_host(made.host)}:{port}"
        return dataclasses.replace(made, **missing)

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


def convert(field, value: str):
    """One variable's text as its field's type; a `Settings` annotation is text, since annotations are postponed here."""
    try:
        if field.type == "int":
            number = int(value)
            if not 0 < number < 1 << 31 or field.name.endswith("_port") and number > 65535:
                raise ValueError(value)
            return number
        if field.type == "bool":
            return value not in ("0", "false", "no")
        if field.name == "provider_timeouts":
            first, between = map(float, value.split(","))
            if not 0 < first < float("inf") or not 0 < between < float("inf"):
                raise ValueError(value)
    except ValueError:
        raise SystemExit(f"liminal: {field.metadata['name']}={value!r} makes no sense: {field.metadata['meaning']}") from None
    return pathlib.Path(value).expanduser().resolve() if field.type == "pathlib.Path" else value


def checked_url(name: str, url: str) -> str:
    """A server's address without a slash at its end; SystemExit where it is none."""
    try:
        parts = urllib.parse.urlsplit(url)
        if url and (parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0):
            raise ValueError(url)
    except ValueError:
        raise SystemExit(f"liminal: LIMINAL_{name.upper()}={url!r} is no address like http://127.0.0.1:8765") from None
    return url.rstrip("/")


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
# One exception, raised anywhere, becomes the one error answer. Status and retriability of a code stand in contracts.json.


class Problem(Exception):
    """An error for the client: `code` is one of contracts.json's, `message` says what to do. `more`: field, message_ids.
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

encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def parse_json(data: bytes):
    """One JSON value out of UTF-8, or ValueError: no NaN, no duplicate keys, no lone surrogates, no integer past 63 bits."""
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=unique, parse_int=bounded, parse_float=finite, parse_constant=finite
        )
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
    if "I" in text or "N" in text or abs(float(text)) == float("inf"):
        raise ValueError(f"it holds the number {text[:20]}")
    return float(text)


################ The contract
# contracts.json binds, checks and documents both servers. The checker knows the keywords that we use and refuses all
# others at start, so that no rule is ever silently ignored. A schema is compiled once to closures: about 1 us an object.

ANNOTATIONS = {"$schema", "$id", "$comment", "$defs", "title", "description", "default", "format", "examples", "deprecated"}


@functools.cache
def contract() -> dict:
    return json.loads((HERE / "contracts.json").read_bytes())


def faults(schema: dict | bool, value, root: dict | None = None) -> list[tuple[str, str]]:
    """The first fault of a value as [(field, why)], or [] where it fits. ValueError for a schema that we cannot check."""
    fault = Checker(schema if root is None else root).compile(schema)(value)
    return [(".".join(map(str, fault[0])), fault[1])] if fault else []


class Checker:
    """Compiles the schemas of one document. A compiled check gives None, or (path, why) of the first fault."""

    def __init__(self, root):
        self.root, self.made = root, {}

    def compile(self, schema):
        if isinstance(schema, bool):
            return (lambda value: None) if schema else (lambda value: ([], "is not allowed"))
        if not isinstance(schema, dict):
            raise ValueError(f"a schema is an object or a boolean, not {schema!r:.60}")
        unknown = schema.keys() - RULES.keys() - ANNOTATIONS - {word for words in TOGETHER.values() for word in words}
        if unknown:
            raise ValueError(f"the checker does not know the keyword {sorted(unknown)[0]!r}")
        for inner in schema.get("$defs", {}).values():
            self.compile(inner)
        leaders = {TOGETHER_WITH.get(word, word) for word in schema if word not in ANNOTATIONS}
        try:
            checks = [RULES[word](self, schema) for word in RULES if word in leaders]
        except (KeyError, TypeError, AttributeError, re.error) as fault:
            raise ValueError(f"the schema {shown(schema)} makes no sense: {fault!r}") from None
        return checks[0] if len(checks) == 1 else lambda value: first(check(value) for check in checks)

    def reference(self, schema):
        """`$ref`: resolved at the first use, so that a schema may refer to itself."""
        pointer = schema["$ref"]
        self.resolve(pointer)

        def check(value):
            if pointer not in self.made:
                self.made[pointer] = self.compile(self.resolve(pointer))
            return self.made[pointer](value)

        return check

    def resolve(self, pointer: str):
        if pointer != "#" and not pointer.startswith("#/"):
            raise ValueError(f"only references to places within the document are known, not {pointer!r}")
        found = self.root
        for step in urllib.parse.unquote(pointer[1:]).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(step)] if isinstance(found, list) else found[step]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ValueError(f"{pointer!r} refers to nothing") from None
        return found


def first(results):
    return next((result for result in results if result), None)


def same(a, b) -> bool:
    """Equality as JSON has it: 1 is 1.0, but true is not 1, at any depth."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


TYPES = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: is_number(value) and (isinstance(value, int) or value.is_integer()),
    "number": is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def rule_type(checker, schema):
    names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    tests, wanted = [TYPES[name] for name in names], " or ".join(names)
    if len(tests) == 1:
        return lambda value: None if tests[0](value) else ([], f"must be {wanted}, not {shown(value)}")
    return lambda value: None if any(test(value) for test in tests) else ([], f"must be {wanted}, not {shown(value)}")


def rule_const(checker, schema):
    wanted = schema["const"]
    return lambda value: None if same(value, wanted) else ([], f"must be {shown(wanted)}, not {shown(value)}")


def rule_enum(checker, schema):
    wanted = schema["enum"]
    why = f"must be one of {', '.join(map(shown, wanted))}"
    return lambda value: None if any(same(value, one) for one in wanted) else ([], f"{why}, not {shown(value)}")


def rule_object(checker, schema):
    """properties, required and additionalProperties in one pass over the object."""
    known = {name: checker.compile(inner) for name, inner in schema.get("properties", {}).items()}
    extra, required = schema.get("additionalProperties", True), schema.get("required", ())
    other = checker.compile(extra)

    def check(value):
        if not isinstance(value, dict):
            return None
        for name in required:
            if name not in value:
                return [name], "is missing"
        for name, inner in value.items():
            if name not in known and extra is False:
                return [name], "is not a known field" + (f"; known are {', '.join(known)}" if known else "")
            fault = known.get(name, other)(inner)
            if fault:
                return [name, *fault[0]], fault[1]
        return None

    return check


def rule_items(checker, schema):
    item = checker.compile(schema["items"])

    def check(value):
        for place, inner in enumerate(value if isinstance(value, list) else ()):
            fault = item(inner)
            if fault:
                return [place, *fault[0]], fault[1]
        return None

    return check


def rule_unique(checker, schema):
    def check(value):
        if schema["uniqueItems"] and isinstance(value, list):
            if any(same(a, b) for place, a in enumerate(value) for b in value[:place]):
                return [], "must not hold the same item twice"
        return None

    return check


def rule_pattern(checker, schema):
    """Searched anywhere in the text, as ECMA 262 has it: `$` is the very end, never before a last line break."""
    known = {"$": r"\Z", r"\p{Letter}": r"[^\W\d_]", r"\p{L}": r"[^\W\d_]", r"\p{digit}": r"\d", r"\p{Nd}": r"\d", r"\d": "[0-9]"}
    pieces = r"\\p\{\w+\}|\\.|\[(?:\\.|[^\]\\])*\]|\$"
    found = re.compile(re.sub(pieces, lambda piece: known.get(piece[0], piece[0]), schema["pattern"])).search
    return lambda value: (
        ([], f"must match {schema['pattern'][:80]}, not {shown(value)}") if isinstance(value, str) and not found(value) else None
    )


def rule_bound(word, applies, fits, words):
    """A limit by number: of a size (min/maxLength, min/maxItems) or of the value itself."""

    def rule(checker, schema):
        limit = schema[word]
        return lambda value: ([], f"{words} {limit}") if applies(value) and not fits(value, limit) else None

    return rule


def forms(checker, schemas):
    if not isinstance(schemas, list) or not schemas:
        raise TypeError("a list of schemas is needed")
    return [checker.compile(one) for one in schemas]


def rule_any(checker, schema):
    inner = forms(checker, schema["anyOf"])
    return lambda value: deepest([check(value) for check in inner])


def rule_one(checker, schema):
    inner = forms(checker, schema["oneOf"])

    def check(value):
        results = [check(value) for check in inner]
        return ([], "fits more than one of its forms") if results.count(None) > 1 else deepest(results)

    return check


def deepest(results):
    """None where one form fitted, else the fault of the form that came furthest: the one that was probably meant."""
    return None if None in results else max(results, key=lambda fault: len(fault[0]))


def rule_all(checker, schema):
    inner = forms(checker, schema["allOf"])
    return lambda value: first(check(value) for check in inner)


def rule_not(checker, schema):
    inner = checker.compile(schema["not"])
    return lambda value: None if inner(value) else ([], "has a form that is not allowed")


def shown(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def is_text(value):
    return isinstance(value, str)


def is_list(value):
    return isinstance(value, list)


def is_object(value):
    return isinstance(value, dict)


RULES = {
    "$ref": Checker.reference,
    "type": rule_type,
    "const": rule_const,
    "enum": rule_enum,
    "properties": rule_object,
    "items": rule_items,
    "uniqueItems": rule_unique,
    "pattern": rule_pattern,
    "minLength": rule_bound("minLength", is_text, lambda v, limit: len(v) >= limit, "must not be shorter than"),
    "maxLength": rule_bound("maxLength", is_text, lambda v, limit: len(v) <= limit, "must not be longer than"),
    "minItems": rule_bound("minItems", is_list, lambda v, limit: len(v) >= limit, "must not have fewer items than"),
    "maxItems": rule_bound("maxItems", is_list, lambda v, limit: len(v) <= limit, "must not have more items than"),
    "minProperties": rule_bound("minProperties", is_object, lambda v, limit: len(v) >= limit, "must not have fewer fields than"),
    "maxProperties": rule_bound("maxProperties", is_object, lambda v, limit: len(v) <= limit, "must not have more fields than"),
    "minimum": rule_bound("minimum", is_number, lambda v, limit: v >= limit, "must be at least"),
    "maximum": rule_bound("maximum", is_number, lambda v, limit: v <= limit, "must be at most"),
    "exclusiveMinimum": rule_bound("exclusiveMinimum", is_number, lambda v, limit: v > limit, "must be more than"),
    "exclusiveMaximum": rule_bound("exclusiveMaximum", is_number, lambda v, limit: v < limit, "must be less than"),
    "oneOf": rule_one,
    "anyOf": rule_any,
    "allOf": rule_all,
    "not": rule_not,
}
TOGETHER = {"properties": ("required", "additionalProperties")}
TOGETHER_WITH = {word: leader for leader, words in TOGETHER.items() for word in words}


@dataclasses.dataclass(frozen=True)
class Parameter:
    name: str
    where: str
    required: bool
    type: str | None
    default: object
    check: object


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of the contract, compiled: what a server binds a handler to and a client may rely on."""

    id: str
    method: str
    path: str
    security: dict[str, list[str]]
    parameters: list[Parameter]
    body: object
    body_required: bool
    status: int
    replies: dict[int, object]


@functools.cache
def checker() -> Checker:
    return Checker(contract())


@functools.cache
def schema_check(name: str):
    return checker().compile(contract()["components"]["schemas"][name])


@functools.cache
def operations(tag: str) -> dict[str, Operation]:
    """The contract's operations of one server by operationId; SystemExit with one line where anything in it cannot be checked."""
    try:
        for name in contract()["components"]["schemas"]:
            schema_check(name)
        found = [operation(method.upper(), path, spec) for path, methods in contract()["paths"].items() for method, spec in methods.items()]
        for response in contract()["components"]["responses"].values():
            json_check(response)
        if repeated := [name for name, count in collections.Counter(one.id for one, _ in found).items() if count > 1]:
            raise ValueError(f"the operationId {repeated[0]!r} stands twice")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as fault:
        raise SystemExit(f"liminal: contracts.json cannot be used: {' '.join(str(fault).split())}") from None
    return {one.id: one for one, tags in found if tag in tags}


def operation(method: str, path: str, spec: dict) -> tuple[Operation, list[str]]:
    """(one operation compiled, the servers that have it)."""
    parameters = []
    for given in spec.get("parameters", ()):
        given = checker().resolve(given["$ref"]) if "$ref" in given else given
        schema = checker().resolve(given["schema"]["$ref"]) if "$ref" in given["schema"] else given["schema"]
        rest = given.get("required", False), schema.get("type"), schema.get("default"), checker().compile(schema)
        parameters.append(Parameter(given["name"], given["in"], *rest))
    checks = {code: json_check(reply) for code, reply in spec["responses"].items()}
    replies = {int(code): check for code, check in checks.items() if code.isdigit()}
    made = Operation(
        id=spec["operationId"],
        method=method,
        path=path,
        security={scheme: needed for one in spec["security"] for scheme, needed in one.items()},
        parameters=parameters,
        body=json_check(spec["requestBody"]) if "requestBody" in spec else None,
        body_required=spec.get("requestBody", {}).get("required", False),
        status=min(replies),
        replies=replies,
    )
    return made, spec["tags"]


def json_check(part: dict):
    """The check of a body's JSON form, None where it has none; the schemas of its other forms are compiled as well."""
    part = checker().resolve(part["$ref"]) if "$ref" in part else part
    checks = {kind: checker().compile(form["schema"]) for kind, form in part.get("content", {}).items()}
    return checks.get("application/json")


def check(test, value, what: str) -> None:
    """Raise where something of ours breaks the contract: a defect, loud on purpose."""
    fault = test(value)
    if fault:
        raise Problem("internal", f"{what} breaks the contract: {'.'.join(map(str, fault[0])) or 'it'} {fault[1]}")


def check_event(event: dict) -> None:
    name = {"tool_call": "ToolCall", "tool_result": "ToolResult"}.get(event.get("type"), str(event.get("type")).capitalize())
    if name + "Event" not in contract()["components"]["schemas"]:
        raise Problem("internal", f"an event breaks the contract: there is no type {event.get('type')!r}")
    check(schema_check(name + "Event"), event, f"the event {event['type']}")


################ Positions
# What a reply holds is counted in Unicode code points and tool events, never in tokens or bytes: so any two parties agree
# on a place in it however it was cut into bundles. Three functions are the whole arithmetic.

PARTS = ("text", "thinking", "tool_call", "tool_result")


def size(event: dict) -> int:
    """How far an event moves the position."""
    kind = event["type"]
    return len(event["text"]) if kind in ("text", "thinking") else 1 if kind in PARTS else 0


def joined(events: list[dict]) -> list[dict]:
    """The same content in as few events as there are parts: neighbours of one type become one text."""
    made, texts = [], []
    for event in events:
        kind = event["type"]
        if texts and made[-1]["type"] == kind:
            texts.append(event["text"])
            continue
        if len(texts) > 1:
            made[-1] = {"type": made[-1]["type"], "text": "".join(texts)}
        texts = [event["text"]] if kind in ("text", "thinking") else []
        made.append(event)
    if len(texts) > 1:
        made[-1] = {"type": made[-1]["type"], "text": "".join(texts)}
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
        self.event, self.data, self.id = "", [], ""

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
            self.event, self.data = "", []
        return found

    def field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            self.data.append(text)
        elif name == b"event":
            self.event = text
        elif name == b"id" and "\0" not in text:
            self.id = text


################ Serving
# What both servers share: handlers bound by operationId, every request and JSON reply checked, one error shape, metrics.
# aiohttp is imported inside: the CLI never pays for it.

GRACE = 10  # seconds from SIGTERM to the end of a server


class Metrics:
    """Counters and histograms in Prometheus' text format. `declared`: name -> (help, bucket limits or None for a counter)."""

    def __init__(self, declared: dict[str, tuple[str, tuple | None]]):
        self.declared, self.counters, self.histograms, self.gauges = declared, {}, {}, {}
        for name, (_, limits) in declared.items():
            if limits:
                self.histograms[name] = [0] * (len(limits) + 1) + [0.0]  # a count per bucket, and the sum

    def count(self, name: str, n: float = 1, **labels: str) -> None:
        key = name, tuple(sorted(labels.items()))
        self.counters[key] = self.counters.get(key, 0) + n

    def observe(self, name: str, value: float) -> None:
        counts = self.histograms[name]
        limits = self.declared[name][1]
        counts[next((place for place, limit in enumerate(limits) if value <= limit), len(limits))] += 1
        counts[-1] += value

    def value(self, name: str, **labels: str) -> float:
        return self.counters.get((name, tuple(sorted(labels.items()))), 0)

    def by_label(self, name: str, label: str, **labels: str) -> dict[str, int]:
        """A counter's values by one label, where the others are as given."""
        found = {dict(key)[label]: int(n) for (counter, key), n in self.counters.items() if counter == name and labels.items() <= dict(key).items()}
        return found

    def quantiles(self, name: str, scale: float = 1) -> dict[str, float | None]:
        """{p50, p95, p99} as the upper limits of the buckets that hold them; None where nothing was observed."""
        found = {f"p{int(q * 100)}": self.quantile(name, q) for q in (0.5, 0.95, 0.99)}
        return {q: value and round(value * scale, 3) for q, value in found.items()}

    def quantile(self, name: str, q: float) -> float | None:
        """The upper limit of the bucket that holds this quantile; None where nothing was observed."""
        *counts, _ = self.histograms[name]
        seen, limits = 0, (*self.declared[name][1], float("inf"))
        for limit, count in zip(limits, counts):
            seen += count
            if seen and seen >= q * sum(counts):
                return limit if limit != float("inf") else self.declared[name][1][-1]
        return None

    def text(self) -> str:
        lines = []
        for name, (meaning, limits) in self.declared.items():
            kind = "histogram" if limits else "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            if limits:
                *counts, total = self.histograms[name]
                for place, limit in enumerate((*limits, "+Inf")):
                    lines.append(f'{name}_bucket{{le="{limit}"}} {sum(counts[: place + 1])}')
                lines += [f"{name}_sum {total}", f"{name}_count {sum(counts)}"]
            elif name in self.gauges:
                lines.append(f"{name} {self.gauges[name]()}")
            else:
                found = {labels: n for (counter, labels), n in self.counters.items() if counter == name} or {(): 0}
                for labels, n in found.items():
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
    `authenticate(call)` raises or fills in the caller. SystemExit where contract and handlers differ, in either direction."""
    from aiohttp import web

    known = operations(tag)
    if known.keys() != handlers.keys():
        missing, extra = sorted(known.keys() - handlers.keys()), sorted(handlers.keys() - known.keys())
        raise SystemExit(f"liminal: contract and {tag} differ: without a handler {missing}, without an operation {extra}")
    names = own_names(settings)

    @web.middleware
    async def answer_problems(request, handler):
        request["id"], headers = None, {}
        try:
            refuse_strangers(request, names)
            return await handler(request)
        except Problem as problem:
            fault = problem
        except web.HTTPException as error:
            codes = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
            fault = Problem(codes.get(error.status, "invalid_request"), http_words(error.status, request))
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            fault = Problem("internal", "an error of our own; the server's log tells more")
        metrics.count("liminal_errors_total", code=fault.code)
        if fault.code == "internal":
            log.error("%s %s: %s", request.method, request.path, fault.message)
        body = {"error": fault.detail(request["id"] or str(uuid.uuid4()))}
        return web.json_response(text=encode_json(body), status=fault.status, headers=headers)

    app = web.Application(client_max_size=contract()["x-limits"]["body_bytes"], middlewares=[answer_problems])
    for name, handler in handlers.items():
        app.router.add_route(known[name].method, known[name].path, bound(known[name], handler, authenticate))
    return app


def bound(operation: Operation, handler, authenticate):
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
    source = {"path": request.match_info, "query": request.query, "header": request.headers}[given.where]
    if given.name not in source:
        if given.required:
            raise Problem("invalid_request", f"{given.name} is missing", field=given.name)
        return given.default
    text = source[given.name]
    try:
        value = bounded(text) if given.type == "integer" and re.fullmatch(r"-?[0-9]+", text) else text
    except ValueError:
        value = text
    fault = given.check(value)
    if fault:
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
    fault = operation.body(body)
    if fault:
        field = ".".join(map(str, fault[0]))
        raise Problem("invalid_request", f"{field or 'the body'} {fault[1]}", field=field)
    return body


def own_names(settings: Settings) -> set[str]:
    urls = (settings.url, settings.domain_url)
    return {"localhost", "127.0.0.1", "::1", settings.host, *(urllib.parse.urlsplit(url).hostname or "" for url in urls)}


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


def http_words(status: int, request) -> str:
    limit = contract()["x-limits"]["body_bytes"]
    words = {413: f"the body is larger than the limit of {limit} bytes", 405: f"{request.path} does not take {request.method}"}
    return words.get(status, f"there is no {request.method} {request.path}; see /contracts.json")


def lock(settings: Settings, name: str) -> int:
    """Hold this server's part of the data folder for as long as the process lives; SystemExit where another holds it."""
    settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = os.open(settings.data / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"liminal: process {os.read(held, 20).decode()} already is the {name} of {settings.data}") from None
    os.truncate(held, 0)
    os.write(held, str(os.getpid()).encode())
    return held


def serve(name: str, make_app) -> None:
    """Run one server in the foreground until SIGTERM or SIGINT. `make_app(settings)` is awaited for the application."""
    import asyncio

    os.umask(0o077)
    settings = Settings.load()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    try:
        held = lock(settings, name)
    except OSError as error:
        raise SystemExit(f"liminal: the data folder {settings.data} cannot be used: {error.strerror}") from None
    asyncio.run(listen(name, getattr(settings, f"{name}_port"), settings, make_app))
    os.close(held)


def answer_no_http(protocol, request, status=500, exc=None, message=None):
    """In place of aiohttp's plain text: what its parser refuses (no HTTP, or headers over the limit) in the one error shape."""
    from aiohttp import web

    if request.writer.output_size > 0:
        raise ConnectionError("the answer has begun already")
    if status >= 500:
        log.error("a request failed before its handler", exc_info=exc)
    code = "internal" if status >= 500 else "invalid_request"
    words = f"this is no request that can be taken: {' '.join(str(message or exc).split())[:200]}"
    body = encode_json({"error": Problem(code, words).detail(str(uuid.uuid4()))})
    answer = web.json_response(text=body, status=status)
    answer.force_close()
    return answer


async def listen(name: str, port: int, settings: Settings, make_app) -> None:
    import asyncio

    from aiohttp import web

    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    web.RequestHandler.handle_error = answer_no_http
    limit = contract()["x-limits"]["header_bytes"]
    limits = {"max_field_size": limit, "max_line_size": limit}
    runner = web.AppRunner(await make_app(settings), access_log=None, shutdown_timeout=GRACE / 2, **limits)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, settings.host, port, backlog=2048).start()
        except OSError as error:
            hint = f"set LIMINAL_{name.upper()}_PORT or LIMINAL_HOST"
            raise SystemExit(f"liminal: the {name} cannot listen on {settings.host}:{port} ({error.strerror}); {hint}") from None
        print(f"liminal {name} ready on http://{listen_host(settings.host)}:{port}", flush=True)
        await stopped.wait()
    finally:
        loop.call_later(GRACE, os._exit, 1)  # whatever still hangs by then is given up: what is acknowledged is on disk
        await runner.cleanup()


################ Databases
# One writing connection a database, in a thread of its own, and one that only reads: never the event loop.
# Whatever has queued up while the disk was busy is committed together: one fdatasync (WAL, synchronous=FULL) for many.


class Database:
    """One SQLite file. `await db.write(fn, *args)` runs fn(connection, *args) in a transaction and returns when it is on
    disk; `await db.read(fn, *args)` sees the last commit. Problem `storage_full` or `internal` where the disk refuses."""

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
            for (_, _, *to), (result, error) in zip(jobs, self.commit(jobs)):
                answer(*to, result, error)
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
    """"ok", or the first thing that SQLite finds wrong; over a connection that only reads."""
    import sqlite3

    try:
        with contextlib.closing(sqlite3.connect(f"file:{urllib.parse.quote(str(path))}?mode=ro", uri=True)) as db:
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


class Client:
    """The Edge's API as the commands use it. Problem where it refuses, Unreachable where nobody answers."""

    def __init__(self, settings: Settings, timeout: float = SILENCE):
        self.settings, self.base, self.timeout = settings, urllib.parse.urlsplit(settings.url), timeout
        self.connection = self.sent = None

    @functools.cached_property
    def key(self) -> str:
        path = self.settings.data / "cli.key"
        try:
            key = self.settings.api_key or path.read_text().strip()
        except (OSError, UnicodeError) as error:
            raise Problem("unauthorized", f"no key: LIMINAL_API_KEY is not set and {path} cannot be read: {error}") from None
        if not re.fullmatch(r"[!-~]+", key):
            raise Problem("unauthorized", f"that is no key: look at LIMINAL_API_KEY, or at {path}")
        return key

    def send(self, method: str, path: str, body=None, headers: dict | None = None):
        """One request on the kept connection; a connection that went stale in between is opened anew, once, for a GET."""
        import http.client

        headers = {"Content-Type": "application/json", **(headers or {})}
        if path.startswith("/api/"):
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else encode_json(body).encode()
        for attempt in (1, 2):
            fresh = self.connection is None
            if fresh:
                kind = http.client.HTTPSConnection if self.base.scheme == "https" else http.client.HTTPConnection
                self.connection = kind(self.base.hostname, self.base.port, timeout=self.timeout)
            try:
                self.connection.request(method, self.base.path + path, data, headers)
                return self.connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if fresh or "Idempotency-Key" not in headers and method != "GET":
                    raise Lost(str(error) or type(error).__name__) from None

    def receive(self, read, *args) -> bytes:
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
            raise Unreachable(f"{self.settings.url} does not answer ({error}): `liminal up` starts it") from None
        if response.status >= 400:
            raise refused(response.status, data)
        try:
            return json.loads(data) if data else None
        except ValueError:
            raise refused(response.status, data) from None

    def stream(self, method: str, path: str, body=None, position: int | None = None):
        """The events of one reply to its `done`, over a connection of its own, and another where that one breaks; a note on
        standard error says so."""
        wire = Client(self.settings)
        headers, message_id, lost_at = {"Idempotency-Key": str(uuid.uuid4())}, None, None
        headers |= {"Last-Event-ID": str(position)} if position else {}
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
                method, path, body = "GET", f"/api/v1/messages/{message_id}/stream", None
                headers = {} if position is None else {"Last-Event-ID": str(position)}

    def find_sent(self) -> str:
        """The message id of the reply that `stream` asked for last: the same Idempotency-Key attaches to the same reply."""
        for event, _ in Client(self.settings, timeout=5).read_stream(*self.sent):
            return event["message_id"]
        raise Unreachable(f"{self.settings.url} gave no reply to stop")

    def read_stream(self, method: str, path: str, body, headers: dict):
        response = self.send(method, path, body, {**headers, "Accept": "text/event-stream"})
        if response.status >= 400:
            raise refused(response.status, self.receive(response.read))
        decoder = Decoder()
        while data := self.receive(response.read1, 65536):
            for _, text, place in decoder.feed(data):
                yield json.loads(text), place

    def wait_for_server(self, lost_at: float | None) -> None:
        if lost_at is None:
            note("the connection was lost; the reply goes on, reconnecting ...")
        elif time.monotonic() - lost_at > PATIENCE:
            raise Unreachable(f"{self.settings.url} does not answer; nothing is lost: `liminal chat -c` attaches again")
        else:
            time.sleep(min(2, 0.1 + (time.monotonic() - lost_at) / 4))


def refused(status: int, data: bytes) -> Exception:
    try:
        error = json.loads(data)["error"]
        return Problem(error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        return Unreachable(f"what answers there is not Liminal (status {status}); see LIMINAL_URL and LIMINAL_EDGE_PORT")


################ Starting and stopping the servers
# Each in its own session, so that a closed terminal never reaches them; the lock tells who runs, even after a kill -9.


def holder(settings: Settings, name: str) -> int | None:
    """The process that holds a server's lock, None where it does not run."""
    try:
        with open(settings.data / f"{name}.lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                return int(file.read() or 0) or None
    except OSError:
        return None


def start_servers(settings: Settings) -> None:
    """Start what does not run, and wait until both are well; Unreachable with the log's last line where one is not."""
    settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("domain", "edge"):
        if not holder(settings, name):
            path = settings.data / f"{name}.log"
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as out:
                command = [sys.executable, str(HERE / f"liminal_{name}.py")]
                quiet = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "cwd": HERE, "start_new_session": True}
                process = subprocess.Popen(command, **quiet)
            wait_until_well(settings, name, process, path)


def wait_until_well(settings: Settings, name: str, process, path: pathlib.Path) -> None:
    port = settings.domain_port if name == "domain" else settings.edge_port
    probe = Client(dataclasses.replace(settings, url=f"http://{listen_host(settings.host)}:{port}"), timeout=1)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(Unreachable, Problem, KeyError, TypeError):
            if probe.ask("GET", "/health")["instance"] == settings.instance:
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
            raise Problem("internal", f"process {pid}, the {name}, does not stop: `kill -9 {pid}` loses nothing acknowledged")
        time.sleep(0.02)
    return True


def connect(settings: Settings) -> Client:
    """A client of running servers: they are started where nothing answers at the default address. Says so when they are
    older than the files, or belong to another data folder."""
    client = Client(settings)
    try:
        health = client.ask("GET", "/health")
    except Unreachable:
        if "LIMINAL_URL" in settings.values:
            raise
        note("starting Liminal ...")
        start_servers(settings)
        health = client.ask("GET", "/health")
    if not isinstance(health, dict) or "instance" not in health:
        raise Unreachable(f"what answers at {settings.url} is not Liminal: set LIMINAL_EDGE_PORT to a free port")
    if "LIMINAL_URL" in settings.values:
        return client
    if health["instance"] != settings.instance:
        note(f"the servers at {settings.url} belong to another data folder than {settings.data}: set LIMINAL_EDGE_PORT")
    elif health["version"] != version():
        note("the running servers are older than the files: `liminal down` and `liminal up` renew them")
    elif health["domain"] != "ok":
        start_servers(settings)
    return client


################ Showing
# The reply goes to standard output and nothing else does; every note goes to standard error. On a terminal nothing that a
# model says can be a control sequence, and bundles are smoothed to a steady hand.

STEP, SPREAD = 0.015, 0.12  # seconds between two strokes of the typewriter; within which a bundle is written
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text that a terminal cannot take for a command: control characters, C1 and bidi overrides are made visible."""
    return UNSAFE.sub(lambda found: f"\\x{ord(found[0]):02x}" if found[0] < "\u0100" else f"\\u{ord(found[0]):04x}", text)


def coloured(file) -> bool:
    return file.isatty() and not Settings.environment("NO_COLOR")


def note(text: str) -> None:
    text = printable(text)
    print(f"\x1b[2m{text}\x1b[0m" if coloured(sys.stderr) else text, file=sys.stderr, flush=True)


def say(text: str, end: str = "\n") -> None:
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def smooth(events):
    """The events, with each text cut into strokes so that it appears steadily, never more than SPREAD behind the stream."""
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


def show(client: Client, events, as_json: bool = False) -> dict:
    """Print a reply as it comes; returns its `done`. Ctrl-C cancels it, on the server too, and shows the receipt."""
    terminal, message_id, column, calls = sys.stdout.isatty() and not as_json, None, "", {}
    try:
        for event in smooth(events) if terminal else events:
            message_id = event["message_id"] if event["type"] == "start" else message_id
            if as_json:
                say(encode_json(event))
                if event["type"] == "done":
                    return event
            elif event["type"] == "text":
                say(event["text"], end="")
                column = event["text"][-1]
            elif event["type"] == "tool_call":
                calls[event["tool_call_id"]] = event, time.monotonic()
            elif event["type"] == "tool_result":
                if column not in ("", "\n"):
                    say("")
                    column = "\n"
                note(call_words(*calls.get(event["tool_call_id"], (event, time.monotonic())), event))
            elif event["type"] == "done":
                if column not in ("", "\n"):
                    say("")
                if event["error"]:
                    fail(f"{event['error']['message']} ({event['error']['code']})", 1)
                elif event["status"] == "cancelled":
                    note("this reply was cancelled")
                elif event["stop_reason"] == "max_tokens":
                    note("cut off at the limit of tokens (max_tokens)")
                return event
    except KeyboardInterrupt:
        if column not in ("", "\n"):
            say("")
        message_id = message_id or client.find_sent()
        receipt = client.ask("POST", f"/api/v1/messages/{message_id}/cancel")
        note(receipt_words(receipt))
        return {"type": "done", **receipt, "error": None}
    raise Unreachable("the stream ended without an end")


class Measure:
    """Watches the events of one reply: when they came, how large they were, where they were thin."""

    def __init__(self):
        self.asked, self.first, self.last, self.gap = time.monotonic(), None, None, 0.0
        self.texts, self.done, self.thread_id, self.message_id, self.position, self.faults = [], None, None, None, 0, []

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
        timing = (self.done or {}).get("timing") or {}
        hops = {f"ttft_{hop}_ms": timing.get(f"{hop}_ttft_ms") for hop in ("edge", "domain", "provider")}
        sizes = [len(text) for text in self.texts]
        bundles = {"bundles": len(sizes), "characters_per_bundle": round(sum(sizes) / len(sizes), 1) if sizes else None}
        rates = {"tokens_per_s": self.rate(), **bundles, "longest_gap_ms": round(self.gap * 1000, 1)}
        return {**({"ttft_client_ms": self.ttft_ms(), **hops} if ttft else {}), **(rates if rate else {})}


def table(rows: list[tuple]) -> None:
    """Rows in columns; the last one takes what it needs."""
    widths = [max(len(str(row[place])) for row in rows) for place in range(len(rows[0]))] if rows else []
    for row in rows:
        say("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())


def call_words(call: dict, began: float, result: dict) -> str:
    """A line for one tool call: name, short arguments, duration, size of the result, and what went wrong."""
    arguments = encode_json(call.get("arguments", {}))
    short = arguments if len(arguments) <= 80 else arguments[:77] + "..."
    words = f"· {call['name']} {short} · {time.monotonic() - began:.1f} s · {len(result['text'])} characters"
    return words + (f" · failed: {result['text'][:300]}" if result["is_error"] else "")


def receipt_words(receipt: dict) -> str:
    kept = f"{receipt['position']} characters kept" if receipt["position"] else "nothing had come"
    return f"{'stopped' if receipt['status'] == 'cancelled' else receipt['status']}: {kept}, message {receipt['message_id'][:8]}"


def usage_words(usage: dict | None) -> str:
    if not usage:
        return "no usage"
    about = "about " if usage["estimated"] else ""
    cost = "" if usage["cost"] is None else f", ${usage['cost']:.4f}"
    return f"{about}{usage['input_tokens']} tokens in ({usage['cached_tokens']} cached), {usage['output_tokens']} out{cost}"


################ Commands
# One table, one short function each. `@command` adds a row: name, what it does, an example, its arguments.

COMMANDS = {}


def command(name: str, meaning: str, example: str, *arguments):
    def add(fn):
        COMMANDS[name] = (fn, meaning, example, arguments)
        return fn

    return add


def arg(*names, **options):
    return names, options


@command(
    "chat",
    "send a message and read the reply; without one, talk on",
    'liminal chat "why is the sky blue?"',
    arg("message", nargs="*", help="the message; standard input, where it is piped, comes before it"),
    arg("-m", "--model", help="provider/model (see `liminal models`)"),
    arg("-s", "--system", help="the system text of a new thread, or of this one reply"),
    arg("-c", "--continue", dest="again", action="store_true", help="go on with the newest thread"),
    arg("-t", "--thread", help="go on with this thread (an id, or 4 or more of its first characters)"),
    arg("-f", "--file", action="append", help="put a text file into the message, with its name (repeatable)"),
    arg("-o", "--option", nargs=2, action="append", metavar=("KEY", "VALUE"), help="pass an option to the provider (repeatable)"),
    arg("-u", "--usage", action="store_true", help="show usage, cost, time to first token and rate on standard error"),
    arg("--no-stream", action="store_true", help="print the reply when it is whole"),
    arg("--background", action="store_true", help="print the reply's id and leave; `liminal attach` shows it"),
    arg("--tools", action=argparse.BooleanOptionalAction, default=True, help="offer tools to the model (see `liminal tools`)"),
    arg("-T", dest="patterns", action="append", metavar="PATTERN", help="offer only tools that match, as in 'git__*' (repeatable)"),
    arg("--allow", action="append", metavar="PATTERN", help="allow these tools for this run (repeatable)"),
    arg("--json", action="store_true", help="the reply's events as JSON lines"),
    arg("--measure-ttft", action="store_true", help="show the time to the first token, by hop"),
    arg("--measure-token-rate", action="store_true", help="show token rate, bundles and gaps"),
)
def chat(settings: Settings, options) -> int:
    content = "\n\n".join(part for part in (piped().strip("\n"), *map(read_file, options.file or ()), " ".join(options.message)) if part)
    if not content.isprintable() and content != content.encode("utf-8", "replace").decode():
        raise Problem("invalid_request", "the message is not valid UTF-8")
    if not content.strip() and not sys.stdin.isatty():
        raise Problem("invalid_request", "there is nothing to send: give a message or pipe one in")
    client = connect(settings)
    tell_unseen_keys(client)
    thread_id = options.thread and client.ask("GET", f"/api/v1/threads/{quote(options.thread)}")["id"]
    if options.again and not thread_id:
        threads = client.ask("GET", "/api/v1/threads?limit=1")["threads"]
        thread_id = threads[0]["id"] if threads else None
        if threads and not content:
            show_last_turn(client, thread_id)
    fields = {"model": find_model(client, options.model), "system": options.system, "thread_id": thread_id}
    fields |= {"tools": options.patterns if options.tools else False, "allow": options.allow}
    fields["options"] = {key: option_value(value) for key, value in options.option} if options.option else None
    fields = {name: value for name, value in fields.items() if value is not None}
    if not content:
        return talk(client, fields, options)
    if options.background or options.no_stream:
        return send_quietly(client, {"content": content, **fields}, options)
    return exit_code(send(client, content, fields, options)[0])


def read_file(name: str) -> str:
    try:
        return f"File {name}:\n\n```\n{pathlib.Path(name).read_text().rstrip()}\n```"
    except (OSError, UnicodeError) as error:
        raise Problem("invalid_request", f"{name} cannot be sent as text: {getattr(error, 'strerror', None) or error}") from None


def option_value(text: str):
    """JSON where it is, else the text itself: `-o seed 7` is a number, `-o user ada` a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def find_model(client: Client, name: str | None) -> str | None:
    """The model that a part of its name means, as in `-m haiku`; what names a provider is left as it is."""
    if not name or "/" in name:
        return name
    found = [one["id"] for one in client.ask("GET", "/api/v1/models")["models"] if name in one["id"] and one["available"]]
    exact = [one for one in found if name in one.split("/", 1)] or found
    if len(exact) != 1 and not any(one.startswith(f"{name}/") for one in found):
        words = f"{name!r} could be {', '.join(found[:8])}: give more of it" if found else f"no usable model has {name!r} in its name"
        raise Problem("unknown_model", f"{words} (`liminal models`)")
    return exact[0] if len(exact) == 1 else name


def send_quietly(client: Client, body: dict, options) -> int:
    """Without a stream: the id of a reply in the background, or a whole reply at once."""
    path, headers = "/api/v1/messages", {"Idempotency-Key": str(uuid.uuid4())}
    if options.background:
        accepted = client.ask("POST", path, {**body, "background": True}, headers)
        say(encode_json(accepted) if options.json else accepted["message_ids"][0])
        return 0
    message = client.ask("POST", path, {**body, "stream": False}, headers)
    if options.json:
        say(encode_json(message))
    else:
        say(message["content"], end="" if message["content"].endswith("\n") else "\n")
    if options.usage:
        note(usage_words(message["usage"]))
    return fail(f"{message['error']['message']} ({message['error']['code']})", 1) if message["error"] else 0


def exit_code(done: dict) -> int:
    return 130 if done["status"] == "cancelled" else 1 if done["error"] else 0


def send(client: Client, content: str, fields: dict, options) -> tuple[dict, str | None]:
    """Send a message and show its reply: (its `done`, the thread's id). A reply that still runs there is shown first."""
    thread_id = fields.get("thread_id")
    if thread_id:
        attach_running(client, thread_id)
    seen = Measure()
    body = {name: value for name, value in fields.items() if name != "message_id"}
    events = seen.watch(client.stream("POST", "/api/v1/messages", {"content": content, **body}))
    done = show(client, events, options.json)
    if options.measure_ttft or options.measure_token_rate:
        figures = seen.figures(options.measure_ttft, options.measure_token_rate)
        if options.json:
            say(encode_json({"type": "measure", **figures}))
        else:
            note("\n".join(f"{name.replace('_', ' '):<24} {value}" for name, value in figures.items()))
    if options.usage and not options.json:
        note(f"{usage_words(done['usage'])}, first token after {seen.ttft_ms()} ms, {seen.rate()} tokens/s")
    fields.update(message_id=seen.message_id)
    return done, seen.thread_id or thread_id


def attach_running(client: Client, thread_id: str) -> None:
    for run in client.ask("GET", "/api/v1/runs")["runs"]:
        if run["thread_id"] == thread_id:
            note("a reply is still being generated in this thread; here it is")
            show(client, client.stream("GET", f"/api/v1/messages/{run['message_id']}/stream"))


def show_last_turn(client: Client, thread_id: str) -> None:
    messages = all_messages(client, thread_id)
    asked = [message for message in messages if message["role"] == "user"][-1:]
    replies = [message for message in messages if asked and message["parent_id"] == asked[0]["id"]]
    for message in asked + replies:
        note(headline(message))
        if message["status"] in ("pending", "streaming"):
            show(client, client.stream("GET", f"/api/v1/messages/{message['id']}/stream"))
        else:
            say(message["content"].rstrip("\n"))


def talk(client: Client, fields: dict, options) -> int:
    """The interactive chat: one message after another in one thread, until the end of input. `fields` go with each message;
    `message_id` in them is the last reply."""
    remember = keep_history(client.settings)
    note("Ctrl-C stops a reply, Ctrl-D leaves, /help shows more")
    while True:
        try:
            content = read_message()
        except (EOFError, KeyboardInterrupt):
            say("")
            remember()
            return 0
        try:
            word, _, rest = content.strip().partition(" ")
            if word == "/quit":
                remember()
                return 0
            if word in SLASH:
                SLASH[word][0](client, fields, rest.strip(), options)
            elif re.fullmatch("/[a-z]+", word):
                note(f"there is no {word}: /help shows what there is")
            elif content.strip():
                _, fields["thread_id"] = send(client, content, fields, options)
        except KeyboardInterrupt:
            client.close()
        except Problem as problem:
            fail(f"{problem.message} ({problem.code})", 1)
        except Unreachable as problem:
            fail(str(problem), 3)


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
    block = [input("> ")]
    while block[-1].endswith("\\") or select.select([sys.stdin], [], [], 0.03)[0]:
        continued = block[-1].endswith("\\")
        block[-1] = block[-1].removesuffix("\\")
        block.append(input("… " if continued else ""))
    return "\n".join(block)


def slash_help(client: Client, fields: dict, rest: str, options) -> None:
    table([(word, meaning) for word, (_, meaning) in SLASH.items()] + [("/quit", "leave, as Ctrl-D does")])


def slash_model(client: Client, fields: dict, rest: str, options) -> None:
    if rest:
        fields["model"] = find_model(client, rest)
    note(f"model: {fields.get('model') or 'the default'}")


def slash_system(client: Client, fields: dict, rest: str, options) -> None:
    fields["system"] = rest
    note("the system text is set for what follows" if rest else "no system text for what follows")


def slash_retry(client: Client, fields: dict, rest: str, options) -> None:
    body = {"model": find_model(client, rest)} if rest else {}
    seen = Measure()
    show(client, seen.watch(client.stream("POST", f"/api/v1/messages/{last_reply(fields)}/retry", body)), options.json)
    fields["message_id"] = seen.message_id


def slash_fork(client: Client, fields: dict, rest: str, options) -> None:
    path = f"/api/v1/threads/{fields.get('thread_id')}/fork"
    thread = client.ask("POST", path, {"message_id": last_reply(fields)})
    fields["thread_id"] = thread["id"]
    fields.pop("message_id")
    note(f"going on in a copy of this thread, {thread['id'][:8]}")


def slash_react(client: Client, fields: dict, rest: str, options) -> None:
    found = client.ask("POST", f"/api/v1/messages/{last_reply(fields)}/reactions", {"emoji": rest})
    note(reaction_words(found))


def slash_tools(client: Client, fields: dict, rest: str, options) -> None:
    choices = {"": fields.get("tools"), "on": None, "off": False}
    fields["tools"] = choices[rest] if rest in choices else rest.split()
    if fields["tools"] is None:
        del fields["tools"]
    note(f"tools: {'off' if fields.get('tools') is False else ' '.join(fields.get('tools') or ['all'])}")


def last_reply(fields: dict) -> str:
    if not fields.get("message_id"):
        raise Problem("invalid_request", "there is no reply yet in this chat")
    return fields["message_id"]


SLASH = {
    "/help": (slash_help, "show this"),
    "/model": (slash_model, "show or change the model: /model haiku"),
    "/system": (slash_system, "change the system text: /system Answer in French."),
    "/retry": (slash_retry, "another reply to the same message, with another model if named"),
    "/fork": (slash_fork, "go on in a copy of this thread"),
    "/react": (slash_react, "react to the last reply: /react 👍"),
    "/tools": (slash_tools, "offer tools: /tools on, /tools off, /tools git__*"),
}


def tell_unseen_keys(client: Client) -> None:
    """A key that stands in this terminal's environment is no use to servers that were started without it."""
    for provider in client.ask("GET", "/api/v1/providers")["providers"]:
        name = provider["key_env"]
        if name and Settings.environment(name) and not provider["key_set"]:
            mend = f"`liminal down` and `liminal up`, or `liminal providers key {provider['name']}`"
            note(f"{name} is set here, but the running servers do not have it: {mend}")


def quote(text: str) -> str:
    return urllib.parse.quote(text, safe="")


def all_messages(client: Client, thread_id: str) -> list[dict]:
    found, after = [], 0
    while True:
        page = client.ask("GET", f"/api/v1/threads/{quote(thread_id)}/messages?limit=1000&after={after}")["messages"]
        found += page
        if len(page) < 1000:
            return found
        after = page[-1]["number"]


def headline(message: dict, place: str = "") -> str:
    who = "you" if message["role"] == "user" else message["model"]
    state = "" if message["status"] == "complete" else f" · {message['status']}"
    reactions = "".join(f" {one['emoji']}{one['count'] if one['count'] > 1 else ''}" for one in message["reactions"])
    return f"── {who} · {local_time(message['created_at'])} · {message['id'][:8]}{place}{state}{reactions}"


def places(messages: list[dict]) -> list[str]:
    """What tells where a message hangs, where that is not plainly behind the one before: branches and retries."""
    words, before = [], None
    for message in messages:
        beside = [one["id"] for one in messages if (one["parent_id"], one["role"]) == (message["parent_id"], message["role"])]
        word = f" · {'reply' if message['role'] == 'assistant' else 'branch'} {beside.index(message['id']) + 1} of {len(beside)}"
        words.append((word if len(beside) > 1 else "") + (f" to {message['parent_id'][:8]}" if message["parent_id"] not in (None, before) else ""))
        before = message["id"]
    return words


def local_time(text: str) -> str:
    import calendar

    seconds = calendar.timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S"))
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


THREAD = arg("thread", nargs="?", help="an id or its first characters; without one, the newest thread")


@command("threads", "list your threads, newest first", "liminal threads", arg("-n", type=int, default=20, help="how many"))
def threads(settings: Settings, options) -> int:
    found = connect(settings).ask("GET", f"/api/v1/threads?limit={options.n}")["threads"]
    table([(thread["id"][:8], local_time(thread["updated_at"]), thread["title"] or "(untitled)") for thread in found])
    return 0


@command(
    "show",
    "print a thread, with its usage and cost at the end",
    "liminal show 3f2a",
    THREAD,
)
def show_thread(settings: Settings, options) -> int:
    client = connect(settings)
    thread = find_thread(client, options.thread)
    say(f"# {thread['title'] or '(untitled)'}  ({thread['id'][:8]})")
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
    return 0


def find_thread(client: Client, ref: str | None) -> dict:
    if ref:
        return client.ask("GET", f"/api/v1/threads/{quote(ref)}")
    newest = client.ask("GET", "/api/v1/threads?limit=1")["threads"]
    if not newest:
        raise Problem("not_found", 'there is no thread yet: `liminal chat "hello"` begins one')
    return newest[0]


@command("search", "find messages that hold all the words", "liminal search blue sky", arg("words", nargs="+"))
def search(settings: Settings, options) -> int:
    found = connect(settings).ask("GET", f"/api/v1/search?q={quote(' '.join(options.words))}")["results"]
    marks = ("\x1b[1m", "\x1b[0m") if coloured(sys.stdout) else ("", "")
    for one in found:
        say(f"{one['thread_id'][:8]} {one['message_id'][:8]} {local_time(one['created_at'])} {one['role']}")
        for piece in re.split("([\x02\x03])", " ".join(one["snippet"].split(" "))):
            print(marks[0] if piece == "\x02" else marks[1] if piece == "\x03" else printable(piece), end="")
        say("\n")
    return 0 if found else fail("nothing found", 1)


@command(
    "fork",
    "go on from a message in a copy of its thread",
    "liminal fork 7be1",
    arg("message", nargs="?", help="the last message of the copy; without one, the newest reply"),
)
def fork(settings: Settings, options) -> int:
    client = connect(settings)
    message = find_reply(client, options.message)
    thread = client.ask("POST", f"/api/v1/threads/{message['thread_id']}/fork", {"message_id": message["id"]})
    say(thread["id"])
    note(f'go on with: liminal chat -t {thread["id"][:8]} "..."')
    return 0


@command("rename", "give a thread another title", 'liminal rename 3f2a "blue skies"', arg("thread"), arg("title"))
def rename(settings: Settings, options) -> int:
    thread = connect(settings).ask("PATCH", f"/api/v1/threads/{quote(options.thread)}", {"title": options.title})
    say(f"{thread['id'][:8]}  {thread['title']}")
    return 0


@command("delete", "delete a thread and its messages", "liminal delete 3f2a", arg("thread"), arg("-y", "--yes", action="store_true", help="do not ask"))
def delete(settings: Settings, options) -> int:
    client = connect(settings)
    thread = find_thread(client, options.thread)
    if not options.yes:
        confirm(f"delete {thread['title'] or '(untitled)'!r} ({thread['id'][:8]}) with all its messages?")
    client.ask("DELETE", f"/api/v1/threads/{thread['id']}")
    say("deleted")
    return 0


def confirm(question: str) -> None:
    """Ask on a terminal; Problem where the answer is not yes, or nobody can be asked."""
    if not sys.stdin.isatty() or input(f"{printable(question)} [y/N] ").strip().lower() not in ("y", "yes"):
        raise Problem("invalid_request", "nothing was done (-y does not ask)")


@command(
    "export",
    "print a thread as Markdown, or as JSON lines",
    "liminal export 3f2a --format jsonl",
    THREAD,
    arg("--format", choices=["md", "jsonl"], default="md"),
)
def export(settings: Settings, options) -> int:
    client = connect(settings)
    thread = find_thread(client, options.thread)
    if options.format == "md":
        say(f"# {thread['title'] or '(untitled)'}")
    for message in all_messages(client, thread["id"]):
        if options.format == "jsonl":
            say(encode_json(message))
        else:
            who = "You" if message["role"] == "user" else message["model"]
            say(f"\n## {who}\n\n{message['content'].rstrip()}")
    return 0


@command(
    "react",
    "react to a message with an emoji, or take it back",
    "liminal react 7be1 👍",
    arg("message", help="an id or its first characters (see `liminal show`)"),
    arg("emoji", help="one emoji, or :name:"),
    arg("--remove", action="store_true", help="take the reaction back"),
)
def react(settings: Settings, options) -> int:
    client, path = connect(settings), f"/api/v1/messages/{quote(options.message)}/reactions"
    if options.remove:
        found = client.ask("DELETE", f"{path}/{quote(options.emoji)}")
    else:
        found = client.ask("POST", path, {"emoji": options.emoji})
    say(reaction_words(found))
    return 0


def reaction_words(found: dict) -> str:
    return "  ".join(f"{one['emoji']} {one['count']}" for one in found["reactions"]) or "no reactions"


MESSAGE = arg("message", nargs="?", help="an id or its first characters; without one, the newest")


def find_reply(client: Client, ref: str | None, running: bool = False) -> dict:
    """A reply by its id, else the newest one that runs, else (where that will do) the newest reply of the newest thread."""
    if ref:
        return client.ask("GET", f"/api/v1/messages/{quote(ref)}")
    runs = client.ask("GET", "/api/v1/runs")["runs"]
    if runs:
        return client.ask("GET", f"/api/v1/messages/{max(runs, key=lambda run: run['created_at'])['message_id']}")
    threads = [] if running else client.ask("GET", "/api/v1/threads?limit=1")["threads"]
    replies = [one for one in all_messages(client, threads[0]["id"]) if one["role"] == "assistant"] if threads else []
    if not replies:
        raise Problem("not_found", "no reply is being generated now" if running else "there is no reply yet")
    return replies[-1]


@command("runs", "list the replies being generated now", "liminal runs")
def runs(settings: Settings, options) -> int:
    found = connect(settings).ask("GET", "/api/v1/runs")["runs"]
    table([(run["message_id"][:8], run["model"], f"at {run['position']}", local_time(run["created_at"])) for run in found])
    return 0


@command(
    "attach",
    "follow a reply, from its beginning or from now on",
    "liminal attach 7be1",
    MESSAGE,
    arg("--from-now", action="store_true", help="only what comes from now on"),
)
def attach(settings: Settings, options) -> int:
    client = connect(settings)
    reply = find_reply(client, options.message)
    position = reply["position"] if options.from_now else None
    return exit_code(show(client, client.stream("GET", f"/api/v1/messages/{reply['id']}/stream", position=position)))


@command("stop", "stop a reply; what came is kept", "liminal stop", MESSAGE)
def stop(settings: Settings, options) -> int:
    client = connect(settings)
    reply = find_reply(client, options.message, running=True)
    say(receipt_words(client.ask("POST", f"/api/v1/messages/{reply['id']}/cancel")))
    return 0


@command(
    "retry",
    "generate another reply to the same message",
    "liminal retry -m ollama/llama3.2",
    MESSAGE,
    arg("-m", "--model", help="with this model (default: the same)"),
)
def retry(settings: Settings, options) -> int:
    client = connect(settings)
    body = {"model": options.model} if options.model else {}
    path = f"/api/v1/messages/{find_reply(client, options.message)['id']}/retry"
    return exit_code(show(client, client.stream("POST", path, body)))


@command("overflow", "list database bundles that wait for the Domain", "liminal overflow", arg("--json", action="store_true"))
def overflow(settings: Settings, options) -> int:
    found = connect(settings).ask("GET", "/api/v1/overflow?limit=1000")
    if options.json:
        say(encode_json(found))
        return 0
    rows = [(one["message_id"][:8], f"at {one['position']}", f"{one['age_s']:.1f} s", f"{one['tries']} tries") for one in found["waiting"]]
    table([(*row, one["where"]) for row, one in zip(rows, found["waiting"])])
    say(f"{found['queue']} in the queue, {found['overflow']} in overflow.db, {found['left_to_domain']} left to the Domain")
    return 0


@command("stats", "figures of both servers: time to first token, rate, bundles, cost", "liminal stats", arg("--json", action="store_true"))
def stats(settings: Settings, options) -> int:
    found = connect(settings).ask("GET", "/api/v1/stats")
    if options.json:
        say(encode_json(found))
        return 0
    spread = lambda one: "  ".join(f"{name} {'-' if value is None else f'{value:g}'}" for name, value in one.items())
    rows = [(f"ttft {hop}, ms up to", spread(found["ttft_ms"][hop])) for hop in ("provider", "domain", "edge")]
    rows += [(f"{who} bundles by", spread(found["bundles"][who])) for who in ("client", "database")]
    rows += [(f"{who} bundles, tokens", spread(found["bundles"][f"{who}_tokens"])) for who in ("client", "database")]
    rows += [("queue", spread({name: n for name, n in found["queue"].items() if name != "wait_ms"}))]
    rows += [("queue wait, ms up to", spread(found["queue"]["wait_ms"]))]
    names = ("tokens", "tokens_per_s", "runs", "clients", "resumes", "cancellations")
    table(rows + [(name.replace("_", " "), "-" if found[name] is None else found[name]) for name in names])
    say("")
    table([("model", "replies", "errors", "tokens in", "out", "cost"), *map(model_row, found["models"])])
    return 0


def model_row(one: dict) -> tuple:
    cost = "-" if one["cost"] is None else f"${one['cost']:.4f}"
    return one["model"], one["runs"], one["errors"], one["input_tokens"], one["output_tokens"], cost


@command("models", "list what can be used now, and why not where it cannot", "liminal models")
def models(settings: Settings, options) -> int:
    found = connect(settings).ask("GET", "/api/v1/models")["models"]
    table([("*" if one["default"] else " ", one["id"], "" if one["available"] else f"no: {one['why']}") for one in found])
    return 0


@command("tools", "list MCP servers and their tools, and which are allowed", "liminal tools")
def tools(settings: Settings, options) -> int:
    found = connect(settings).ask("GET", "/api/v1/tools")
    if found["why"]:
        note(found["why"])
    for server in found["servers"]:
        say(f"{server['name']}: {server['state']}" + (f" ({server['why']})" if server["why"] else ""))
        rows = [(f"  {tool['name']}", "allowed" if tool["allowed"] else "refused", first_line(tool)) for tool in server["tools"]]
        table(rows)
    return 0


def first_line(tool: dict) -> str:
    words = (tool["description"] if tool["allowed"] else tool["why"]).strip().split("\n")[0]
    return words if len(words) <= 150 else words[:147] + "..."


@command(
    "keys",
    "list, create or revoke API keys",
    'liminal keys create "my phone"',
    arg("action", nargs="?", choices=["list", "create", "revoke"], default="list"),
    arg("name", nargs="?", help="the new key's name, or the id of the one to revoke"),
    arg("--user", help="make the key for this user's id (owners only)"),
)
def keys(settings: Settings, options) -> int:
    client = connect(settings)
    if options.action == "list":
        found = client.ask("GET", "/api/v1/keys")["keys"]
        table([(one["id"][:8], one["prefix"] + "...", one["name"], one["last_used_at"] or "never used") for one in found])
        return 0
    if not options.name:
        raise Problem("invalid_request", f"`liminal keys {options.action}` needs a name or an id")
    if options.action == "create":
        made = client.ask("POST", "/api/v1/keys", {"name": options.name, **({"user_id": options.user} if options.user else {})})
        note("this is shown once; LIMINAL_API_KEY takes it")
        say(made["secret"])
        return 0
    listed = [one["id"] for one in client.ask("GET", "/api/v1/keys")["keys"] if one["id"].startswith(options.name)]
    gone = client.ask("DELETE", f"/api/v1/keys/{quote(listed[0] if len(listed) == 1 else options.name)}")
    say(f"revoked {gone['name']} ({gone['prefix']}...)")
    return 0


@command(
    "users",
    "list, create or delete users (owners only)",
    "liminal users create ada",
    arg("action", nargs="?", choices=["list", "create", "delete"], default="list"),
    arg("name", nargs="?", help="the new user's name, or the id of the one to delete"),
)
def users(settings: Settings, options) -> int:
    client = connect(settings)
    if options.action == "list":
        found = client.ask("GET", "/api/v1/users")["users"]
        table([(one["id"][:8], one["role"], one["name"]) for one in found])
    elif not options.name:
        raise Problem("invalid_request", f"`liminal users {options.action}` needs a name or an id")
    elif options.action == "create":
        made = client.ask("POST", "/api/v1/users", {"name": options.name})
        say(f"{made['id']}  {made['name']}")
        note(f"now give them a key: `liminal keys create NAME --user {made['id'][:8]}`")
    else:
        client.ask("DELETE", f"/api/v1/users/{quote(options.name)}")
        say("deleted")
    return 0


@command(
    "providers",
    "list, add or delete providers, or give one its key",
    "liminal providers key anthropic",
    arg("action", nargs="?", choices=["list", "add", "delete", "key"], default="list"),
    arg("name", nargs="?", help="the provider's name"),
    arg("--kind", choices=["anthropic", "openai", "demo"], default="openai", help="how it is spoken to"),
    arg("--base-url", help="its address, as in https://openrouter.ai/api/v1"),
    arg("--key-env", help="the variable that holds its key, as in OPENROUTER_API_KEY"),
    arg("--model", action="append", help="a model of it, the default one first (repeatable)"),
)
def providers(settings: Settings, options) -> int:
    client = connect(settings)
    if options.action == "list":
        found = client.ask("GET", "/api/v1/providers")["providers"]
        rows = [(one["name"], one["kind"], one["key_env"] or "-", "set" if one["key_set"] else "-") for one in found]
        table([(*row, one["base_url"] or "-") for row, one in zip(rows, found)])
    elif not options.name:
        raise Problem("invalid_request", f"`liminal providers {options.action}` needs the provider's name")
    elif options.action == "add":
        fields = {"kind": options.kind, "base_url": options.base_url, "key_env": options.key_env, "models": options.model}
        made = client.ask("PUT", f"/api/v1/providers/{quote(options.name)}", fields)
        say(f"{made['name']} is there: use it as {made['name']}/MODEL")
        if made["key_env"] and not made["key_set"]:
            note(f"now give it its key: `liminal providers key {made['name']}`")
    elif options.action == "delete":
        client.ask("DELETE", f"/api/v1/providers/{quote(options.name)}")
        say("deleted")
    else:
        set_key(client, options.name)
    return 0


def set_key(client: Client, name: str) -> None:
    """Ask for a provider's key without echo and write it to data/env, which the Domain reads again by itself."""
    import getpass

    known = {one["name"]: one for one in client.ask("GET", "/api/v1/providers")["providers"]}
    variable = known.get(name, {}).get("key_env")
    if not variable:
        takers = ", ".join(one["name"] for one in known.values() if one["key_env"])
        raise Problem("invalid_request", f"{name} takes no key; these do: {takers}")
    try:
        secret = getpass.getpass(f"{variable}: ") if sys.stdin.isatty() else sys.stdin.readline()
    except EOFError:
        secret = ""
    secret = secret.strip()
    if not secret or not secret.isprintable() or set(secret) & set(" \"'#"):
        raise Problem("invalid_request", "that is no key: nothing was changed")
    path = client.settings.data / "env"
    kept = [line for line in path.read_text().rstrip("\n").split("\n") if variable_of(line) != variable] if path.exists() else []
    write_private(path, "\n".join([*kept, f"{variable}={secret}"]) + "\n")
    say(f"{variable} is in {path}; the next message uses it")
    if Settings.environment(variable) not in ("", secret):
        note(f"another {variable} stands in this environment, and wins in servers that are started from it")


def variable_of(line: str) -> str:
    return line.strip().removeprefix("export ").partition("=")[0].strip()


@command("up", "start both servers in the background", "liminal up")
def up(settings: Settings, options) -> int:
    start_servers(settings)
    connect(settings)
    say(f"Liminal is up at {settings.url}")
    return 0


@command("down", "stop both servers, the Edge first; nothing is lost", "liminal down")
def down(settings: Settings, options) -> int:
    stopped = [name for name in ("edge", "domain") if stop_server(settings, name)]
    say(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")
    return 0


@command("status", "what runs, where, which version, and whether all is well", "liminal status")
def status(settings: Settings, options) -> int:
    rows = [("data", settings.data)]
    well = all([server_row(settings, name, url, rows) for name, url in (("domain", settings.domain_url), ("edge", settings.url))])
    open_files = [path.name for path in settings.data.glob("*") if path.stat().st_mode & 0o077] if settings.data.is_dir() else []
    if open_files:
        rows.append(("files", f"readable by others: {' '.join(sorted(open_files))}; mend it with chmod -R go= {settings.data}"))
    if well:
        client = Client(settings)
        for one in client.ask("GET", "/api/v1/providers")["providers"]:
            if one["key_env"]:
                mend = f"not set: `liminal providers key {one['name']}`"
                rows.append((one["name"], f"{one['key_env']} {'is set' if one['key_set'] else mend}"))
        with contextlib.suppress(Problem):  # these two are for owners
            for name, state in client.ask("GET", "/api/v1/status")["databases"].items():
                rows.append((name, state if state == "ok" else f"{state}: restore it from a backup"))
            waits = client.ask("GET", "/api/v1/overflow?limit=1")
            rows.append(("queue", f"{waits['queue']} bundles wait, {waits['overflow']} in overflow.db (`liminal overflow`)"))
    table(rows)
    return 0 if well else 3


def server_row(settings: Settings, name: str, url: str, rows: list) -> bool:
    """Add a line on one server; whether it is well."""
    try:
        seen = Client(dataclasses.replace(settings, url=url), timeout=3).ask("GET", "/health")
        age = "" if seen["version"] == version() else ", older than the files: `liminal down` and `liminal up`"
        other = "" if seen["instance"] == settings.instance else ", of another data folder: set its port"
        process = holder(settings, name)
        rows.append((name, f"well at {url}" + (f", process {process}" if process else "") + f", version {seen['version']}{age}{other}"))
        return True
    except (Unreachable, Problem, KeyError, TypeError):
        rows.append((name, f"not running at {url}: `liminal up` starts it"))
        return False


################ Breaking things on purpose
# The same promises that the test suite checks, against any running system and model: every stream whole, in order, and equal
# to what is stored. They make threads of their own, and delete them.

LOAD = "demo/load-200-50"


@command(
    "test",
    "measure and break a running system on purpose",
    "liminal test network --simulate-disconnect --at-token 20 --times 3",
    arg("what", choices=["concurrent", "network", "contract", "all"], help="many streams at once; dropped connections and killed servers; every operation with good and bad input; all three"),
    arg("-m", "--model", default=LOAD, help=f"the model to test with (default: {LOAD})"),
    arg("--sessions", type=int, default=10, help="concurrent: how many at once"),
    arg("--messages", type=int, default=1, help="concurrent: how many messages in each"),
    arg("--simulate-disconnect", action="store_true", help="network: drop the connection and resume (always done)"),
    arg("--at-token", type=int, default=20, help="network: drop it after so many words"),
    arg("--times", type=int, default=1, help="network: drop it so often"),
    arg("--kill", choices=["edge", "domain"], help="network: kill -9 this server in mid-reply, and start it again"),
    arg("-y", "--yes", action="store_true", help="do not ask before killing"),
    arg("--json", action="store_true", help="the figures as one JSON object"),
)
def test(settings: Settings, options) -> int:
    client, failed = connect(settings), False
    kinds = {"concurrent": test_concurrent, "network": test_network, "contract": test_contract}
    for name in kinds if options.what == "all" else [options.what]:
        figures = kinds[name](client, options)
        failed |= bool(figures["faults"])
        if options.json:
            say(encode_json({"test": name, **figures}))
        else:
            table([(word.replace("_", " "), value) for word, value in figures.items() if word != "faults"])
            for fault in figures["faults"]:
                say(f"WRONG: {fault}")
    return 1 if failed else 0


def compare_stored(client: Client, seen: Measure, text: str) -> list[str]:
    """What is wrong with a finished stream, held against the message on disk and, for the load model, what must have come."""
    stored = client.ask("GET", f"/api/v1/messages/{seen.message_id}")
    faults = [] if stored["status"] == seen.done["status"] else [f"status {seen.done['status']} is stored as {stored['status']}"]
    if sha256(stored["content"]) != sha256(text):
        faults.append(f"{len(text)} characters came, {len(stored['content'])} others are stored")
    load = re.fullmatch(r"demo/load-(\d+)-\d+", stored["model"])
    whole = load and "".join(f" t{number}" for number in range(int(load[1])))
    if load and (text != whole if stored["status"] == "complete" else not whole.startswith(text)):
        faults.append("the text is not what the load model sent")
    if stored["position"] != seen.position or seen.done["position"] != seen.position:
        faults.append(f"position {seen.position} is stored as {stored['position']}, told as {seen.done['position']}")
    return [f"message {seen.message_id[:8]}: {fault}" for fault in faults]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_concurrent(client: Client, options) -> dict:
    """Many sessions at once: every stream complete, ordered and equal to what is stored."""
    seen, faults = [], []

    def session():
        own, body = Client(client.settings), {"content": "load test", "model": options.model}
        try:
            for _ in range(options.messages):
                measure = Measure()
                for _ in measure.watch(own.stream("POST", "/api/v1/messages", body)):
                    pass
                faults.extend(compare_stored(own, measure, "".join(measure.texts)))
                if measure.done["status"] != "complete":
                    faults.append(f"message {measure.message_id[:8]} ended as {measure.done['status']}")
                body["thread_id"] = measure.thread_id
                seen.append(measure)
            own.ask("DELETE", f"/api/v1/threads/{body['thread_id']}")
        except (Problem, Unreachable, OSError) as error:
            faults.append(f"a session broke off: {error}")

    threads = [threading.Thread(target=session, daemon=True) for _ in range(options.sessions)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        progress(len(seen), options.sessions * options.messages)
        threads[-1].join(0.2) if threads[-1].is_alive() else time.sleep(0.2)
    progress(None, 0)
    if len(seen) < options.sessions * options.messages and not faults:
        faults.append(f"only {len(seen)} of {options.sessions * options.messages} messages came through")
    seconds, tokens = time.monotonic() - began, sum((one.done["usage"] or {}).get("output_tokens", 0) for one in seen)
    ttft = sorted(one.ttft_ms() for one in seen if one.first)
    figures = {"messages": len(seen), "tokens": tokens, "seconds": round(seconds, 2), "tokens_per_s": round(tokens / seconds, 1)}
    figures |= {f"ttft_p{int(q * 100)}_ms": ttft[min(len(ttft) - 1, int(q * len(ttft)))] if ttft else None for q in (0.5, 0.95, 0.99)}
    return {**figures, "longest_gap_ms": round(max((one.gap for one in seen), default=0) * 1000, 1), "faults": faults}


def test_network(client: Client, options) -> dict:
    """One reply whose connection is dropped again and again, and resumed: nothing lost, nothing twice."""
    if options.kill and not (pid := holder(client.settings, options.kill)):
        raise Problem("invalid_request", f"the {options.kill} of {client.settings.data} does not run here: there is nothing to kill")
    if options.kill and not options.yes:
        confirm(f"kill -9 the {options.kill}, process {pid}?")
    seen, drops, began = Measure(), 0, time.monotonic()
    method, path, body = "POST", "/api/v1/messages", {"content": "network test", "model": options.model}
    while not seen.done:
        place = str(seen.position) if seen.message_id else None
        for event in seen.watch(client.stream(method, path, body, position=place)):
            if drops < options.times and len("".join(seen.texts).split()) >= options.at_token * (drops + 1):
                drops += 1
                break
        client.close()
        progress(drops, options.times)
        method, path, body = "GET", f"/api/v1/messages/{seen.message_id}/stream", None
        if options.kill and drops == options.times and not seen.done:
            kill_and_start(client.settings, options.kill)
            options.kill = None
    progress(None, 0)
    faults = compare_stored(client, seen, "".join(seen.texts))
    if drops < options.times:
        faults.append(f"the reply was over after {drops} drops: take a smaller --at-token or a longer reply")
    client.ask("DELETE", f"/api/v1/threads/{seen.thread_id}")
    figures = {"drops": drops, "status": seen.done["status"], "characters": seen.position, "seconds": round(time.monotonic() - began, 2)}
    return {**figures, "sha256": sha256("".join(seen.texts))[:16], "faults": faults}


def test_contract(client: Client, options) -> dict:
    """Every operation of contracts.json with good and with bad input; every answer and event is held against it."""
    known, faults, calls = operations("edge"), [], collections.Counter()

    def call(name: str, expected: int, body=None, /, *, key: str | None = None, query: str = "", **path):
        """Call one operation, check status and body; returns the parsed body."""
        operation = known[name]
        url = operation.path.format_map({place: quote(value) for place, value in path.items()}) + query
        one = Client(dataclasses.replace(client.settings, api_key=client.key if key is None else key), timeout=30)
        if key == "":
            one.key = "none"
        response = one.send(operation.method, url, body)
        data = response.read()
        kind, calls[name] = response.getheader("Content-Type", ""), calls[name] + 1
        value = json.loads(data) if data and "json" in kind else None
        if response.status != expected:
            faults.append(f"{name}: status {response.status} instead of {expected}: {data[:200]!r}")
        test = schema_check("Error") if response.status >= 400 else operation.replies.get(response.status)
        fault = test and "event-stream" not in kind and test(value)
        if fault:
            faults.append(f"{name}: {'.'.join(map(str, fault[0]))} {fault[1]}")
        if "event-stream" in kind:
            events = [json.loads(text) for _, text, _ in Decoder().feed(data)]
            faults.extend(f"{name}: {event['type']} {fault}" for event in events if (fault := schema_check("Event")(event)))
            if [event["type"] for event in events if event["type"] in ("start", "done")] != ["start", "done"]:
                faults.append(f"{name}: the stream has not exactly one start, first, and one done, last")
            return events[0]
        return value

    small = {"content": "contract test", "model": "demo/load-20-0"}
    started = call("send_message", 200, small)
    reply, thread = {"message_id": started["message_id"]}, {"thread_id": started["thread_id"]}
    call("send_message", 200, {**small, "stream": False, **thread})
    ids = call("send_message", 202, {**small, "background": True})
    call("stream_message", 200, message_id=ids["message_ids"][0])
    for name in ("get_message", "stream_message", "cancel_message", "retry_message"):
        call(name, 200, **reply)
    call("add_reaction", 200, {"emoji": "👍"}, **reply)
    call("remove_reaction", 200, emoji="👍", **reply)
    made = call("create_thread", 201, {"title": "contract test"})
    for name, body in (("get_thread", None), ("update_thread", {"title": "changed"}), ("list_messages", None)):
        call(name, 200, body, **thread)
    forked = call("fork_thread", 201, {"message_id": reply["message_id"]}, **thread)
    for name, query in (("list_threads", "?limit=1"), ("list_runs", ""), ("list_models", ""), ("list_tools", ""), ("list_providers", "")):
        call(name, 200, query=query)
    call("search_messages", 200, query="?q=%22contract")
    for name in ("list_keys", "get_stats", "health", "metrics", "contract"):
        call(name, 200)
    mine = client.ask("GET", "/api/v1/keys")["keys"][0]
    secret = call("create_key", 201, {"name": "contract test"})
    call("create_session", 201, key=secret["secret"])
    call("delete_session", 401)  # a key is no session
    call("revoke_key", 200, key_id=secret["id"])
    call("list_threads", 401, key=secret["secret"])
    owner = client.ask("GET", "/api/v1/keys")["keys"] and Client(client.settings).send("GET", "/api/v1/users").status == 200
    for name in ("list_users", "list_overflow", "get_status"):
        call(name, 200 if owner else 403)
    if owner:
        user = call("create_user", 201, {"name": f"contract test {mine['id'][:4]} {os.getpid()}"})
        call("delete_user", 200, user_id=user["id"])
        call("put_provider", 200, {"kind": "openai", "base_url": "http://127.0.0.1:9/v1"}, name="contract-test")
        call("delete_provider", 204, name="contract-test")
    nobody, nothing = "00000000-0000-4000-8000-000000000000", {}
    for name, operation in known.items():
        places = {given.name: nobody for given in operation.parameters if given.where == "path"}
        places |= {"emoji": "👍"} if "emoji" in places else {"name": "no-such-thing"} if "name" in places else nothing
        if operation.security:
            call(name, 401, {} if operation.body else None, key="", **places)
        if operation.body_required and "key" in operation.security and (owner or "owner" not in operation.security["key"]):
            call(name, 400, {"no such field": 1}, **places)
        elif places and operation.method in ("GET", "DELETE") and (owner or "owner" not in operation.security["key"]):
            call(name, 404, **places)
    for one in {thread["thread_id"], ids["thread_id"], made["id"], forked["id"]}:
        call("delete_thread", 204, thread_id=one)
    faults += [f"{name} was not called" for name in known if not calls[name]]
    return {"operations": len(known), "calls": calls.total(), "faults": faults}


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


def make_parser() -> argparse.ArgumentParser:
    lines = [f"  {field.metadata['name']:<24} {field.metadata['meaning']}" for field in dataclasses.fields(Settings) if field.metadata]
    words = "settings (environment, or lines of data/env):\n" + "\n".join(lines)
    words += "\n\nexit status: 0 done, 1 failed, 2 wrong usage, 3 no server, 130 interrupted"
    shape = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    about = "Chat with any LLM; a reply is never lost. Without a command: chat."
    parser = argparse.ArgumentParser("liminal", description=about, epilog=words, **shape)
    parser.add_argument("--version", action="version", version=f"liminal {version()}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    for name, (fn, meaning, example, arguments) in COMMANDS.items():
        sub = commands.add_parser(name, help=meaning, description=meaning, epilog=f"example: {example}", **shape)
        sub.set_defaults(run=fn)
        for names, options in arguments:
            sub.add_argument(*names, **options)
    return parser


def with_command(words: list[str]) -> list[str]:
    """`liminal "a question"` and `liminal -m x "..."` mean chat; a single unknown word is more likely a slip."""
    first = words[0] if words else "-"
    if first.startswith("-") and first not in ("-h", "--help", "--version"):
        return ["chat", *words]
    if first not in COMMANDS and not first.startswith("-") and (" " in first or piped().strip()):
        return ["chat", *words]
    return words


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
        code = options.run(Settings.load(), options)
        sys.stdout.flush()
    except Problem as problem:
        code = fail(f"{problem.message} ({problem.code})", 1)
    except Unreachable as problem:
        code = fail(str(problem), 3)
    except Lost as problem:
        code = fail(f"the connection was lost: {problem}", 3)
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


def fail(words: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"liminal: {printable(' '.join(words.split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
