#!/bin/sh
# Makes .venv once (and again when pyproject.toml changes), then hands everything to liminal. PYTHON names another Python.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
venv="$here/.venv"

install() { # install WHAT MARK: MARK keeps the pyproject.toml that was installed
    cmp -s "$here/pyproject.toml" "$venv/$2" && return
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        { echo "liminal: needs Python 3.11 or later; $python is not. Set PYTHON to one that is." >&2; exit 1; }
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        { echo "liminal: $python lacks venv: install it (Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
    echo "liminal: installing into .venv (once) ..." >&2
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$1" >&2 ||
        { echo "liminal: the packages could not be installed; see above. Try again when the network is there." >&2; exit 1; }
    cp "$here/pyproject.toml" "$venv/installed"
    cp "$here/pyproject.toml" "$venv/$2"
}

if [ "${1:-}" = check ]; then
    shift
    install "$here[test]" installed-test
    cd "$here"
    exec "$venv/bin/python" -m pytest -q -n 4 --dist worksteal "$@" # most of a test is waiting, even on two cores
fi
install "$here" installed
exec "$venv/bin/liminal" "$@"
