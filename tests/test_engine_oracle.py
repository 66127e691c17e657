"The engine against an independent executor in float64: programs of calls and faults, then guidance in one batch"
import contextlib
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.forecast import SteadyLine
from spectrum_nb.plan import make_plan
from spectrum_nb.settings import SpectrumConfig

from oracle import DTYPES, EPS, Oracle, config_of, configs, ratios_of, same_stats, share_of
from profiles import examples
from toys import SITES, Bang, FaultyToy, state_of

pytestmark = pytest.mark.filterwarnings('ignore')

# A denoiser that fails on demand, and its model in float64

SHAPES = ((2, 4), (3, 5), (1,), (1, 64), (2, 8, 16), (7, 64))
kinds = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES))
contexts = st.sampled_from(['', 'cond', 'uncond', 'α/2'])
acts = st.one_of(
    st.tuples(st.just('go'), contexts, st.integers(1, 12)),
    st.tuples(st.just('go'), st.just(''), st.integers(1, 30)),
    st.tuples(st.just('bang'), contexts, st.sampled_from(SITES), st.sampled_from([Bang, KeyboardInterrupt]),
              st.booleans()),
    st.tuples(st.just('nan'), contexts),
    st.tuples(st.just('kind'), kinds),
    st.just(('reset',)),
    st.just(('again',)),
)
programs = st.lists(acts, min_size=1, max_size=20)


class SideBySide:
    "A denoiser under Spectrum and the oracle, called together; whatever comes out is compared"
    def __init__(self, toy, config, n, kind, seed, feature, measure, wide, device):
        self.toy, self.kind, self.wide, self.rng = toy, kind, wide, np.random.default_rng(seed)
        self.apply_both = lambda: (
            apply_spectrum(toy, config, n, feature=feature, history_device=device, measure=measure),
            Oracle(config, n, feature, measure, wide))
        self.untouched = state_of(toy)
        self.handle, self.oracle = self.apply_both()

    def apply_again(self):
        "After removal: nothing is left behind, the statistics are right, and all begins anew"
        assert state_of(self.toy) == self.untouched
        same_stats(self.handle.stats, self.oracle.stats)
        self.handle, self.oracle = self.apply_both()

    def some_input(self, context, nan):
        "(sample, time) of the next call in a context, exact in every type; a sample changes little from step to step"
        shape, _ = self.kind
        base = np.random.default_rng(sum(shape)).integers(-28, 29, shape)
        x = (base + self.rng.integers(-4, 5, shape))/4
        if nan: x.flat[-1] = np.nan
        return x, self.oracle.step(context)/4

    def ask_oracle(self, context, x, t, bang):
        try: return self.oracle.call(context, x, self.kind[1], t, bang)
        except Bang: return None

    def ask_toy(self, context, x, t, bang, error):
        "What the denoiser answers, or None where a fuse blew"
        x = torch.tensor(x, dtype=self.kind[1])
        if bang: self.toy.site(bang).fuse = error('bang')
        try:
            with self.toy.cache_context(context) if context else contextlib.nullcontext():
                by_position = self.rng.random() < .5
                return self.toy(x, t) if by_position else self.toy(timestep=t, hidden_states=x)
        except (Bang, KeyboardInterrupt): return None
        finally:
            if bang: self.toy.site(bang).fuse = None

    def call(self, context, bang=None, error=Bang, nan=False):
        shape, dtype = self.kind
        x, t = self.some_input(context, nan)
        want = self.ask_oracle(context, x, t, bang)
        before = self.toy.blocks[0].runs
        got = self.ask_toy(context, x, t, bang, error)

        assert (got is None) == (want is None)
        if got is None: return
        out, slack, is_pass = want
        assert got.dtype == (torch.float32 if self.wide else dtype)
        assert tuple(got.shape) == shape
        assert self.toy.blocks[0].runs - before == is_pass
        off = got.double().numpy() - out
        assert np.array_equal(np.isnan(got.double().numpy()), np.isnan(out))
        assert (np.nan_to_num(abs(off)) <= slack).all(), (got, out, slack)

    def act(self, what, *args):
        "One act of a program"
        if what == 'go':
            context, times = args
            for _ in range(times): self.call(context)
        elif what == 'nan': self.call(args[0], nan=True)
        elif what == 'kind': self.kind = args[0]
        elif what == 'reset':
            self.handle.reset()
            self.oracle.runs = {}
        elif what == 'again':
            self.handle.remove()
            self.apply_again()
        elif what == 'bang':
            context, site, error, leaves = args
            self.call(context, site, error)
            if leaves:                          # through the exception: remove, and apply again
                with contextlib.suppress(Bang), self.handle: raise Bang
                self.apply_again()


@examples(300, 7500)
@given(config=configs, n=st.integers(1, 30), kind=kinds, program=programs,
       feature=st.sampled_from(['hidden', 'hidden', 'output']), measure=st.booleans(),
       wide=st.booleans(), as_plan=st.booleans(), before=st.sampled_from(['fresh', 'registry', 'patched']),
       device=st.sampled_from(['same', 'cpu']), seed=st.integers(0, 99))
def test_programs_of_calls_and_faults_do_what_the_model_says(
        config, n, kind, program, feature, measure, wide, as_plan, before, device, seed):
    # a tolerance needs measured errors and a plan that can change
    config = config_of(config if measure and not as_plan else (*config[:-1], None))
    if as_plan: config = make_plan(config, n)
    toy = FaultyToy(wide)
    if before == 'registry':
        with toy.cache_context('before'): pass
    if before == 'patched': toy.forward = functools.partial(type(toy).forward, toy)
    both = SideBySide(toy, config, n, kind, seed, feature, measure, wide, device)

    for act in program: both.act(*act)

    same_stats(both.handle.stats, both.oracle.stats)
    both.handle.remove()
    both.handle.remove()
    assert state_of(toy) == both.untouched
    assert torch.equal(toy(torch.ones(2), 1.), torch.full((2,), 8.))


@pytest.mark.parametrize('size', [1, 3])
@pytest.mark.parametrize('dtype', EPS)
def test_guidance_in_one_batch_follows_the_line_as_far_for_both_halves_of_an_image(dtype, size):
    class Guided(FaultyToy):
        def forward(self, hidden_states, timestep, condition): return super().forward(hidden_states + condition, 1.)

    n, rng = 40, np.random.default_rng(size)
    toy, oracle, line, shares = Guided(), Oracle(SpectrumConfig(n_passes=12), n), SteadyLine(), []
    steady = np.arange(n//2)[:, None, None]//2
    unsteady = rng.integers(-3, 4, (n//2, size, 4))
    velocities = np.concatenate([np.broadcast_to(steady, unsteady.shape), unsteady])
    images = velocities.cumsum(0)/4                                           # exact in every type
    # an image twice: without its prompt and with it
    samples = np.concatenate([images, images], axis=1)

    with apply_spectrum(toy, n_passes=12, n_steps=n) as run:
        for i, x in enumerate(samples):
            condition = rng.integers(-8, 9, x.shape)/4
            got = toy(torch.tensor(x, dtype=dtype), float(i), torch.tensor(condition, dtype=dtype))
            want, slack, _ = oracle.call('', x + condition, dtype, 1., sample=x)
            assert (abs(got.double().numpy() - want) <= slack).all(), (i, got, want, slack)
            share, _ = share_of(ratios_of(oracle.runs['']['seen']), line)
            shares.append(np.broadcast_to(share, 2*size))

    same_stats(run.stats, oracle.stats)
    assert len(run.stats[0].passes) == 12
    assert np.ptp(shares) > .5                                # that is, reuse and line were both met
    assert all(np.array_equal(share[:size], share[size:]) for share in shares)
