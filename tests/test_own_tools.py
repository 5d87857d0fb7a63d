"""Our own tools: what can be read lies under the roots and outside of data/, whatever a path says and whoever swaps it.

Order: reading, what is outside, what is no text, listing and searching, several roots, messages.
"""

import os
import re
import socket
import threading
from contextlib import closing

import pytest

from conftest import Liminal, status, with_provider
from provider import Provider
from tool_servers import call

slow = pytest.mark.slow
SECRET = "no tool may read this"


@pytest.fixture(scope="module")
def rooted_liminal(tmp_path_factory):
    """Roots `one` (which holds data/) and `two`, and beside them `outside` with a secret."""
    top = tmp_path_factory.mktemp("own")
    for folder in ("one/sub/deep", "two", "outside", "one-more"):
        (top / folder).mkdir(parents=True)
    for file in ("outside/secret.txt", "one-more/secret.txt", "secret.txt"):
        (top / file).write_text(SECRET)
    (top / "two/second.txt").write_text("from the second root")
    with closing(Provider()) as provider:
        roots = f"{top}/one:{top}/two"
        settings = with_provider(provider, {"LIMINAL_FILES_ROOT": roots})
        with closing(Liminal(top / "one" / "data", provider, **settings)) as liminal:
            liminal.root = top / "one"
            yield liminal.start()


@pytest.fixture
def rooted(rooted_liminal):
    rooted_liminal.provider.reset()
    (rooted_liminal.root / "a.txt").write_text("first\nsecond\nthird\n")
    (rooted_liminal.root / "sub/deep/b.md").write_text("Needle in B\n")
    yield rooted_liminal
    rooted_liminal.check_logs()


def use(liminal: Liminal, tool: str, *, fails=False, **arguments) -> str:
    result = call(liminal, f"liminal__{tool}", arguments)
    assert result["is_error"] == fails and SECRET not in result["text"], result["text"]
    return result["text"]


################ Reading


def test_a_file_is_read(rooted):
    assert use(rooted, "file_read", path="a.txt") == "first\nsecond\nthird\n"
    assert use(rooted, "file_read", path="./sub//deep/b.md") == "Needle in B\n"


@slow
def test_a_file_is_read_by_its_absolute_path_below_a_root(rooted):
    assert use(rooted, "file_read", path=str(rooted.root / "a.txt")) == "first\nsecond\nthird\n"


@slow
def test_some_lines_of_a_file_are_read(rooted):
    assert use(rooted, "file_read", path="a.txt", first_line=2, lines=1) == "second\n"


@slow
@pytest.mark.parametrize("path", ["none.txt", "a.txt/x", "sub", "", ".", "x" * 5000, "a.txt\0"])
def test_what_cannot_be_read_says_why(rooted, path):
    said = use(rooted, "file_read", fails=True, path=path)
    assert re.search("no such file|director|folder|regular file|too long|outside", said), said


################ What is outside

ESCAPES = ["../secret.txt", "sub/../../secret.txt", "{top}/secret.txt", "/etc/passwd", "{root}/../secret.txt"]
ESCAPES += ["{root}-more/secret.txt", "../one-more/secret.txt", "sub/..", "..", "/", "//etc/passwd", "~/secret.txt"]
ESCAPES += ["link/secret.txt", "link", "file", "sub/loop", "hard", "data/cli.key", "data", "{root}/data/cli.key"]
ESCAPES += ["sub/../data/cli.key", "DATA/cli.key", "data/./cli.key", "data//messages.db", "todata/cli.key"]


@pytest.mark.parametrize("path", [pytest.param(one, marks=slow if n % 9 else []) for n, one in enumerate(ESCAPES)])
def test_no_path_leads_out_of_the_roots_or_into_data(rooted, path):
    root = rooted.root
    links = {"link": "../outside", "file": "../outside/secret.txt", "sub/loop": "loop", "todata": "data"}
    for name, target in links.items():
        (root / name).is_symlink() or (root / name).symlink_to(target)
    (root / "hard").exists() or os.link(root / "data/cli.key", root / "hard")
    path = path.format(root=root, top=root.parent)
    for tool, arguments in (("file_read", {}), ("file_list", {}), ("file_search", {"text": "l"})):
        result = call(rooted, f"liminal__{tool}", {"path": path, **arguments})
        assert result["is_error"] or result["text"] == "nothing found", result["text"]


@slow
def test_a_search_of_everything_finds_nothing_of_data_or_outside(rooted):
    (rooted.root / "link").is_symlink() or (rooted.root / "link").symlink_to("../outside")
    (rooted.root / "hard").exists() or os.link(rooted.root / "data/cli.key", rooted.root / "hard")
    (rooted.root / "asking").mkdir(exist_ok=True)
    assert use(rooted, "file_search", text="lt_sk") == "nothing found"
    assert use(rooted, "file_search", text="no tool may") == "nothing found"


def test_a_hard_link_into_a_folder_of_data_is_not_read(rooted):
    inner = rooted.data / "inner"
    inner.mkdir(exist_ok=True)
    (inner / "key").write_text(SECRET)
    (rooted.root / "harder").exists() or os.link(inner / "key", rooted.root / "harder")
    use(rooted, "file_read", fails=True, path="harder")


@slow
@pytest.mark.parametrize("attack", ["folder", "file"])
def test_a_swap_between_check_and_use_leads_nowhere(rooted, attack):
    """A thread flips a folder (or a file) and a symbolic link to the secret, as fast as it can."""
    place, spare, link = (rooted.root / name for name in (f"flip-{attack}", f"spare-{attack}", f"lure-{attack}"))
    (
        (spare.mkdir(), (spare / "secret.txt").write_text("harmless"))
        if attack == "folder"
        else spare.write_text("harmless")
    )
    link.symlink_to("../outside" if attack == "folder" else "../outside/secret.txt")
    stop, flips = threading.Event(), []

    def flip():
        while not stop.is_set():
            for one in (spare, link):
                os.rename(one, place)
                os.rename(place, one)
                flips.append(one)

    thread = threading.Thread(target=flip)
    thread.start()
    path = f"{place.name}/secret.txt" if attack == "folder" else place.name
    said = "\n".join(f'CALL liminal__file_{tool} {{"path": "{path}"}}' for tool in ["read"] * 40)
    texts = [
        event.data["text"] for _ in range(5) for event in rooted.send(said, model="openai/echo") if "text" in event.data
    ]
    stop.set()
    thread.join()
    assert len(flips) > 100 and len(texts) > 200 and "harmless" in texts
    assert not [one for one in texts if SECRET in one]


@slow
def test_data_is_not_readable_even_as_the_root(make_liminal, tmp_path):
    liminal = make_liminal(LIMINAL_FILES_ROOT=str(tmp_path / "data0")).start()
    for tool, arguments in (("file_read", {"path": "cli.key"}), ("file_list", {}), ("file_search", {"text": "lt_sk"})):
        result = call(liminal, f"liminal__{tool}", arguments)
        assert liminal.key not in result["text"] and "cli.key" not in result["text"].replace("'cli.key'", ""), result
        assert result["is_error"] or result["text"] == "nothing found"


@slow
def test_a_root_within_data_is_not_readable(make_liminal, tmp_path):
    inner = tmp_path / "data0" / "inner"
    inner.mkdir(parents=True)
    (inner / "secret.txt").write_text(SECRET)
    liminal = make_liminal(LIMINAL_FILES_ROOT=str(inner)).start()
    assert SECRET not in call(liminal, "liminal__file_read", {"path": "secret.txt"})["text"]
    assert SECRET not in call(liminal, "liminal__file_search", {"text": "may read"})["text"]


################ What is no text


def make_socket(path):
    old = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(old)


ODD_FILES = {"fifo": os.mkfifo, "socket": make_socket}


@slow
@pytest.mark.parametrize("kind", ODD_FILES)
def test_what_is_no_regular_file_is_refused_and_does_not_hang(rooted, kind):
    place = rooted.root / f"odd-{kind}"
    place.exists() or ODD_FILES[kind](place)
    use(rooted, "file_read", fails=True, path=place.name)
    assert use(rooted, "file_search", text="Needle").count("\n") == 0


@slow
def test_a_device_is_refused(make_liminal):
    liminal = make_liminal(LIMINAL_FILES_ROOT="/dev").start()
    assert use(liminal, "file_read", fails=True, path="zero")


def test_a_binary_file_is_told_apart_with_its_size(rooted):
    (rooted.root / "bin").write_bytes(b"\x89PNG\0\1\2")
    assert "binary" in (said := use(rooted, "file_read", fails=True, path="bin")) and "7 bytes" in said


@slow
def test_text_that_is_not_utf_8_is_read_all_the_same(rooted):
    (rooted.root / "latin").write_bytes("für".encode("latin-1"))
    assert use(rooted, "file_read", path="latin") == "f\ufffdr"


@slow
def test_a_huge_file_is_bounded_and_says_what_was_left_out(rooted):
    with open(rooted.root / "huge.txt", "w") as file:
        file.write("0123456789\n" * 1000)
        file.truncate(10 << 30)
    said = use(rooted, "file_read", path="huge.txt")
    (rooted.root / "huge.txt").unlink()
    assert "cut" in said[-300:] and len(said) < 210_000


@slow
def test_later_lines_of_a_long_file_can_be_read(rooted):
    (rooted.root / "long.txt").write_text("".join(f"line {n:06}\n" for n in range(1, 50_001)))
    assert "line 040000" in use(rooted, "file_read", path="long.txt", first_line=40_000, lines=2)


################ Listing and searching


def test_a_folder_is_listed_with_sizes(rooted):
    lines = use(rooted, "file_list").split("\n")
    assert "sub/" in lines and any(line.startswith("a.txt") and line.endswith(" 19") for line in lines)
    assert use(rooted, "file_list", path="sub").split("\n")[0] == "deep/"


@slow
def test_data_is_not_listed_as_a_folder_to_look_into(rooted):
    assert "cli.key" not in use(rooted, "file_list") and use(rooted, "file_list", fails=True, path="data")


def test_a_search_gives_file_line_and_text(rooted):
    assert use(rooted, "file_search", text="nEEDLE") == "sub/deep/b.md:1: Needle in B"
    assert use(rooted, "file_search", text="needle", name="*.txt") == "nothing found"


def test_what_a_search_finds_can_be_read_by_that_path(rooted):
    path, _, _ = use(rooted, "file_search", text="needle", path="sub").split(":")
    found = [one for one in (path, f"sub/{path}") if not call(rooted, "liminal__file_read", {"path": one})["is_error"]]
    assert path in found, f"{path} is not what file_read takes"


@slow
def test_a_search_is_bounded(rooted):
    (rooted.root / "many").mkdir()
    for number in range(30):
        (rooted.root / "many" / f"{number}.txt").write_text("pin\n" * 100)
    said = use(rooted, "file_search", text="pin", path="many").split("\n")
    assert len(said) <= 102 and "more" in said[-1]


################ Several roots


@slow
def test_each_of_several_roots_can_be_read(rooted):
    place = rooted.root.parent / "two"
    assert use(rooted, "file_read", path=f"{place}/second.txt") == "from the second root"
    assert "second.txt" in use(rooted, "file_list", path=str(place))
    assert "second.txt" in use(rooted, "file_search", path=str(place), text="from the")


def test_a_relative_path_is_looked_for_in_every_root(rooted):
    assert use(rooted, "file_read", path="second.txt") == "from the second root"


################ Messages


def test_messages_search_finds_only_the_users_own(rooted):
    user = status(rooted.api("POST", "/api/v1/users", {"name": "other"}), 201)
    other = status(rooted.api("POST", "/api/v1/keys", {"name": "k", "user_id": user["id"]}), 201)["secret"]
    rooted.send("the walrus is mine", model="openai/say-1-0")
    stream = rooted.stream({"content": "the walrus is theirs", "model": "openai/say-1-0"}, key=other)
    rooted.read(stream)
    said = call(rooted, "liminal__messages_search", {"query": "walrus is"})["text"]
    assert "mine" in said and "theirs" not in said


@slow
def test_no_query_of_a_messages_search_is_an_error(rooted):
    for query in ('"', "NEAR(", "*", ""):
        assert not call(rooted, "liminal__messages_search", {"query": query})["is_error"]
