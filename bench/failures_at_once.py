"""A plugin of pytest that names a failed test when it has failed: a run that its time ends early has named them."""

from __future__ import annotations

import pytest


class FailuresAtOnce:
    def __init__(self, config: pytest.Config):
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = str(report.longrepr).splitlines()
            reasons = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")] or lines[-1:]
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line(f"\nFAILED {report.nodeid} ({report.when}) - {' '.join(reasons)[:500]}")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of xdist, whose controller hears of every report
        config.pluginmanager.register(FailuresAtOnce(config))
