"""For pytest in this folder: threads are set before NumPy is imported, and a record holds figures only."""

import pytest
import sizes


@pytest.hookimpl(optionalhook=True)  # only pytest-benchmark has it
def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Leave out every single time, the machine's name and the commit; state what the figures depend on instead."""
    output_json["machine_info"], output_json["commit_info"] = sizes.machine(), {}
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
