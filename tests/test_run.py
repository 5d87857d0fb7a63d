"""run.sh: from any folder, installs once and again when pyproject.toml changes, and says clearly what it lacks."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from conftest import ROOT, free_ports

PIP = '#!/bin/sh\n[ "$1" = "${0%/*}/../../liminal.py" ] && exec PYTHON "$@"\n[ "$3" = --version ] || echo "$@" >> "${0%/*}/calls"\n'
LIMINAL = '#!/bin/sh\nexec PYTHON "${0%/*}/../../liminal.py" "$@"\n'
STUB = '#!/bin/sh\necho "$@" >> "$0.calls"\ncase "$*" in *REFUSED*) exit 1;; esac\n'


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("PYTHON", sys.executable))
    path.chmod(0o755)
    return path


class Checkout:
    """A copy of the checkout in a folder with spaces; its .venv has a pip that only notes what it was asked."""

    def __init__(self, folder: Path):
        self.folder = folder / "a folder with spaces" / "my checkout"
        self.folder.mkdir(parents=True)
        for path in ROOT.iterdir():
            if path.is_file() and path.name != ".git":  # a file in a linked work tree
                shutil.copy(path, self.folder)
        self.venv, self.project = self.folder / ".venv", self.folder / "pyproject.toml"
        self.run_sh, self.home = self.folder / "run.sh", folder
        edge, domain = free_ports(2)
        ports = {"LIMINAL_EDGE_PORT": str(edge), "LIMINAL_DOMAIN_PORT": str(domain)}
        self.env = {"PATH": os.environ["PATH"], "HOME": str(folder), **ports}

    def fake_venv(self) -> "Checkout":
        script(self.venv / "bin/python", PIP)
        script(self.venv / "bin/liminal", LIMINAL)
        return self

    def installed(self, *marks: str) -> "Checkout":
        for mark in marks:
            shutil.copy(self.project, self.venv / mark)
        return self

    def run(self, *args, run_sh=None, timeout=30, cwd=None, **env) -> subprocess.CompletedProcess:
        command, env = [run_sh or self.run_sh, *args], {**self.env, **env}
        options = {"env": env, "cwd": cwd or self.home, "capture_output": True, "text": True, "timeout": timeout}
        return subprocess.run(command, stdin=subprocess.DEVNULL, **options)

    @property
    def calls(self) -> list[str]:
        """What the .venv's python was asked to do."""
        path = self.venv / "bin/calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path).fake_venv().installed("installed")


def assert_one_line(run, *words):
    assert run.returncode == 1 and run.stdout == "" and len(run.stderr.splitlines()) == 1, (run.stdout, run.stderr)
    assert run.stderr.startswith("liminal: ") and all(word in run.stderr for word in words), run.stderr


def test_it_works_from_another_folder_and_a_path_with_spaces(checkout):
    run = checkout.run("--help")
    assert (run.returncode, run.stderr, checkout.calls) == (0, "", []) and "COMMAND" in run.stdout


def test_it_works_through_a_symlinked_folder(checkout, tmp_path):
    (tmp_path / "link").symlink_to(checkout.folder)
    run = checkout.run("--help", run_sh=tmp_path / "link" / "run.sh")
    assert (run.returncode, run.stderr, checkout.calls) == (0, "", []) and "COMMAND" in run.stdout


def test_it_works_by_a_relative_path(checkout):
    assert checkout.run("--help", run_sh="./run.sh", cwd=checkout.folder).returncode == 0


@pytest.mark.parametrize("cdpath", [".", "/tmp"])
def test_a_cdpath_does_not_lead_it_astray(checkout, cdpath):
    run = checkout.run("--help", run_sh="my checkout/run.sh", cwd=checkout.folder.parent, CDPATH=cdpath)
    assert run.returncode == 0 and run.stdout.startswith("usage: ")


def test_arguments_arrive_as_they_are(checkout):
    script(checkout.venv / "bin/liminal", '#!/bin/sh\nprintf "<%s>" "$@"\n')
    assert checkout.run("chat", "two words", "", "*", "$HOME").stdout == "<chat><two words><><*><$HOME>"


def test_its_exit_status_is_that_of_the_command(checkout):
    assert checkout.run("chat", "--nonsense").returncode == 2 and checkout.run("status").returncode == 3


def test_a_second_start_installs_nothing(checkout):
    checkout.run("--help")
    checkout.run("--help")
    assert checkout.calls == []


def test_a_changed_pyproject_installs_again_once(checkout):
    checkout.project.write_text(checkout.project.read_text() + "# changed\n")
    runs = [checkout.run("--help"), checkout.run("--help")]
    [call] = checkout.calls
    assert "pip install" in call and call.endswith(f"-e {checkout.folder}")
    assert "installing" in runs[0].stderr and "installing" not in runs[0].stdout and runs[1].stderr == ""


def test_without_a_mark_it_installs_into_the_venv_that_is_there(checkout):
    (checkout.venv / "installed").unlink()
    assert checkout.run("--help").returncode == 0
    assert len(checkout.calls) == 1 and (checkout.venv / "installed").read_text() == checkout.project.read_text()


def test_a_failed_installation_is_tried_again(checkout):
    (checkout.venv / "installed").unlink()
    script(checkout.venv / "bin/python", '#!/bin/sh\n[ "$3" = --version ]\n')
    run = checkout.run("--help")
    assert run.returncode == 1 and run.stdout == "" and run.stderr.splitlines()[-1].startswith("liminal: ")
    checkout.fake_venv()
    assert checkout.run("--help").returncode == 0 and len(checkout.calls) == 1


def test_check_installs_the_test_packages_and_runs_pytest(checkout):
    assert checkout.run("check", "--all", "-k", "a b").returncode == 0
    install, tests = checkout.calls
    assert (
        install.endswith(f"-e {checkout.folder}[test]") and tests == "-m pytest -q -n 4 --dist worksteal --all -k a b"
    )


def test_check_installs_once(checkout):
    for _ in range(2):
        checkout.run("check")
    assert len(checkout.calls) == 3 and sum("pip install" in call for call in checkout.calls) == 1


def test_after_check_a_plain_start_installs_nothing(checkout):
    (checkout.venv / "installed").unlink()
    checkout.run("check")
    checkout.run("--help")
    assert sum("pip install" in call for call in checkout.calls) == 1


def test_a_plain_start_after_a_change_leaves_the_test_packages_to_check(checkout):
    checkout.installed("installed-test")
    checkout.project.write_text(checkout.project.read_text() + "# changed\n")
    checkout.run("--help")
    checkout.run("check")
    assert [call.endswith("[test]") for call in checkout.calls if "pip install" in call] == [False, True]


def test_the_test_packages_are_an_extra_of_that_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(package.startswith("pytest") for package in project["optional-dependencies"]["test"])
    assert project["requires-python"] == ">=3.11" and project["scripts"]["liminal"] == "liminal:main"


def test_a_python_that_is_too_old_is_one_line(tmp_path):
    python = script(tmp_path / "bin" / "old", STUB.replace("REFUSED", "version_info"))
    assert_one_line(Checkout(tmp_path).run("--help", **{"PYTHON": str(python)}), "3.11", str(python))


def test_a_python_that_is_not_there_is_one_line(tmp_path):
    assert_one_line(Checkout(tmp_path).run("--help", **{"PYTHON": "/no/such/python"}), "3.11", "/no/such/python")


def test_a_python_without_venv_is_one_line(tmp_path):
    python = script(tmp_path / "bin" / "bare", STUB.replace("REFUSED", "ensurepip"))
    assert_one_line(Checkout(tmp_path).run("--help", **{"PYTHON": str(python)}), "venv", "python3-venv")


def test_a_python_named_by_its_variable_makes_the_venv(tmp_path):
    checkout = Checkout(tmp_path)
    python = script(tmp_path / "my bin" / "good", STUB + f'[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" \nexit 0\n')
    checkout.run("--help", **{"PYTHON": str(python)})
    assert Path(f"{python}.calls").read_text().splitlines()[-1] == f"-m venv --clear {checkout.venv}"


def test_a_venv_that_broke_off_half_made_is_made_again(tmp_path):
    """Ctrl-C while the .venv is made leaves a python without pip."""
    checkout, python = Checkout(tmp_path).fake_venv(), script(tmp_path / "good", STUB)
    script(checkout.venv / "bin/python", "#!/bin/sh\necho No module named pip >&2\nexit 1\n")
    checkout.run("--help", **{"PYTHON": str(python)})
    assert "-m venv" in Path(f"{python}.calls").read_text()


def index_answers(folder: Path) -> bool:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", folder, "pyjwt"]
    return subprocess.run(command, capture_output=True, timeout=120).returncode == 0


@pytest.mark.slow
def test_a_fresh_machine_needs_one_command(tmp_path):
    if not index_answers(tmp_path / "probe"):
        pytest.skip("the package index cannot be reached")
    checkout = Checkout(tmp_path)
    checkout.env = {**os.environ, **checkout.env, "PYTHON": sys.executable}
    run = checkout.run("status", timeout=600)
    assert run.returncode == 3 and "liminal up" in run.stdout and "installing" in run.stderr, run.stderr
    assert checkout.run("status").stderr == "" and checkout.run("--version").stdout.startswith("liminal ")
