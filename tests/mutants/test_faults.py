"""The list of faults is one that can still be planted; `make mutants` plants them."""

from pathlib import Path

import pytest
from mutants.faults import FAULTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_can_be_planted(fault):
    text = (ROOT / "paec_kernels" / fault.file).read_text()
    assert text.count(fault.old) == 1
    assert fault.new != fault.old
    compile(text.replace(fault.old, fault.new), fault.file, "exec")
    for path in fault.tests.split(", "):
        file, _, test = path.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / "tests" / file).read_text()


def test_names_differ():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
