"""The backends that properties are of, and the report of how many inputs each held for."""

import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from fuzz import properties

BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-report", type=Path, help="write what the properties ran to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    report = config.getoption("fuzz_report", default=None)
    if report is not None and not hasattr(config, "workerinput"):  # xdist's workers send theirs to the first process
        config.pluginmanager.register(Report(report, config.getoption("hypothesis_seed")))


class Report:
    """Gathers the properties' reports, of all processes, and writes them at the end."""

    def __init__(self, path: Path, seed: str | None) -> None:
        self.path, self.seed, self.properties = path, seed, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        entry = self.properties.setdefault(
            report.nodeid.partition("fuzz/")[2], {"examples": 0, "informative": 0, "failed": False}
        )
        entry["failed"] |= report.failed
        entry |= dict(report.user_properties)  # those of `_counted`

    def pytest_sessionfinish(self) -> None:
        import paec_kernels  # noqa: F401  the files that the commit in the provenance answers for
        from benchmarks.provenance import provenance

        record = {
            "provenance": provenance() | {"hypothesis": version("hypothesis")},
            "seed": self.seed,
            **{f: sum(entry[f] for entry in self.properties.values()) for f in ("examples", "informative")},
            "failures": sum(entry["failed"] for entry in self.properties.values()),
            "seconds": round(time.monotonic() - BEGAN, 1),
            "properties": dict(sorted(self.properties.items())),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(record, indent=1) + "\n")


@pytest.fixture(autouse=True)
def _counted(record_property) -> Iterator[None]:
    held, informative, began = properties.held, properties.informative, time.process_time()
    yield
    record_property("examples", properties.held - held)
    record_property("informative", properties.informative - informative)
    record_property("cpu_seconds", round(time.process_time() - began, 2))


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both backends on the CPU, Triton's kernels in its interpreter."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    return request.param
