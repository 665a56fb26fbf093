"""AdaMerging's step by several real processes: the numbers of one process, from the rows that each has read itself."""

import sys

import adamerging_steps
import numpy as np
import pytest
from processes import check_success, run_processes
from support import ONE_DEVICE

PROCESSES = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, np.ndarray]]:
    """What each process tells; of three layers one of them has none."""
    root = tmp_path_factory.mktemp("steps")
    check_success(
        run_processes(PROCESSES, [sys.executable, adamerging_steps.__file__, str(root / "found")], timeout=600)
    )
    return [dict(np.load(root / f"found-{process}.npz")) for process in range(PROCESSES)]


@pytest.fixture(scope="module")
def wanted() -> dict[str, np.ndarray]:
    return adamerging_steps.steps(ONE_DEVICE)


@pytest.mark.slow
def test_entropies_and_the_gradient_of_four_processes_are_those_of_one(found, wanted):
    assert np.abs(wanted["gradient"]).max() > 1e-3
    for of_process in found:
        np.testing.assert_allclose(of_process["entropies"], wanted["entropies"], rtol=1e-6)
        np.testing.assert_allclose(of_process["gradient"], wanted["gradient"], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(of_process["gradient"], found[0]["gradient"])


@pytest.mark.slow
def test_a_process_reads_and_holds_its_rows_only(found, wanted):
    for of_process in found:
        assert of_process["share of q_proj"] == 1 / PROCESSES
        assert (of_process["bytes read"] < 0.3 * wanted["bytes read"]).all(), (
            "a quarter, and norms, which all have whole"
        )
