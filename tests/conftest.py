"One thread for each of the processes that share the tests, and a last line that says what was left out"
import os

import pytest

# before torch is imported
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')


class LeftOut:
    "Counts the tests that a marker left out; with several processes each of them counts the same ones"
    def __init__(self): self.count = 0

    def pytest_deselected(self, items): self.count += len(items)

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, 'workeroutput'): session.config.workeroutput['left_out'] = self.count

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        self.count = max(self.count, getattr(node, 'workeroutput', {}).get('left_out', 0))

    def pytest_terminal_summary(self, terminalreporter, config):
        if self.count and config.option.markexpr == 'not slow':
            terminalreporter.write_line(
                f'{self.count} slow tests were left out (more notebooks, the site in a browser, '
                'several processes): pytest -m slow runs them')


def pytest_configure(config): config.pluginmanager.register(LeftOut())
