"""The shortened form of ``make torture``."""

import re
from pathlib import Path

import pytest

from jobs import spawn

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_few_kills_signals_and_damages_leave_what_they_should(tmp_path: Path) -> None:
    done = spawn("-m", "torture", "--short", cwd=tmp_path, environment={"PYTHONPATH": str(TESTS)})
    assert done.code == 0, done.out + done.err
    counts = re.findall(r"(\d+) of (\d+) (\w+)", done.out.splitlines()[-1])
    assert counts == [("3", "3", "kills"), ("2", "2", "signals"), ("3", "3", "damages")]
