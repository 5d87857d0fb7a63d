"""The commands around a running reply, as a script and a second terminal use them: runs, attach, stop, retry, overflow,
stats, the measurements of a chat, and `test`, which breaks a running system on purpose."""

import json
import re
import subprocess
import sys
from contextlib import closing

import pytest

from conftest import ROOT, status
from test_cli import good, newest, one_line, process_of, read_until, tokens
from test_cli import running as command
from test_resume import Proxy, begin
from test_streams import eventually, get

HOPS = ("client", "edge", "domain", "provider")


@pytest.fixture
def quiet(shared):
    """The shared installation, with no reply being generated."""
    for run in runs(shared):
        status(shared.api("POST", f"/api/v1/messages/{run['message_id']}/cancel"), 200)
    return shared


def runs(liminal) -> list[dict]:
    return status(liminal.api("GET", "/api/v1/runs"), 200)["runs"]


def begun(liminal, model="openai/gate-20-5", gates=1) -> str:
    """The message id of a reply in the background that stands at its gate, its first 5 tokens received."""
    message_id = begin(liminal, model)
    liminal.provider.wait_gate(gates)
    eventually(lambda: get(liminal, message_id)["content"] == tokens(5))
    return message_id


def threads(liminal) -> list[str]:
    return [one["id"] for one in status(liminal.api("GET", "/api/v1/threads?limit=200"), 200)["threads"]]


################ runs, attach, stop, retry


def test_runs_lists_what_is_being_generated(quiet):
    assert good(quiet.cli("runs")) == ""
    message_id = begun(quiet)
    [line] = good(quiet.cli("runs")).splitlines()
    assert line.split()[:4] == [message_id[:8], "openai/gate-20-5", "at", str(len(tokens(5)))]


def test_attach_follows_the_newest_running_reply_from_its_beginning(quiet):
    begun(quiet), begun(quiet, "openai/gate-9-5", gates=2)
    with command(quiet, "attach") as process:
        first = read_until(process.stdout, b" t4")
        quiet.provider.open_gate()
        out, err = process.communicate(timeout=20)
    assert ((first + out).decode(), err, process.returncode) == (tokens(9) + "\n", b"", 0)


def test_attach_from_now_prints_only_what_comes_later(quiet):
    message_id = begun(quiet)
    with command(quiet, "attach", message_id[:8], "--from-now") as process:
        eventually(lambda: "liminal_clients 1" in quiet.client.get("/metrics").text)
        quiet.provider.open_gate()
        out, err = process.communicate(timeout=20)
    assert (out.decode(), err, process.returncode) == (tokens(20, 5) + "\n", b"", 0)


def test_attach_to_a_finished_reply_shows_it_whole(quiet):
    message_id = quiet.send("x", model="openai/say-7-0")[0].data["message_id"]
    assert good(quiet.cli("attach", message_id[:8])) == good(quiet.cli("attach")) == tokens(7) + "\n"


@pytest.mark.slow
def test_attach_from_now_to_a_finished_reply_shows_nothing(quiet):
    quiet.send("x", model="openai/say-7-0")
    assert good(quiet.cli("attach", "--from-now")).strip() == ""


@pytest.mark.slow
def test_attach_to_a_reply_that_failed_says_why(quiet):
    quiet.send("x", model="openai/say-20-0-err@5")
    run = quiet.cli("attach")
    assert (run.returncode, run.stdout) == (1, tokens(5) + "\n") and "provider_" in run.stderr


@pytest.mark.slow
def test_attach_to_nothing_is_one_line(quiet):
    one_line(quiet.cli("attach", "00000000"), 1, "not_found")


def test_stop_from_another_terminal_ends_a_chat_that_says_so(quiet):
    with command(quiet, "chat", "hi", "-m", "openai/gate-20-5") as process:
        first = read_until(process.stdout, b" t4")
        receipt = good(quiet.cli("stop"))
        out, err = process.communicate(timeout=20)
    assert (first + out).decode() == tokens(5) + "\n" and b"was cancelled" in err and process.returncode == 130
    assert receipt.startswith("stopped: ") and newest(quiet)[-1]["id"][:8] in receipt and not runs(quiet)
    quiet.provider.wait_closed()


@pytest.mark.slow
def test_stop_takes_a_prefix(quiet):
    first, _ = begun(quiet), begun(quiet, gates=2)
    assert first[:8] in good(quiet.cli("stop", first[:8]))
    assert get(quiet, first)["status"] == "cancelled" and first not in [run["message_id"] for run in runs(quiet)]


def test_stop_with_nothing_running_is_one_line(quiet):
    one_line(quiet.cli("stop"), 1, "no reply is being generated")


@pytest.mark.slow
def test_stop_of_a_finished_reply_says_how_it_ended(quiet):
    message_id = quiet.send("x", model="openai/say-7-0")[0].data["message_id"]
    assert good(quiet.cli("stop", message_id[:8])).startswith("complete: ")


@pytest.mark.slow
def test_retry_takes_the_newest_reply_and_its_model(quiet):
    quiet.send("x", model="openai/say-7-0")
    assert good(quiet.cli("retry")) == tokens(7) + "\n"
    assert [one["model"] for one in newest(quiet)] == [None, "openai/say-7-0", "openai/say-7-0"]


def test_retry_takes_another_model_and_a_prefix(quiet):
    message_id = quiet.send("x", model="openai/say-7-0")[0].data["message_id"]
    quiet.send("another thread", model="openai/echo")
    assert good(quiet.cli("retry", message_id[:8], "-m", "openai/say-3-0")) == tokens(3) + "\n"
    found = newest(quiet)
    assert [one["model"] for one in found[1:]] == ["openai/say-7-0", "openai/say-3-0"]
    assert found[2]["parent_id"] == found[0]["id"]


@pytest.mark.slow
def test_retry_that_fails_is_status_1(quiet):
    quiet.send("x", model="openai/say-7-0")
    run = quiet.cli("retry", "-m", "openai/say-20-0-end@4")
    assert (run.returncode, run.stdout) == (1, tokens(4) + "\n") and "provider_incomplete" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [["attach"], ["retry"], ["stop"]], ids=lambda words: words[0])
def test_without_any_reply_it_is_one_line(liminal, words):
    one_line(liminal.cli(*words), 1, "not_found")


################ overflow, stats


def test_overflow_of_nothing(quiet):
    eventually(lambda: not status(quiet.api("GET", "/api/v1/overflow"), 200)["waiting"])
    assert re.match(r"0 in the queue, 0 in overflow.db, \d+ left to the Domain\n", good(quiet.cli("overflow")))
    found = json.loads(good(quiet.cli("overflow", "--json")))
    assert (found["waiting"], found["queue"], found["overflow"]) == ([], 0, 0)


@pytest.mark.slow
def test_overflow_shows_what_waits_for_a_domain_that_is_away(liminal):
    message_id = begun(liminal, "openai/gate-20-5")
    liminal.kill("domain")
    found = eventually(lambda: json.loads(good(liminal.cli("overflow", "--json")))["waiting"])
    found = eventually(
        lambda: [o for o in json.loads(good(liminal.cli("overflow", "--json")))["waiting"] if o["tries"] > 1]
    )
    assert {one["message_id"] for one in found} == {message_id} and found[0]["where"] == "overflow"
    first, *_, last = good(liminal.cli("overflow")).splitlines()
    assert first.split()[:3] == [message_id[:8], "at", str(found[0]["position"])] and first.endswith(" overflow")
    assert last.startswith(f"0 in the queue, {len(found)} in overflow.db") and float(first.split()[3]) > 0
    liminal.start("domain")
    eventually(lambda: not json.loads(good(liminal.cli("overflow", "--json")))["waiting"])


def test_stats_as_json_are_those_of_the_api(quiet):
    quiet.send("x", model="openai/say-60-0")
    eventually(lambda: not status(quiet.api("GET", "/api/v1/overflow"), 200)["waiting"])
    found = json.loads(good(quiet.cli("stats", "--json")))
    assert found == status(quiet.api("GET", "/api/v1/stats"), 200)


@pytest.mark.slow
def test_stats_for_people_name_each_figure(quiet):
    quiet.send("x", model="openai/say-60-0")
    out = good(quiet.cli("stats"))
    for words in (
        "ttft provider",
        "ttft domain",
        "ttft edge",
        "client bundles",
        "database bundles",
        "queue",
        "tokens per s",
    ):
        assert words in out
    [row] = [line.split() for line in out.splitlines() if line.startswith("openai/say-60-0 ")]
    [model] = [
        one for one in status(quiet.api("GET", "/api/v1/stats"), 200)["models"] if one["model"] == "openai/say-60-0"
    ]
    assert row[1:5] == [str(model[name]) for name in ("runs", "errors", "input_tokens", "output_tokens")]


################ What a chat measures


@pytest.mark.slow
def test_a_measured_chat_ends_with_a_table_on_standard_error(quiet):
    run = quiet.cli("chat", "hi", "-m", "openai/say-40-200", "--measure-ttft", "--measure-token-rate")
    rows = dict(re.split(r"\s{2,}|\s(?=\S+$)", line, maxsplit=1) for line in run.stderr.splitlines())
    assert (run.returncode, run.stdout) == (0, tokens(40) + "\n")
    assert all(float(rows[f"ttft {hop} ms"]) > 0 for hop in HOPS), run.stderr
    assert float(rows["tokens per s"]) <= 400 and int(rows["bundles"]) >= 3 and float(rows["longest gap ms"]) > 0


def test_a_measured_chat_as_json_ends_with_its_measure(quiet):
    run = quiet.cli("chat", "hi", "-m", "openai/say-40-200", "--measure-ttft", "--measure-token-rate", "--json")
    *events, done, measure = map(json.loads, good(run).splitlines())
    texts = [event["text"] for event in events if event["type"] == "text"]
    assert (events[0]["type"], done["type"], measure["type"]) == ("start", "done", "measure")
    assert "".join(texts) == tokens(40) and measure["bundles"] == len(texts)
    assert measure["characters_per_bundle"] == pytest.approx(len(tokens(40)) / len(texts), abs=0.06)
    hops = [measure[f"ttft_{hop}_ms"] for hop in HOPS]
    assert hops[1:] == [done["timing"][f"{hop}_ttft_ms"] for hop in HOPS[1:]] and hops == sorted(hops, reverse=True)


@pytest.mark.slow
def test_a_chat_measures_only_what_is_asked_for(quiet):
    run = quiet.cli("chat", "hi", "-m", "openai/say-5-0", "--measure-ttft", "--json")
    assert set(json.loads(good(run).splitlines()[-1])) == {"type", *(f"ttft_{hop}_ms" for hop in HOPS)}


@pytest.mark.slow
def test_a_measured_chat_of_a_failed_reply_is_no_traceback(quiet):
    run = quiet.cli("chat", "hi", "-m", "openai/say-5-0-s401@0", "--measure-ttft", "--measure-token-rate")
    assert run.returncode == 1 and "provider_auth" in run.stderr and "Traceback" not in run.stderr


################ A chat whose connection drops


@pytest.mark.slow
def test_a_chat_whose_connection_drops_reconnects_and_says_so(shared):
    with closing(Proxy(shared.edge)) as proxy, command_at(shared, proxy.url) as process:
        out = read_until(process.stdout, b" t24")
        proxy.cut()
        assert b"reconnecting" in process.stderr.readline()
        shared.provider.open_gate()
        rest, err = process.communicate(timeout=20)
    assert ((out + rest).decode(), err, process.returncode) == (tokens(60) + "\n", b"", 0)


@pytest.mark.slow
def test_a_chat_whose_answer_is_lost_sends_no_second_message(shared):
    with closing(Proxy(shared.edge)) as proxy:
        proxy.lose("POST /api/v1/messages ", 1)
        with command_at(shared, proxy.url, "openai/say-9-0") as process:
            out, err = process.communicate(timeout=20)
    assert out.decode() == tokens(9) + "\n" and err.count(b"reconnecting") == 1 and len(newest(shared)) == 2
    assert len(shared.provider.requests) == 1


def command_at(liminal, url, model="openai/gate-60-25"):
    """A chat that reaches the Edge through the proxy."""
    words = ["env", f"LIMINAL_URL={url}", sys.executable, ROOT / "liminal.py", "chat", "hi", "-m", model]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, env=liminal.env, cwd=liminal.home, **pipes)


################ test concurrent, test network


def test_concurrent_finds_nothing_wrong_and_leaves_nothing(quiet):
    before = threads(quiet)
    words = ["--sessions", "8", "--messages", "2", "--json", "-m", "demo/load-60-0"]
    found = json.loads(good(quiet.cli("test", "concurrent", *words)))
    assert (found["faults"], found["messages"], found["tokens"]) == ([], 16, 960)
    assert 0 < found["ttft_p50_ms"] <= found["ttft_p95_ms"] <= found["ttft_p99_ms"] and threads(quiet) == before
    assert found["tokens_per_s"] > 0 and found["longest_gap_ms"] >= 0


@pytest.mark.slow
def test_concurrent_shows_a_table(quiet):
    out = good(quiet.cli("test", "concurrent", "--sessions", "2", "-m", "openai/say-20-0"))
    assert re.search(r"(?m)^messages +2$", out) and re.search(r"(?m)^ttft p99 ms +[\d.]+$", out)


@pytest.mark.slow
def test_concurrent_with_a_failing_model_is_wrong(quiet):
    before = threads(quiet)
    run = quiet.cli("test", "concurrent", "--sessions", "2", "-m", "openai/say-20-0-err@5")
    assert run.returncode == 1 and run.stdout.count("WRONG: ") == 2 and "error" in run.stdout
    assert threads(quiet) == before


@pytest.mark.slow
def test_concurrent_with_a_model_that_is_not_there_is_wrong(quiet):
    run = quiet.cli("test", "concurrent", "--sessions", "2", "-m", "nobody/none", "--json")
    assert run.returncode == 1 and len(json.loads(run.stdout)["faults"]) == 2


def test_network_drops_resumes_and_finds_nothing_wrong(quiet):
    before = threads(quiet)
    words = ["--simulate-disconnect", "--at-token", "20", "--times", "3", "-m", "demo/load-100-400", "--json"]
    found = json.loads(good(quiet.cli("test", "network", *words)))
    assert (found["drops"], found["status"], found["faults"]) == (3, "complete", [])
    assert found["characters"] == len(tokens(100)) and threads(quiet) == before


@pytest.mark.slow
def test_network_with_a_reply_too_short_is_wrong(quiet):
    run = quiet.cli("test", "network", "--times", "3", "-m", "demo/load-30-400")
    assert run.returncode == 1 and "WRONG: " in run.stdout and "--at-token" in run.stdout


def test_network_with_a_reply_that_fails_is_wrong(quiet):
    before = threads(quiet)
    run = quiet.cli("test", "network", "-m", "openai/say-60-200-err@50")
    assert run.returncode == 1 and "WRONG: " in run.stdout, run.stdout
    assert threads(quiet) == before


@pytest.mark.slow
def test_a_progress_bar_is_shown_on_a_terminal(quiet):
    terminal = quiet.terminal("test", "concurrent", "--sessions", "2", "--messages", "2", "-m", "demo/load-60-100")
    terminal.expect(re.compile(r"\[[# ]{30}\] \d/4"))
    terminal.expect("messages")
    assert terminal.wait(20) == 0


def test_without_yes_and_a_terminal_nothing_is_killed(quiet):
    for name in ("edge", "domain"):
        one_line(quiet.cli("test", "network", "--kill", name, input="y\n"), 1, "nothing was done", "-y")
        assert quiet.servers[name].process.poll() is None


def test_a_server_that_runs_elsewhere_is_not_killed(quiet, tmp_path):
    env = {"LIMINAL_DATA": str(tmp_path), "LIMINAL_API_KEY": quiet.key}
    one_line(quiet.cli("test", "network", "--kill", "edge", "-y", env=env), 1, str(tmp_path), "nothing to kill")
    assert quiet.servers["edge"].process.poll() is None


@pytest.mark.slow
def test_the_server_of_this_folder_is_not_killed_for_a_test_of_another(quiet, liminal):
    env = {"LIMINAL_URL": quiet.edge, "LIMINAL_API_KEY": quiet.key}
    run = liminal.cli("test", "network", "--kill", "edge", "-y", "-m", "demo/load-60-100", env=env)
    assert run.returncode == 1 and liminal.servers["edge"].process.poll() is None, (run.stdout, run.stderr)


@pytest.fixture
def plain(make_liminal):
    """An installation as people have it, started by its first command."""
    liminal = make_liminal(LIMINAL_URL=None)
    good(liminal.cli("up"))
    return liminal


@pytest.mark.slow
@pytest.mark.parametrize("name, ends", [("edge", "complete"), ("domain", "error")])
def test_network_kills_a_server_and_finds_nothing_wrong(plain, name, ends):
    before = process_of(plain, name)
    run = plain.cli(
        "test", "network", "--kill", name, "-y", "--times", "2", "-m", "demo/load-200-100", "--json", timeout=60
    )
    found = json.loads(run.stdout or "null")
    assert (run.returncode, found["faults"], found["status"], found["drops"]) == (0, [], ends, 2), run.stderr
    assert process_of(plain, name) != before and threads(plain) == []


@pytest.mark.slow
def test_network_asks_on_a_terminal_before_it_kills(plain):
    before = process_of(plain, "edge")
    no = plain.terminal("test", "network", "--kill", "edge")
    no.expect(f"process {before}? [y/N] ")
    no.send("\r")
    no.expect("nothing was done")
    assert no.wait() == 1 and process_of(plain, "edge") == before
    yes = plain.terminal("test", "network", "--kill", "edge", "-m", "demo/load-200-100")
    yes.expect("[y/N] ")
    yes.send("y\r")
    yes.expect("sha256", 30)
    assert yes.wait(20) == 0 and process_of(plain, "edge") != before
