"One thread for each of the processes that share the tests, pipelines for them, and a last line of what was left out"
import os

import pytest

# before torch is imported
os.environ['HF_HUB_OFFLINE'] = '1'
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')
pytest.register_assert_rewrite('commands', 'four_runs', 'oracle')


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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "The tests of a file go to one process, as `--dist loadfile` says, but every notebook by itself"
    if config.getvalue('dist') != 'loadfile': return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid): return nodeid if 'test_notebooks' in nodeid else super()._split_scope(nodeid)

    return ByFile(config, log)


@pytest.fixture(scope='module')
def flux():
    from pipelines import tiny_pipeline
    return tiny_pipeline('tiny-flux')


@pytest.fixture(scope='module')
def sdxl():
    from pipelines import tiny_pipeline
    return tiny_pipeline('tiny-sdxl')


@pytest.fixture(scope='module')
def two_pipes():
    from pipelines import tiny_pipeline
    return [tiny_pipeline('tiny-flux')[0] for _ in range(2)]
