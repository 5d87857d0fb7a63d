"""The fault run, bounded; `python tests/faults.py --seed N --seconds N` runs it for longer."""

import json

import pytest

from faults import KINDS, run_faults


@pytest.mark.slow
def test_nothing_is_lost_whatever_dies(tmp_path):
    figures, faults = run_faults(tmp_path, seed=7, seconds=80)
    print(json.dumps(figures))
    assert not faults
    assert figures["done"].keys() == KINDS.keys() and figures["replies checked"] > 50 and figures["kills"]["all"] > 10
