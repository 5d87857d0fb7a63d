"""The rules of the house: who imports what, who opens what, what the documents say, what a start leaves."""

import ast
import dataclasses
import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

import liminal as wire

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["liminal.py", "liminal_domain.py", "liminal_edge.py"]
SERVERS = SCRIPTS[1:]
CONTRACT = json.loads((ROOT / "contracts.json").read_bytes())
VARIABLES = {field.metadata["name"] for field in dataclasses.fields(wire.Settings) if field.metadata}


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text())


def imported(where: ast.AST) -> set[str]:
    """All modules that are imported anywhere in there, by statement or by a call with a literal name."""
    found = set()
    for node in ast.walk(where):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and name_of(node.func) in ("import_module", "__import__") and node.args:
            found |= {one.value for one in ast.walk(node.args[0]) if isinstance(one, ast.Constant)}
    return found


def name_of(node: ast.AST) -> str:
    """The last name of a dotted one."""
    return getattr(node, "attr", getattr(node, "id", ""))


def imports(where: ast.AST, module: str) -> bool:
    return any(name == module or name.startswith(module + ".") for name in imported(where))


def at_start(module: ast.Module) -> ast.Module:
    """The module without the bodies of its functions: what runs when it is imported."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return ast.Pass()

        visit_AsyncFunctionDef = visit_FunctionDef

    return Strip().visit(module)


def texts(where: ast.AST) -> list[str]:
    """Every literal text but docstrings."""
    docs = {id(node.value) for node in ast.walk(where) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(where) if isinstance(node, ast.Constant) and id(node) not in docs]
    return [node.value for node in constants if isinstance(node.value, str)]


def table_rows(document: str, heading: str) -> list[list[str]]:
    """The cells of each row of the markdown table with this header row."""
    if not (ROOT / document).exists():
        pytest.skip(f"{document} is not written yet")
    _, found, rest = (ROOT / document).read_text().partition(heading)
    assert found, f"{document} has no table {heading}"
    rows = rest.split("\n\n")[0].strip().splitlines()[1:]
    return [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


################ AGENTS.md: the table of roles

HEADING = "| role | owns | may touch | must not import | verify with |"


@pytest.fixture(scope="module")
def roles():
    return {
        row[0]: dict(zip(("owns", "may touch", "must not import", "verify"), row[1:]))
        for row in table_rows("AGENTS.md", HEADING)
    }


def test_table_names_the_four_roles_and_the_orchestrator(roles):
    assert {"domain", "edge", "cli", "test", "orchestrator"} == {role.lower() for role in roles}


def test_each_script_has_one_owner(roles):
    owned = [name for role in roles.values() for name in names(role["owns"])]
    assert all(owned.count(name) == 1 for name in [*SCRIPTS, "contracts.json", "schema.sql"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_imports_nothing_that_its_role_must_not(roles, script):
    [role] = [role for role in roles.values() if script in names(role["owns"])]
    banned = names(role["must not import"])
    assert banned and [module for module in banned if imports(tree(script), module)] == []


@pytest.mark.parametrize(
    "script, least",
    [
        ("liminal.py", {"liminal_domain", "liminal_edge", "anthropic", "mcp"}),
        ("liminal_domain.py", {"liminal_edge"}),
        ("liminal_edge.py", {"liminal_domain", "anthropic", "mcp"}),
    ],
)
def test_table_forbids_what_the_design_forbids(roles, script, least):
    [role] = [role for role in roles.values() if script in names(role["owns"])]
    assert least <= set(names(role["must not import"]))


def test_table_names_only_what_exists(roles):
    cells = [cell for role in roles.values() for cell in (role["owns"], role["may touch"])]
    paths = {path for cell in cells for path in names(cell)}
    paths |= {word for role in roles.values() for word in re.findall(r"tests/\w+\.py", role["verify"])}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    "source",
    ["import a.b", "from a import b", "def f():\n    import a.b as c", "x = importlib.import_module('a.b')"],
)
def test_forbidden_import_is_found_wherever_it_hides(source):
    assert imports(ast.parse(source), "a") and imports(ast.parse(source), "a.b") and not imports(ast.parse(source), "b")


################ Imports


def test_liminal_imports_only_the_standard_library_at_its_top():
    assert {name.partition(".")[0] for name in imported(at_start(tree("liminal.py")))} <= sys.stdlib_module_names


@pytest.mark.parametrize("script, other", [SERVERS, SERVERS[::-1]])
def test_servers_do_not_import_each_other(script, other):
    assert not imports(tree(script), other.removesuffix(".py"))


def test_liminal_imports_no_server():
    assert not imports(tree("liminal.py"), "liminal_domain") and not imports(tree("liminal.py"), "liminal_edge")


@pytest.mark.parametrize(
    "module, never",
    [
        ("liminal", {"aiohttp", "anthropic", "mcp", "sqlite3", "asyncio", "jwt", "cryptography"}),
        ("liminal_domain", {"anthropic", "mcp", "liminal_edge"}),
        ("liminal_edge", {"anthropic", "mcp", "sqlite3", "liminal_domain"}),
    ],
)
def test_import_loads_nothing_heavy(module, never):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded and never & set(loaded) == set()


################ Who opens which database, who speaks to whom


def test_edge_opens_no_database_but_overflow():
    assert not [text for text in texts(tree("liminal_edge.py")) if "liminal.db" in text or "messages.db" in text]


def test_edge_speaks_to_no_llm():
    words = [
        text
        for text in texts(tree("liminal_edge.py"))
        if re.search("anthropic|openai|ollama|/v1/messages|completions", text, re.I)
    ]
    assert words == [] and not imports(tree("liminal_edge.py"), "openai")


def test_domain_knows_no_client_events():
    taken = [
        node
        for node in ast.walk(tree("liminal_domain.py"))
        if isinstance(node, ast.ImportFrom) and node.module == "liminal"
    ]
    assert {alias.name for node in taken for alias in node.names} & {"sse", "Client", "show", "say", "note"} == set()


def test_domain_knows_no_cookies_and_no_terminal():
    used = {
        name_of(node) for node in ast.walk(tree("liminal_domain.py")) if isinstance(node, (ast.Attribute, ast.Name))
    }
    assert used & {"cookies", "set_cookie", "isatty", "getpass", "input", "curses", "termios"} == set()
    assert not [
        text for text in texts(tree("liminal_domain.py")) if re.search("set-cookie|last-event-id|\x1b", text, re.I)
    ]


def test_cli_knows_only_the_edge():
    client = (ROOT / "liminal.py").read_text().partition("################ The client")[2]
    assert client and not re.search(r"/domain/|sqlite3|messages\.db|liminal\.db", client)


@pytest.mark.parametrize("script", SERVERS)
def test_server_does_not_read_the_environment(script):
    assert {"environ", "getenv"} & {name_of(node) for node in ast.walk(tree(script))} == set()


def test_only_settings_reads_the_environment():
    functions = [node for node in tree("liminal.py").body if isinstance(node, ast.FunctionDef)]
    readers = [fn.name for fn in functions if "environ" in {name_of(node) for node in ast.walk(fn)}]
    assert readers == []


################ schema.sql

SECTIONS = re.split(r"(?m)^-- (?=\w+\.db:)", (ROOT / "schema.sql").read_text())
SCHEMA = {section.partition(":")[0]: "\n".join(section.splitlines()[1:]) for section in SECTIONS if section.strip()}
SQL = re.compile(r"\s*(select|insert|update|delete|replace|with|create|alter|drop|attach|pragma)\s", re.I)


def statements(section: str) -> list[str]:
    bare = re.sub(r"--.*", "", SCHEMA[section])
    return [one.strip() for one in bare.split(";") if one.strip()]


def tables(section: str) -> set[str]:
    return {
        word
        for one in statements(section)
        for word in re.findall(r"create (?:virtual )?table if not exists (\w+)", one)
    }


def test_schema_has_a_section_for_each_database():
    assert {"liminal.db", "messages.db"} <= set(SCHEMA) <= {"liminal.db", "messages.db", "overflow.db"}


@pytest.mark.parametrize("section", SCHEMA)
def test_schema_is_definitions_and_pragmas_only(section):
    assert all(re.match("(create|pragma) ", one) for one in statements(section)) and tables(section)


@pytest.mark.parametrize("section", SCHEMA)
def test_schema_may_be_run_at_every_start(section, tmp_path):
    with sqlite3.connect(tmp_path / section) as db:
        db.executescript(SCHEMA[section]), db.executescript(SCHEMA[section])
        assert db.execute("pragma journal_mode").fetchone() == ("wal",) and db.execute(
            "pragma synchronous"
        ).fetchone() == (2,)
    db.close()


def test_tables_are_named_as_one_would_guess():
    assert tables("liminal.db") == {"users", "api_keys", "sessions", "threads", "providers"}
    assert tables("messages.db") >= {"messages", "chunks", "message_reactions", "idempotency_keys"}


def test_no_statement_touches_both_databases():
    ours, theirs = tables("liminal.db"), tables("messages.db")
    sql = [text for text in texts(tree("liminal_domain.py")) if SQL.match(text)]
    used = [set(re.findall(r"(?:from|join|into|update)\s+(\w+)", text)) for text in sql]
    assert used and [places for places in used if places & ours and places & theirs] == []


def test_no_database_is_attached():
    assert not [
        text
        for script in SCRIPTS
        for text in texts(tree(script))
        if re.match(r"\s*attach\s+(database\b|')", text, re.I)
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_tables_are_defined_in_schema_sql_only(script):
    assert not [
        text
        for text in texts(tree(script))
        if re.match(r"\s*(create|alter|drop)\s+(table|index|virtual|trigger)", text, re.I)
    ]


def test_no_statement_is_put_together_from_text():
    formatted = [node for node in ast.walk(tree("liminal_domain.py")) if isinstance(node, ast.JoinedStr)]
    assert not [
        node.values[0].value
        for node in formatted
        if node.values and SQL.match(str(getattr(node.values[0], "value", "")))
    ]


################ README.md


def test_readme_lists_exactly_the_edge_operations():
    rows = re.findall(r"(?m)^\| `(\w+)` \| `([A-Z]+ /[^`]*)` \|", readme())
    operations = [(path, method, one) for path, methods in CONTRACT["paths"].items() for method, one in methods.items()]
    edge = {one["operationId"]: f"{method.upper()} {path}" for path, method, one in operations if "edge" in one["tags"]}
    assert dict(rows) == edge and len(rows) == len(edge)


def test_readme_lists_exactly_the_settings():
    rows = re.findall(r"(?m)^\| `([A-Z][A-Z0-9_]+)` \|.*\|.*\|$", readme())
    assert set(rows) == VARIABLES and len(rows) == len(VARIABLES)


def test_readme_tells_the_real_defaults():
    told = dict(re.findall(r"(?m)^\| `([A-Z][A-Z0-9_]+)` \| `([^`]*)` \|", readme()))
    real = {field.metadata["name"]: field.default for field in dataclasses.fields(wire.Settings) if field.metadata}
    assert [
        name for name, value in told.items() if real[name] and name != "LIMINAL_DATA" and told[name] != str(real[name])
    ] == []


def test_readme_names_every_command():
    assert [name for name in wire.COMMANDS if not re.search(rf"\b{name}\b", readme())] == []


def test_readme_names_only_files_that_exist():
    files = set(re.findall(r"\]\(([\w./]+)\)|(?<!\S)(tests/\w+\.py)", readme()))
    files = {name for found in files for name in found if name}
    assert files and [name for name in sorted(files) if not (ROOT / name).exists()] == []


def readme() -> str:
    if not (ROOT / "README.md").exists():
        pytest.skip("README.md is not written yet")
    return (ROOT / "README.md").read_text()


################ --help


def test_help_names_every_setting_and_command(shared):
    told = shared.cli("--help").stdout
    assert [name for name in VARIABLES | set(wire.COMMANDS) if not re.search(rf"(?m)^ +{name}\b", told)] == []


def test_every_setting_has_a_meaning(shared):
    lines = re.findall(r"(?m)^  ([A-Z][A-Z0-9_]+) +(\S.*)$", shared.cli("--help").stdout)
    assert {name for name, _ in lines} == VARIABLES


@pytest.mark.parametrize("command", wire.COMMANDS)
def test_help_of_a_command_has_an_example(shared, command):
    done = shared.cli(command, "--help")
    assert done.returncode == 0 and re.search(rf"(?m)^example: liminal {command}\b", done.stdout), done.stdout


@pytest.mark.parametrize("command", wire.COMMANDS)
def test_example_of_a_command_is_right_usage(command):
    example = wire.COMMANDS[command][2]
    words = subprocess.run(
        ["sh", "-c", f'printf "%s\\n" {example.removeprefix("liminal ")}'], capture_output=True, text=True
    )
    assert wire.make_parser().parse_args(words.stdout.splitlines()).command == command


################ A first start leaves nothing for other eyes


def open_to_others(folder: Path) -> list[str]:
    paths = [folder, *folder.rglob("*")]
    return [f"{path.name} {path.stat().st_mode & 0o777:o}" for path in paths if path.stat().st_mode & 0o077]


@pytest.fixture
def first_start(make_liminal, tmp_path):
    """One that `chat` started in a folder that was not there, under umask 0, and used once."""
    before = os.umask(0)
    try:
        liminal = make_liminal(LIMINAL_DATA=tmp_path / "new" / "data", LIMINAL_URL=None, LIMINAL_DOMAIN_URL=None)
        done = liminal.cli("chat", "-m", "openai/say-3-0", "hello")
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    yield tmp_path / "new" / "data"
    liminal.cli("down")


def test_first_start_leaves_nothing_open(first_start):
    found = {path.name for path in first_start.iterdir()}
    expected = {
        "liminal.db",
        "messages.db",
        "cli.key",
        "edge_private_key.pem",
        "edge_public_key.pem",
        "domain.log",
        "edge.log",
    }
    assert expected <= found and open_to_others(first_start) == []
