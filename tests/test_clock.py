"Which step a call is: interrupted runs of any length after one another, by all that a scheduler may tell"
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies as st

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.pipeline_clock import PipelineClock

from oracle import Oracle, config_of, configs, same_stats
from profiles import examples
from toys import Bang, FakeScheduler, FaultyToy, state_of

pytestmark = pytest.mark.filterwarnings('ignore')

# Clocks: interrupted runs of any length after one another

steps, begins, cuts = st.integers(1, 24), st.integers(0, 5), st.integers(0, 4)      # cut off at the end
orders, branches = st.sampled_from([1, 1, 2]), st.integers(1, 3)
stops, by_faults = st.none() | st.integers(0, 30), st.booleans()                    # where it is interrupted, and how
runs = st.lists(st.tuples(steps, begins, cuts, orders, branches, stops, by_faults), min_size=1, max_size=5)


def name_of(branch, second, named):
    "The context that the engine gives a call: by its name, or by its number within the step"
    name = (f'ctx{branch}' if named else '') + (' 2nd' if second else '')
    return name.strip() + (f'#{branch + 1}' if branch and not named else '')


class ClockedRuns:
    "Runs of a pipeline's scheduler after one another, each call compared with an oracle of its context"
    def __init__(self, toy, config, kind, named, seed):
        self.toy, self.config, self.kind, self.named = toy, config, kind, named
        self.scheduler, self.rng, self.stats = FakeScheduler(kind), np.random.default_rng(seed), []
        self.pipe = SimpleNamespace(scheduler=self.scheduler, config={})
        self.handle = apply_spectrum(self.toy, config, n_steps=5)
        self.handle.hooks[0].clock = PipelineClock(self.pipe, self.toy)
        self.shift = self.given_up = False

    def run(self, n, begin, cut, order, branches, stop, bang):
        if self.kind != 'index': order, begin, cut = 1, begin if self.kind == 'lookup' else 0, cut
        # after its first step a run with the same timesteps might be a tile of it
        if self.given_up: self.shift = not self.shift
        self.scheduler.start(n + begin + cut, begin, order, self.shift)
        self.pipe.num_timesteps = n if cut or begin else None
        oracles = {}
        for i in range(n):
            second = order == 2 and i % 2 == 1
            for branch in range(branches):
                oracle = oracles.setdefault((second, branch), self.oracle_for(n, order, second))
                broken = stop == i and branch == branches - 1
                t = float(self.scheduler.timesteps[begin + i])
                self.call(oracle, branch, name_of(branch, second, self.named), t, 'block1' if broken and bang else None)
            if stop == i: break
            self.scheduler.step(i, begin)
        self.given_up = stop == 0

    def oracle_for(self, n, order, second):
        "The oracle of all first or of all second calls of the steps"
        return Oracle(self.config, n//order, first=-(-n//order)) if second else Oracle(self.config, -(-n//order))

    def call(self, oracle, branch, name, t, bang):
        x = self.rng.integers(-32, 33, (2, 4))/4
        try: want = oracle.call(name, x, torch.float32, t, bang)
        except Bang: want = None
        got, passes = self.ask_toy(branch, x, t, bang)

        assert (got is None) == (want is None)
        if got is not None:
            out, slack, is_pass = want
            assert passes == is_pass
            assert (abs(got.double().numpy() - out) <= slack).all()
        self.stats += oracle.stats
        oracle.stats = []

    def ask_toy(self, branch, x, t, bang):
        "(what the denoiser answers or None where a fuse blew, how many passes that took)"
        before = self.toy.passes
        if bang: self.toy.site(bang).fuse = Bang()
        try:
            with self.toy.cache_context(f'ctx{branch}') if self.named else contextlib.nullcontext():
                got = self.toy(torch.tensor(x, dtype=torch.float32), t)
        except Bang: got = None
        finally: self.toy.blocks[1].fuse = None
        return got, self.toy.passes - before


@examples(150, 1500)
@given(config=configs, runs=runs, kind=st.sampled_from(['index', 'index', 'counter', 'lookup']), named=st.booleans(),
       seed=st.integers(0, 99))
@example(config=(4, .1, .5, 2., .75, 5, None, None),
         runs=[(9, 0, 0, 1, 1, 0, True), (4, 0, 0, 1, 1, None, False), (12, 2, 0, 2, 2, 7, True),
               (20, 0, 0, 1, 2, None, False)], kind='index', named=True, seed=0)
def test_no_history_survives_a_run_however_it_ends(config, runs, kind, named, seed):
    toy = FaultyToy()
    untouched = state_of(toy)
    clocked = ClockedRuns(toy, config_of(config), kind, named, seed)

    for run in runs: clocked.run(*run)

    same_stats(clocked.handle.stats, clocked.stats)
    assert len({id(run.key) for run in clocked.handle.hooks[0].runs.values()}) <= 1
    clocked.handle.remove()
    assert state_of(toy) == untouched
