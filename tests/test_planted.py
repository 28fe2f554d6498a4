"""The table of planted faults keeps up with the code; the faults themselves are planted by `support/planted.py`."""

import pytest
from planted import ROOT, place_of, plant
from planted_faults import FAULTS, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_has_its_place(fault):
    assert place_of(fault).count(fault.old) == 1 and fault.new != fault.old
    compile(place_of(fault).replace(fault.old, fault.new), fault.file, "exec")
    assert fault.tests and all((ROOT / test.split("::")[0]).is_file() for test in fault.tests)


def test_names_tell_faults_apart():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25


@pytest.mark.parametrize("times", [0, 2])
def test_old_text_that_is_not_there_once_is_an_error(tmp_path, times):
    (tmp_path / "module.py").write_text("x = 1\n" * times)
    with pytest.raises(ValueError, match=f"'slip'.* stands {times} times in module.py"):
        plant(Fault("slip", "module.py", "x = 1", "x = 2", ()), tmp_path)
    assert (tmp_path / "module.py").read_text() == "x = 1\n" * times


def test_a_fault_is_planted(tmp_path):
    (tmp_path / "module.py").write_text("x = 1\ny = 1\n")
    plant(Fault("slip", "module.py", "x = 1", "x = 2", ()), tmp_path)
    assert (tmp_path / "module.py").read_text() == "x = 2\ny = 1\n"
