"What breaks it? Programs of calls and faults against a model of 40 lines; clocks, threads, leaks, files, command lines, plans"
import contextlib
import copy
import functools
import gc
import io
import json
import os
import pickle
import shutil
import threading
import weakref
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

os.environ |= dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
import numpy as np
import pytest
import torch
from diffusers.models.cache_utils import CacheMixin
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st
from PIL import Image
from profiles import NIGHTLY, examples
from torch import nn

import spectrum_nb
from spectrum_nb.anatomy import CountingBlock, ToyDenoiser
from spectrum_nb.apply import SpectrumHandle, apply_spectrum
from spectrum_nb.calibration import Calibration
from spectrum_nb.cli import COMMANDS, main
from spectrum_nb.clock import PipelineClock
from spectrum_nb.forecast import Blend, Chebyshev, DampedLine, Newton, SteadyLine
from spectrum_nb.history import History
from spectrum_nb.hook import SpectrumHook
from spectrum_nb.lab.tiny import fit, save_pipeline
from spectrum_nb.plan import Plan, make_plan
from spectrum_nb.presets import load_pipeline
from spectrum_nb.report import RunStats
from spectrum_nb.run import Run
from spectrum_nb.samples import read_prompts
from spectrum_nb.schedule import SCHEDULES, Listed, NoiseQuantiles
from spectrum_nb.settings import SpectrumConfig

def bug(reason, raises=None):
    return pytest.mark.xfail(strict=True, reason=reason, **dict(raises=raises) if raises else {})

WEIGHTS = Path(spectrum_nb.__file__).parent/'weights'
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')


# A denoiser that fails on demand, and its model in float64

class Bang(Exception): pass
class Fuse(nn.Identity):
    fuse = None
    def forward(self, x):
        if self.fuse: raise self.fuse
        return x
class FusedBlock(CountingBlock):
    fuse = None
    def forward(self, x, t):
        x = super().forward(x, t)
        if self.fuse: raise self.fuse
        return x
class Toy(ToyDenoiser, CacheMixin):
    "The toy with a fuse everywhere; `wide` gives its head float32, as Wan does"
    def __init__(self, wide=False):
        super().__init__()
        self.wide, self.blocks = wide, nn.ModuleList(FusedBlock() for _ in range(3))
        self.embed, self.norm_out, self.proj_out = Fuse(), Fuse(), Fuse()
    def forward(self, hidden_states, timestep, copies=1):
        h = self.embed(hidden_states)
        for block in self.blocks: h = block(h, timestep)
        h = torch.cat([h]*copies) if copies > 1 else h
        return 2*self.proj_out(self.norm_out(h.float() if self.wide else h))
    def site(self, name): return self.blocks[int(name[-1])] if name.startswith('block') else getattr(self, name)

SITES = ('embed', 'block0', 'block1', 'block2', 'norm_out', 'proj_out')
# of the share of a line
ACCURACY = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-5}
# of the type; of the weighted sum
EPS = {torch.float32: (2**-23, 2e-6), torch.float64: (2**-52, 1e-14), torch.bfloat16: (2**-8, 3e-5)}

def ratios_of(seen):
    """{pass: ([rows] ρ, how far off a float32 ρ may be, in units of the last place)} of the calls of a run, from the formulas
    of the page damping: the velocity at a pass is what the sample moves to the next call, where a step is the unit of time"""
    velocity = {}
    for (i, x, is_pass), (j, y, _) in zip(seen, seen[1:]):
        if is_pass and j == i + 1 and x.ndim > 1: velocity[i] = (y - x).reshape(len(x), -1)
    out, steps = {}, sorted(velocity)
    for a, b, c in zip(steps, steps[1:], steps[2:]):
        promised, came = (c - b)/(b - a)*(velocity[b] - velocity[a]), velocity[c] - velocity[b]
        size = (promised**2).sum(1)
        size[size == 0] = np.inf                   # where nothing was promised nothing came true
        out[c] = (promised*came).sum(1)/size, abs(promised*came).sum(1)/size
    return out

def share_of(ratios, line):
    "([rows] share of the line that the next forecast follows, how far off it may be in the same units)"
    if not ratios: return np.array([float(line.first)]), np.zeros(1)
    latest = [ratios[p] for p in sorted(ratios)[-line.memory:]]
    smallest, off = np.min([rho for rho, _ in latest], 0), np.max([o for _, o in latest], 0)
    share = line.base*np.isfinite(smallest) + line.trust*np.nan_to_num(smallest, posinf=0., neginf=0.)
    return np.clip(share, 0, 1), np.nan_to_num(line.trust*off)

class Oracle:
    "What must come out, call by call: (output, how far off it may be, whether the blocks ran), or `Bang`"
    def __init__(self, config, n, feature='hidden', measure=True, wide=False, first=None):
        self.config, self.n, self.output, self.measure, self.wide, self.first = config, n, feature == 'output', measure, wide, first
        self.runs, self.stats, self.ticks = {}, [], 0
    def step(self, context):
        "The step that the next call in a context is"
        run = self.runs.get(context)
        return 0 if run is None or run['i'] == self.n else run['i']
    def begin(self, run, start):
        left = self.n - start
        if not isinstance(self.config, Plan):
            plan = make_plan(self.config, self.first if self.first and not start else left)
        else: plan = self.config if not start and not run['why'] else make_plan(SpectrumConfig(speedup=1), left)
        W, C, S = plan.weights[:left, :left], plan.checks[:left, :left], plan.slopes[:left, :left]
        uses = lambda k: [j for j in range(k + 1, left) if W[j, k] or C[j, k] or S[j, k]]
        last = [max(uses(k), default=-1) for k in range(left)]
        run |= dict(start=start, W=W, C=C, S=S, line=plan.damping, seen=[],
                    passes_planned={p for p in plan.passes if p < left}, h={}, last=last,
                    capacity=max(sum(last[k] > i for k in range(i + 1)) for i in range(left)))
    def weigh(self, run, row, slope, kept):
        "(feature, size of what is summed, how much farther it may be off where the share of a line is measured), or None"
        used = np.flatnonzero(row)
        if not len(used) or not all(k in run['h'] for k in used): return None
        h, size = sum(row[k]*run['h'][k] for k in used), sum(abs(row[k]*run['h'][k]) for k in used)
        if run['line'] is None or not slope.any(): return h, size, 0*size
        used = np.flatnonzero(slope)
        if not all(k in run['h'] for k in used): return None
        d, off = share_of(ratios_of(run['seen']), run['line'])
        d, off = (np.reshape(v, (-1, *[1]*(h.ndim - 1))) if h.ndim else v[0]
                  for v in (d, np.minimum(off*ACCURACY[kept], 1)))
        added, added_size = sum(slope[k]*run['h'][k] for k in used), sum(abs(slope[k]*run['h'][k]) for k in used)
        return h + d*added, size + added_size, off*abs(added) + EPS[kept][0]*(abs(h) + abs(added))
    def call(self, context, x, dtype, t, bang=None, sample=None):
        run, self.ticks = self.runs.get(context), self.ticks + 1
        if run is None or run['i'] == self.n:
            # contexts that were not called since are of runs that are over
            since = run['began'] if run else 0
            self.runs = {c: r for c, r in self.runs.items() if r['called'] >= since}
            run = self.runs[context] = dict(began=self.ticks, i=0, kind=None, passes=[], why={}, errors={},
                                            forced=set(), nbytes=0)
            self.begin(run, 0)
        run['called'] = self.ticks
        i, kind = run['i'], (x.shape, dtype)
        if run['kind'] not in (None, kind):
            run['why'][i] = 'input'
            self.begin(run, i)
        run['kind'] = kind
        at, kept = i - run['start'], torch.float32 if self.wide and dtype == torch.float64 else dtype
        (eps, acc), factor = EPS[kept], 1 if self.output else 2
        run['seen'].append((i, x if sample is None else sample, at in run['passes_planned']))
        forecast, skips = None, at not in run['passes_planned'] and i not in run['forced']
        if skips:
            forecast = self.weigh(run, run['W'][at], run['S'][at], kept)
            if forecast is None: run['why'][i] = 'missing'
        if bang and (forecast is None or (not self.output and not bang.startswith('block'))): raise Bang
        if forecast is not None:
            out, slack = factor*forecast[0], factor*(eps*abs(forecast[0]) + acc*forecast[1] + forecast[2])
        else:
            truth = (x + 3*t)*(2 if self.output else 1)
            out, slack = factor*truth, 0
            run['passes'].append(i)
            if not np.isfinite(truth).all():
                run['why'][i] = 'not finite'
                if i + 1 < self.n: self.begin(run, i + 1)
            else:
                check = self.weigh(run, run['C'][at], run['S'][at],
                                   kept) if self.measure and run['C'][at].any() else None
                if check:
                    size = np.linalg.norm(truth)
                    if size == 0: reject()
                    e, off = np.linalg.norm(check[0] - truth)/size, (acc*np.linalg.norm(check[1]) +
                                                                     np.linalg.norm(check[2]) + 2*eps*
                                                                     (np.linalg.norm(check[0]) + size))/size
                    run['errors'][i], limit = (e, off + 1e-5*e), getattr(self.config, 'tolerance', None)
                    if limit is not None and abs(e - limit) <= off + 1e-5*e:
                        reject()      # either answer would be right
                    if limit is not None and e > limit and i + 1 < self.n and at + 1 not in run['passes_planned']:
                        run['forced'].add(i + 1)
                        run['why'][i + 1] = 'tolerance'
                if at in run['passes_planned']:
                    run['h'][at] = truth
                    if run['last'][at] > at:
                        run['nbytes'] = max(run['nbytes'], run['capacity']*truth.size*kept.itemsize)
        run['i'] += 1
        if run['i'] == self.n:
            self.stats.append((context, self.n, run['passes'], run['why'], run['errors'], run['nbytes'],
                               ratios_of(run['seen']) if run['line'] else {}))
        return out, slack, forecast is None

WHY = dict(input='the input changed', missing='a pass that', tolerance='the error measured')
WHY['not finite'] = 'the feature is not finite'
def same_stats(got, want):
    assert len(got) == len(want)
    for s, (context, n, passes, why, errors, nbytes, ratios) in zip(got, want):
        assert (s.context, s.n_steps, s.passes, s.nbytes) == (context, n, passes, nbytes)
        assert s.fallbacks.keys() == why.keys() and all(s.fallbacks[i].startswith(WHY[w])
                                                        for i, w in why.items()), (s.fallbacks, why)
        assert s.errors.keys() == errors.keys() and all(abs(s.errors[i] - e) <= off
                                                        for i, (e, off) in errors.items()), (s.errors, errors)
        assert s.ratios.keys() == ratios.keys(), (s.ratios, ratios)
        assert all(
            np.isclose(s.ratios[p], np.min(rho), rtol=1e-5, atol=1e-5*np.nan_to_num(off.max()), equal_nan=True)
            for p, (rho, off) in ratios.items()), (s.ratios, ratios)

def state_of(module):
    "All that removal must leave as it was: dictionaries with their order and identities, hooks; not what this test itself writes"
    own = lambda m: {k: id(v) for k, v in vars(m).items() if k not in ('runs', 'fuse', 'calls')}
    return [(list(own(m).items()), [(k, id(v))
                                    for k, v in m._modules.items()], len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in module.modules()]

paper_configs = st.builds(
    lambda degree, lam, blend, window, alpha, warmup, keep, tolerance:
    (degree, lam, blend, window, alpha, warmup, keep, tolerance), st.integers(0, 6),
    st.sampled_from([0, 0., .01, .1, 10.]), st.sampled_from([0, .3, .5, 1]), st.floats(1, 6), st.floats(0, 4),
    st.integers(1, 8),
    st.none() | st.integers(1, 8),
    st.none() | st.floats(0, 3))
steady_configs = st.tuples(
    st.builds(NoiseQuantiles, speedup=st.none() | st.floats(1, 6), power=st.floats(0, 2), room=st.floats(0, 2),
              least=st.integers(1, 8)),
    st.builds(SteadyLine, trust=st.sampled_from([0, .5, 1., 2., 5.]), base=st.sampled_from([0., .5, 1.]),
              first=st.sampled_from([0., .5, 1.]), memory=st.integers(1, 4)),
    st.none() | st.integers(1, 8),
    st.none() | st.floats(0, 3))
configs = paper_configs | steady_configs | st.just(
    (*(getattr(SpectrumConfig(), f.name) for f in fields(SpectrumConfig)),))
def config_of(c):
    if isinstance(c[0], NoiseQuantiles): return SpectrumConfig(*c)
    settings = dict(zip(('degree', 'lam', 'blend', 'window', 'alpha', 'warmup', 'keep', 'tolerance'), c))
    try: return SpectrumConfig.paper(**settings)
    except ValueError: return SpectrumConfig.paper(**settings | dict(lam=.1))
SHAPES, DTYPES = ((2, 4), (3, 5), (1,), (1, 64), (2, 8, 16), (7, 64)), tuple(EPS)
kinds, contexts = st.tuples(st.sampled_from(SHAPES),
                            st.sampled_from(DTYPES)), st.sampled_from(['', 'cond', 'uncond', 'α/2'])
steps_of_program = st.lists(
    st.one_of(
        st.tuples(st.just('go'), contexts, st.integers(1, 12)), st.tuples(st.just('go'), st.just(''), st.integers(
            1, 30)),
        st.tuples(st.just('bang'), contexts, st.sampled_from(SITES), st.sampled_from([Bang, KeyboardInterrupt]),
                  st.booleans()), st.tuples(st.just('nan'), contexts), st.tuples(st.just('kind'), kinds),
        st.just(('reset',)), st.just(('again',))), min_size=1, max_size=20)

@examples(300, 7500)
@given(config=configs, n=st.integers(1, 30), kind=kinds, program=steps_of_program,
       feature=st.sampled_from(['hidden', 'hidden', 'output']), measure=st.booleans(),
       wide=st.booleans(), as_plan=st.booleans(), before=st.sampled_from(['fresh', 'registry', 'patched']),
       device=st.sampled_from(['same', 'cpu']), seed=st.integers(0, 99))
def test_programs_of_calls_and_faults_do_what_the_model_says(config, n, kind, program, feature, measure, wide, as_plan, before, device, seed):
    config = config_of(config if measure and not as_plan else (*config[:-1], None))
    if as_plan: config = make_plan(config, n)
    toy, rng = Toy(wide), np.random.default_rng(seed)
    if before == 'registry':
        with toy.cache_context('before'): pass
    if before == 'patched': toy.forward = functools.partial(type(toy).forward, toy)
    untouched = state_of(toy)
    def apply():
        return apply_spectrum(toy, config, n, feature=feature, history_device=device,
                              measure=measure), Oracle(config, n, feature, measure, wide)
    handle, oracle = apply()
    def call(context, bang=None, error=Bang, nan=False):
        shape, dtype = kind
        # a sample changes little from step to step
        base = np.random.default_rng(sum(shape)).integers(-28, 29, shape)
        x, t = (base + rng.integers(-4, 5, shape))/4, oracle.step(context)/4        # exact in every type
        if nan: x.flat[-1] = np.nan
        try: want = oracle.call(context, x, dtype, t, bang)
        except Bang: want = None
        runs, inside = toy.blocks[0].runs, toy.cache_context(context) if context else contextlib.nullcontext()
        if bang: toy.site(bang).fuse = error('bang')
        try:
            with inside:
                got = toy(torch.tensor(x, dtype=dtype), t) if rng.random() < .5 else toy(
                    timestep=t, hidden_states=torch.tensor(x, dtype=dtype))
        except (Bang, KeyboardInterrupt): got = None
        finally:
            if bang: toy.site(bang).fuse = None
        assert (got is None) == (want is None)
        if got is None: return
        out, slack, ran = want
        assert got.dtype == (torch.float32 if wide else dtype) and tuple(
            got.shape) == shape and toy.blocks[0].runs - runs == ran
        assert np.array_equal(np.isnan(got.double().numpy()), np.isnan(out)) and (np.nan_to_num(
            abs(got.double().numpy() - out)) <= slack).all(), (got, out, slack)
    for what, *args in program:
        if what == 'go':
            for _ in range(args[1]): call(args[0])
        elif what == 'nan': call(args[0], nan=True)
        elif what == 'kind': kind = args[0]
        elif what == 'reset':
            handle.reset()
            oracle.runs = {}
        elif what == 'bang':
            call(*args[:3])
            if args[3]:                         # leaves through the exception: remove, and apply again
                with contextlib.suppress(Bang), handle: raise Bang
        if what == 'again': handle.remove()
        if what == 'again' or (what == 'bang' and args[3]):
            assert state_of(toy) == untouched
            same_stats(handle.stats, oracle.stats)
            handle, oracle = apply()
    same_stats(handle.stats, oracle.stats)
    handle.remove()
    handle.remove()
    assert state_of(toy) == untouched
    assert torch.equal(toy(torch.ones(2), 1.), torch.full((2,), 8.))


@pytest.mark.parametrize('size', [1, 3])
@pytest.mark.parametrize('dtype', EPS)
def test_guidance_in_one_batch_follows_the_line_as_far_for_both_halves_of_an_image(dtype, size):
    class Guided(Toy):
        def forward(self, hidden_states, timestep, condition): return super().forward(hidden_states + condition, 1.)
    n, rng = 40, np.random.default_rng(size)
    toy, oracle, line, shares = Guided(), Oracle(SpectrumConfig(n_passes=12), n), SteadyLine(), []
    steady, unsteady = np.arange(n//2)[:, None, None]//2, rng.integers(-3, 4, (n//2, size, 4))
    velocities = np.concatenate([np.broadcast_to(steady, unsteady.shape), unsteady])
    images = velocities.cumsum(0)/4                                           # exact in every type
    # an image twice: without its prompt and with it
    samples = np.concatenate([images, images], axis=1)
    with apply_spectrum(toy, n_passes=12, n_steps=n) as run:
        for i, x in enumerate(samples):
            condition = rng.integers(-8, 9, x.shape)/4
            got = toy(torch.tensor(x, dtype=dtype), float(i), torch.tensor(condition, dtype=dtype))
            want, slack, ran = oracle.call('', x + condition, dtype, 1., sample=x)
            assert (abs(got.double().numpy() - want) <= slack).all(), (i, got, want, slack)
            shares.append(np.broadcast_to(share_of(ratios_of(oracle.runs['']['seen']), line)[0], 2*size))
    same_stats(run.stats, oracle.stats)
    assert len(run.stats[0].passes) == 12 and np.ptp(shares) > .5            # that is, reuse and line were both met
    assert all(np.array_equal(d[:size], d[size:]) for d in shares)


def test_a_feature_that_changes_its_shape_at_two_passes_in_a_row_begins_two_histories():
    with apply_spectrum(toy := Toy(), SpectrumConfig.paper(), 20):
        [toy(torch.ones(2, 4), float(i), copies=min(i, 2) + 1) for i in range(20)]

def test_a_feature_may_be_a_scalar():
    with apply_spectrum(toy := Toy(), SpectrumConfig.paper(blend=0), 9):
        assert [toy(torch.tensor(1.), float(i)).item()
                for i in range(9)] == pytest.approx([2*(1 + 3*i) for i in range(9)])

def test_an_empty_batch_passes_as_it_does_without():
    with apply_spectrum(toy := Toy(), SpectrumConfig.paper(), 9):
        assert [toy(torch.ones(0, 4), float(i)).shape for i in range(9)] == [(0, 4)]*9

def test_contexts_that_differ_by_a_blank_do_not_mix():
    toy = Toy()
    with apply_spectrum(toy, SpectrumConfig.paper(), 9) as run:
        for i in range(9):
            for name in ('a', 'a '):
                with toy.cache_context(name): toy(torch.ones(2), float(i))
    assert [s.context for s in run.stats] == ['a', 'a ']

def test_a_head_that_works_in_float32_is_forecast_in_float32():
    class Upcast(Toy):
        def forward(self, hidden_states, timestep): return super().forward(hidden_states.float(), timestep)
    x, toy = torch.ones(2, 64, dtype=torch.bfloat16), Upcast()
    with apply_spectrum(toy, SpectrumConfig.paper(blend=0), 9):
        got = [toy(x, i*.1)[0, 0].item() for i in range(9)]        # the feature of step 0 is 1, exact in bfloat16
    assert got == pytest.approx([2*(1 + .3*i) for i in range(9)], rel=1e-5)

def test_removal_during_a_call_does_not_spoil_it():
    toy = Toy()
    handle = apply_spectrum(toy, SpectrumConfig.paper(blend=0), 9)
    for i in range(5): toy(torch.ones(2), float(i))
    toy.embed.forward = lambda x: (handle.remove(), x)[1]                      # as another thread, or a callback, might
    try: got = toy(torch.ones(2), 5.)                                          # a forecast
    except RuntimeError: return                                                # refused in words would do, too
    assert got.tolist() == [32., 32.], f'{got.tolist()} came out'

def test_a_wrapper_put_on_later_survives_removal():
    toy, calls = Toy(), []
    handle = apply_spectrum(toy, SpectrumConfig.paper(), 9)
    inner = toy.forward
    toy.forward = lambda *args: (calls.append(1), inner(*args))[1]
    handle.remove()
    toy(torch.ones(2), 0.)
    assert calls

def test_removal_frees_the_history_of_an_unfinished_run_at_once():
    toy = Toy()
    gc.collect()
    gc.disable()
    try:
        with apply_spectrum(toy, SpectrumConfig.paper(), 20) as handle:
            for i in range(8): toy(torch.ones(2, 64), float(i))
            kept = weakref.ref(handle.hooks[0].runs[''].histories[0].buffer)
        del handle
        assert kept() is None
    finally: gc.enable()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size', [3, 64])
def test_a_forecast_that_overflows_becomes_a_pass(dtype, size):
    x = torch.full((size,), torch.finfo(dtype).max/8, dtype=dtype)
    with apply_spectrum(toy := Toy(), Plan([0], [[1, 0, 0], [1000, 0, 0], [.5, 0, 0]])) as run:
        got = [toy(x, i*1e-6) for i in range(3)]
    assert torch.equal(got[0], 2*x) and torch.equal(got[1], 2*x) and torch.equal(got[2], x)
    assert run.stats[0].passes == [0, 1] and run.stats[0].fallbacks == {1: 'the forecast is not finite'}


# Clocks: interrupted runs of any length after one another

class FakeScheduler:
    "Tells the step by `step_index`, by `counter`, or not at all"
    config = {}
    def __init__(self, kind): self.kind = kind
    def start(self, total, begin, order, shift=0):
        self.timesteps, self.order = torch.arange(total, 0, -1, dtype=torch.float64)/4 + shift, order
        if self.kind == 'index': self.step_index, self.begin_index = None, begin or None
        if self.kind == 'counter': self.counter = 0
    def step(self, i, begin):
        if self.kind == 'index': self.step_index = begin + i + 1
        if self.kind == 'counter': self.counter = i + 1

runs = st.lists(
    st.tuples(st.integers(1, 24), st.integers(0, 5), st.integers(0, 4), st.sampled_from([1, 1, 2]), st.integers(1, 3),
              st.none() | st.integers(0, 30), st.booleans()), min_size=1, max_size=5)
@examples(150, 1500)
@given(config=configs, runs=runs, kind=st.sampled_from(['index', 'index', 'counter', 'lookup']), named=st.booleans(),
       seed=st.integers(0, 99))
@example(config=(4, .1, .5, 2., .75, 5, None, None),
         runs=[(9, 0, 0, 1, 1, 0, True), (4, 0, 0, 1, 1, None, False), (12, 2, 0, 2, 2, 7, True),
               (20, 0, 0, 1, 2, None, False)], kind='index', named=True, seed=0)
def test_no_history_survives_a_run_however_it_ends(config, runs, kind, named, seed):
    config, toy, rng = config_of(config), Toy(), np.random.default_rng(seed)
    scheduler, untouched, stats = FakeScheduler(kind), state_of(toy), []
    pipe = SimpleNamespace(scheduler=scheduler, config={})
    handle = apply_spectrum(toy, config, n_steps=5)
    handle.hooks[0].clock = PipelineClock(pipe, toy)
    shift = given_up = False
    # `cut`: steps left out at the end; `stop`: where it is interrupted
    for n, begin, cut, order, branches, stop, bang in runs:
        order, begin, cut = (order, begin, cut) if kind == 'index' else (1, begin if kind == 'lookup' else 0, cut)
        # after its first step a run with the same timesteps might be a tile of it
        shift = not shift if given_up else shift
        scheduler.start(n + begin + cut, begin, order, shift)
        pipe.num_timesteps = n if cut or begin else None
        halves = dict(first=(-(-n//order), None), second=(n//order, -(-n//order)))
        oracles = {}
        for i in range(n):
            for b in range(branches):
                kind_of = 'second' if order == 2 and i % 2 else 'first'
                length, whole = halves[kind_of]
                oracle = oracles.setdefault((kind_of, b), Oracle(config, length, first=whole))
                name = ('ctx%d' % b if named else '') + (' 2nd' if kind_of == 'second' else '')
                name = name.strip() + (f'#{b + 1}' if b and not named else '')
                t, x = float(scheduler.timesteps[begin + i]), rng.integers(-32, 33, (2, 4))/4
                broken = stop == i and b == branches - 1
                try: want, slack, ran = oracle.call(name, x, torch.float32, t, 'block1' if broken and bang else None)
                except Bang: want = None
                if broken and bang: toy.blocks[1].fuse = Bang()
                before = toy.passes
                with toy.cache_context(f'ctx{b}') if named else contextlib.nullcontext():
                    try: got = toy(torch.tensor(x, dtype=torch.float32), t)
                    except Bang: got = None
                toy.blocks[1].fuse = None
                assert (got is None) == (want is None)
                if got is not None:
                    assert toy.passes - before == ran and (abs(got.double().numpy() - want) <= slack).all()
                stats += oracle.stats
                oracle.stats = []
            if stop == i: break
            scheduler.step(i, begin)
        given_up = stop == 0
    same_stats(handle.stats, stats)
    assert len({id(r.key) for r in handle.hooks[0].runs.values()}) <= 1
    handle.remove()
    assert state_of(toy) == untouched


# Threads

def picture(pipe, seed, config, n_steps=10):
    from spectrum_nb.samples import make_sample
    return make_sample(pipe, 'a large red circle at the centre on a blue background', seed, n_steps, config,
                       dict(height=32, width=32, guidance_scale=2.5, max_sequence_length=16))

@pytest.fixture(scope='module')
def two_pipes():
    pipes = [load_pipeline('tiny-flux', 'cpu') for _ in range(2)]
    for p in pipes: p.set_progress_bar_config(disable=True)
    return pipes

def test_two_threads_with_a_pipeline_each_draw_what_one_draws(two_pipes):
    rounds, config = 12 if NIGHTLY else 3, SpectrumConfig.paper(alpha=2)
    def work(k, into): into[k] = [picture(two_pipes[k], s, config) for s in range(k, rounds, 2)]
    alone, together, untouched = {}, {}, [state_of(p.transformer) for p in two_pipes]
    for k in range(2): work(k, alone)
    threads = [threading.Thread(target=work, args=(k, together)) for k in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    for k in range(2):
        for (a, x), (b, y) in zip(alone[k], together[k], strict=True):
            assert np.array_equal(a, b) and x['runs'] == y['runs']
    assert untouched == [state_of(p.transformer) for p in two_pipes]

def in_thread(f):
    box = []
    def work():
        try: box.append(f())
        except BaseException as e: box.append(e)
    (t := threading.Thread(target=work)).start()
    t.join()
    return box[0]

@examples(20, 300)
@given(at=st.integers(0, 19), where=st.sampled_from(SITES))
def test_a_second_thread_within_a_call_is_refused_and_harms_nothing(at, where):
    def loop(toy): return torch.stack([toy(torch.ones(2, 4), float(i)) for i in range(20)])
    with apply_spectrum(toy := Toy(), SpectrumConfig.paper(), 20) as run: want = loop(toy)
    toy, refused, toy.calls = Toy(), [], 0
    with apply_spectrum(toy, SpectrumConfig.paper(), 20) as other:
        def intrude(*_):
            if toy.calls == at:
                toy.calls += 1
                refused.append(in_thread(lambda: toy(torch.zeros(2, 4), 0.)))
        handle, out = toy.site(where).register_forward_pre_hook(intrude), []
        for i in range(20):
            toy.calls = i
            out.append(toy(torch.ones(2, 4), float(i)))
        handle.remove()
    assert all(isinstance(e, RuntimeError) and 'another thread' in str(e) for e in refused), refused
    assert torch.equal(torch.stack(out), want) and other.stats == run.stats
    if where in ('embed', 'norm_out', 'proj_out'): assert len(refused) == 1

@examples(20, 300)
@given(at=st.integers(2, 19), threads=st.integers(1, 3), steps=st.integers(1, 5))
def test_another_run_of_another_thread_between_two_calls_harms_nothing(at, threads, steps):
    def loop(toy, intrude=None):
        out = []
        for i in range(20):
            if intrude and i == at: intrude()
            call = lambda: toy(torch.ones(2, 4), float(i))
            out.append(call())
        return torch.stack(out)
    with apply_spectrum(toy := Toy(), SpectrumConfig.paper(), 20) as run: want = loop(toy)
    with apply_spectrum(toy := Toy(), SpectrumConfig.paper(), 20) as other:
        others = []
        def intrude():
            for k in range(min(steps, at)): others.append(in_thread(lambda: toy(torch.zeros(2, 4), float(k))))
        got = loop(toy, intrude)
    assert torch.equal(got, want) and other.stats == run.stats
    # its first steps are passes
    assert [o.unique().tolist() for o in others[:5]] == [[6.*k] for k in range(min(steps, at))]

@examples(20, 300)
@given(threads=st.lists(st.integers(0, 3), min_size=20, max_size=20))
def test_a_run_whose_steps_come_from_any_threads_is_the_same_run(threads):
    from concurrent.futures import ThreadPoolExecutor
    pools, out = [ThreadPoolExecutor(1) for _ in range(4)], {}
    for handed in (False, True):
        with apply_spectrum(toy := Toy(), SpectrumConfig.paper(), 20) as run:
            call = lambda i: toy(torch.ones(2, 4), float(i))
            got = [pools[k].submit(call, i).result() if handed else call(i) for i, k in enumerate(threads)]
        out[handed] = torch.stack(got), run.stats
    for p in pools: p.shutdown()
    assert torch.equal(out[True][0], out[False][0]) and out[True][1] == out[False][1]

def test_two_pipelines_in_turns_on_one_denoiser_mix_nothing():
    # each run drops what was kept of the other: nothing is saved, and nothing is wrong
    toy, config = Toy(), SpectrumConfig.paper(blend=0)
    handle = apply_spectrum(toy, config, 20)
    pipes = [SimpleNamespace(scheduler=FakeScheduler('index'), config={}, num_timesteps=20) for _ in range(2)]
    clocks = [PipelineClock(p, toy) for p in pipes]
    for p in pipes: p.scheduler.start(20, 0, 1)
    def step(k, i):
        handle.hooks[0].clock = clocks[k]                      # what `calling_pipeline` finds out
        out = toy(torch.full((2,), float(k)), float(i))
        pipes[k].scheduler.step(i, 0)
        return out
    for i in range(20):
        for k, out in enumerate((step(0, i), in_thread(lambda: step(1, i)))):
            assert torch.allclose(out, torch.full((2,), 2*(k + 3.*i)))

def test_a_thread_that_was_refused_once_is_refused_again():
    toy = Toy()
    handle = apply_spectrum(toy, SpectrumConfig.paper(), 20)
    (pipe := SimpleNamespace(scheduler=FakeScheduler('index'), config={}, num_timesteps=20)).scheduler.start(20, 0, 1)
    handle.hooks[0].clock = PipelineClock(pipe, toy)
    toy(torch.ones(2), 0.)
    pipe.scheduler.step(0, 0)
    answers = []
    watch = toy.embed.register_forward_hook(lambda *_: answers.extend(
        in_thread(lambda: toy(torch.ones(2), 1.)) for _ in range(3)))
    toy(torch.ones(2), 1.)
    watch.remove()
    assert len(answers) == 3 and all(isinstance(a, RuntimeError) for a in answers) and list(
        handle.hooks[0].runs) == [''], (answers, list(handle.hooks[0].runs))


# Leaks

def resident(): return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')
def ours():
    return sum(isinstance(o, (SpectrumHandle, SpectrumHook, Run, RunStats, History, Plan)) for o in gc.get_objects())

def test_a_thousand_short_runs_leave_nothing():
    toy, config, watched = Toy(), SpectrumConfig.paper(warmup=2), []
    untouched = state_of(toy)
    def short_run(i):
        with contextlib.suppress(Bang, KeyboardInterrupt), apply_spectrum(
                toy, config, 6, feature='output' if i % 5 == 4 else 'hidden') as handle:
            if i % 50 == 0: watched.append(weakref.ref(handle))
            for k in range(6 if i % 3 else 5):
                if i % 4 == 0 and k == 4: toy.site(SITES[i//4 % 6]).fuse = (Bang, KeyboardInterrupt)[i % 8 == 0]()
                toy(torch.ones(2, 64), float(k))
        for s in SITES: toy.site(s).fuse = None
    for i in range(200): short_run(i)
    gc.collect()
    counts, before, objects = ours(), resident(), len(gc.get_objects())
    for i in range(1000): short_run(i)
    gc.collect()
    assert ours() == counts and state_of(toy) == untouched and not any(w() for w in watched)
    assert resident() - before < 2_000_000 and len(gc.get_objects()) - objects < 200

def test_one_handle_for_many_runs_keeps_their_statistics_only():
    toy = Toy()
    handle = apply_spectrum(toy, SpectrumConfig.paper(warmup=2), 8)
    def runs(n):
        for i in range(n):
            for k in range(8 if i % 3 else 5): toy(torch.ones(2, 64), float(k))
            if i % 3 == 0: handle.reset()
    runs(201)
    handle.stats.clear()
    gc.collect()
    counts, before = ours(), resident()
    runs(999 if NIGHTLY else 300)
    gc.collect()
    assert ours() - counts == len(handle.stats) == (666 if NIGHTLY else 200) and resident() - before < 4_000_000
    handle.stats.clear()
    gc.collect()
    assert ours() == counts
    handle.remove()

@pytest.mark.parametrize('feature', ['hidden', 'output'])
def test_a_deep_copy_under_spectrum_is_a_copy_or_is_refused_in_words(feature):
    toy = Toy()
    handle = apply_spectrum(toy, SpectrumConfig.paper(), 20, feature=feature)
    try: twin = copy.deepcopy(toy)
    except Exception as e:
        assert 'Spectrum' in str(e)
        return
    twin(torch.ones(2), 0.)
    assert (toy.passes, twin.passes) == (0, 1), 'the copy ran the blocks of the original'

def test_saved_under_spectrum_is_saved_as_without(two_pipes, tmp_path):
    pipe = two_pipes[0]
    pipe.transformer.save_pretrained(tmp_path/'plain')
    pipe.save_pretrained(tmp_path/'pipe')
    keys = list(pipe.transformer.state_dict())
    with apply_spectrum(pipe, SpectrumConfig.paper()):
        assert list(pipe.transformer.state_dict()) == keys
        pipe.transformer.save_pretrained(tmp_path/'applied')
        pipe.save_pretrained(tmp_path/'pipe2')
    files = lambda folder: {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()
    }
    assert files(tmp_path/'plain') == files(tmp_path/'applied') and files(tmp_path/'pipe') == files(tmp_path/'pipe2')


# Files

def cli(cwd, *args):
    "(status, what was said to stderr, the files that are new)"
    err, old, before = io.StringIO(), Path.cwd(), {p for p in cwd.rglob('*')}
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            try: status = main(list(args))
            except SystemExit as e: status = e.code
    finally: os.chdir(old)
    return status, err.getvalue(), {p for p in cwd.rglob('*')} - before

def refused(answer, word=''):
    "Status 2, one sentence that has `word`, nothing written"
    status, err, new = answer
    said = err[err.rfind('spectrum-nb'):].strip()
    # on a line of its own, not behind a progress bar
    assert err[:err.rfind('spectrum-nb')][-1:] in ('', '\n', '\r') or 'usage:' in err, err[-500:]
    assert status == 2 and 'Traceback' not in err and not new, (status, err[-500:], new)
    assert len(said.splitlines()) == 1 and word in said, err[-1500:]

@pytest.fixture
def model(tmp_path):
    shutil.copytree(WEIGHTS/'tiny-flux', tmp_path/'mine')
    return tmp_path

def draw_with(folder, *more):
    return cli(folder, 'sample', '--prompt', 'a red circle', '--model', './mine', '--steps', '1', '--out', 'x.png',
               *more)

def truncated(p): p.write_bytes(p.read_bytes()[:-100])
def emptied(p): p.write_bytes(b'')
def foreign(p): p.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n')
def long_header(p): p.write_bytes((2**60).to_bytes(8, 'little') + p.read_bytes()[8:])
def gone(p): p.unlink()
def not_utf8(p): p.write_bytes(b'{"model": "\xff"}')
TRANSFORMER, TEXT, INDEX = 'transformer/diffusion_pytorch_model.safetensors', 'text_encoder/model.safetensors', 'model_index.json'
@pytest.mark.parametrize('file, harm',
                         [(f, h) for f in (TRANSFORMER, TEXT) for h in (truncated, emptied, foreign, long_header, gone)]
                         + [(f, h)
                            for f in (INDEX, 'transformer/config.json', 'scheduler/scheduler_config.json',
                                      'tokenizer/tokenizer.json') for h in (truncated, emptied, not_utf8)])
def test_a_damaged_model_is_refused(file, harm, model):
    harm(model/'mine'/file)
    refused(draw_with(model), 'mine')

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (os.mkdir, (self.path,))

@pytest.mark.parametrize('part, name',
                         [('transformer', 'diffusion_pytorch_model'), ('text_encoder', 'pytorch_model'),
                          ('vae', 'diffusion_pytorch_model')])
@pytest.mark.parametrize('zipped', [False, True])
def test_a_pickle_is_never_executed(part, name, zipped, model):
    folder = model/'mine'/part
    next(folder.glob('*.safetensors')).unlink()
    evil = Evil(str(model/'mine'/'owned'))
    if zipped: torch.save(evil, folder/f'{name}.bin')
    else: (folder/f'{name}.bin').write_bytes(pickle.dumps(evil))
    status, err, new = draw_with(model)
    assert status == 2 and not new and not (model/'mine'/'owned').exists()
    pickle.loads(pickle.dumps(evil))
    assert (model/'mine'/'owned').exists()                      # it would have

@pytest.mark.parametrize('part, name', [('transformer', 'diffusion_pytorch_model'), ('text_encoder', 'pytorch_model')])
def test_weights_in_a_pickle_are_refused(part, name, model):
    from safetensors.torch import load_file
    file = next((model/'mine'/part).glob('*.safetensors'))
    torch.save(load_file(file), file.with_name(f'{name}.bin'))
    file.unlink()
    assert draw_with(model)[0] == 2

def test_code_in_a_model_folder_is_not_run(model):
    (model/'mine/evil.py').write_text(f'import os; os.mkdir({str(model/"mine/owned")!r})\nclass Evil: pass\n')
    index = json.loads((model/'mine'/INDEX).read_text())
    for changed in (index | dict(_class_name=['evil', 'Evil']), index | dict(transformer=['evil', 'Evil'])):
        (model/'mine'/INDEX).write_text(json.dumps(changed))
        assert draw_with(model)[0] == 2 and not (model/'mine/owned').exists()

@pytest.mark.parametrize('notes', [b'[]', b'"tiny-flux"', b'', b'{"model": ', b'{"model": "\xff"}', b'{"model": []}'])
def test_a_damaged_training_json_is_refused(notes, model):
    (model/'mine/training.json').write_bytes(notes)
    refused(draw_with(model), 'training.json')

@pytest.mark.parametrize('notes', [b'{}', b'{"model": null}', b'{"model": 7}', b'{"model": "tiny-unknown"}'])
def test_a_foreign_training_json_is_passed_over(notes, model):
    (model/'mine/training.json').write_bytes(notes)
    status, err, new = draw_with(model)
    assert status == 0 and {p.name for p in new} == {'x.png', 'x.json'}, err

def sample_folder(folder, names=('one', 'two'), suffix='.png'):
    folder.mkdir()
    for k, name in enumerate(names):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (16, 16, 3),
                                                          dtype=np.uint8)).save(folder/f'{name}{suffix}')
        (folder/f'{name}.json').write_text(
            json.dumps(
                dict(prompt=name, seed=0, nth=0, file=name + suffix, seconds=1., passes={'': [0, 1]}, errors={},
                     fallbacks={}, settings={})))
    return folder

@pytest.fixture
def samples(tmp_path): return sample_folder(tmp_path/'a'), sample_folder(tmp_path/'b')

def compared(folder): return cli(folder, 'compare', 'a', 'b', '--out', 'c')

def test_sound_folders_compare(samples, tmp_path):
    status, err, new = compared(tmp_path)
    assert status == 0 and {p.name for p in new} == {'c', 'comparison.json', 'comparison.png'}

@pytest.mark.parametrize('text, word', [
    *((text, 'one.json')
      for text in (b'', b'{"file": ', b'\xff\xfe', b'{}', b'{"file": "one.png"}', b'[]', b'null', b'{"file": "one.png", "seconds": 1, "passes": []}')),
    (b'{"file": "no.png", "seconds": 1, "passes": {}}', 'no.png'),
    (b'{"file": "../b", "seconds": 1, "passes": {}}', 'b')])
def test_a_damaged_note_of_a_sample_is_refused(text, word, samples, tmp_path):
    (tmp_path/'a/one.json').write_bytes(text)
    refused(compared(tmp_path), word)

@examples(60, 600)
@given(cut=st.none() | st.integers(0, 900),
       flips=st.lists(st.tuples(st.integers(0, 899), st.integers(1, 255)), max_size=4))
def test_a_damaged_png_is_read_or_refused(cut, flips, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp('png')
    a, _ = sample_folder(tmp_path/'a', ('one',)), sample_folder(tmp_path/'b', ('one',))
    data = bytearray((a/'one.png').read_bytes())
    for where, what in flips:
        if where % len(data) not in range(16, 24): data[where % len(data)] ^= what       # other sizes: below
    (a/'one.png').write_bytes(data[:cut])
    answer = compared(tmp_path)
    if answer[0] != 0: refused(answer)
    shutil.rmtree(tmp_path)

def test_a_png_of_a_gigantic_size_is_refused(samples, tmp_path):
    import zlib
    data = bytearray((tmp_path/'a/one.png').read_bytes())
    data[16:24] = (50_000).to_bytes(4, 'big')*2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
    (tmp_path/'a/one.png').write_bytes(data)
    refused(compared(tmp_path))

@pytest.fixture(scope='module')
def film(tmp_path_factory):
    from spectrum_nb.samples import save_sample
    return save_sample(
        np.random.default_rng(0).random((4, 32, 32, 3)),
        tmp_path_factory.mktemp('film')/'one', exact=True)

@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
@pytest.mark.parametrize('share', [0, .1, .5, .9])
def test_a_truncated_clip_is_refused(suffix, share, film, tmp_path):
    for f in 'ab':
        sample_folder(tmp_path/f, ('one',))
        data = film.with_suffix(suffix).read_bytes()
        (tmp_path/f/f'one{suffix}').write_bytes(data if f == 'b' else data[:int(share*len(data))])
        note = json.loads((tmp_path/f/'one.json').read_text())
        (tmp_path/f/'one.json').write_text(json.dumps(note | dict(file=f'one{suffix}')))
    refused(compared(tmp_path), 'one')

def test_compare_writes_all_or_nothing(film, tmp_path):
    for f in 'ab':
        sample_folder(tmp_path/f, ('one',))
        shutil.copy(film, tmp_path/f/'one.mp4')
        note = json.loads((tmp_path/f/'one.json').read_text())
        (tmp_path/f/'one.json').write_text(json.dumps(note | dict(file='one.mp4')))
    (tmp_path/'a/one.mkv').write_bytes(b'broken')
    refused(compared(tmp_path))

@pytest.mark.parametrize('text, word', [
    (b'', 'settings.json'), (b'{"model"', 'settings.json'), (b'[]', 'settings.json'), (b'{}', 'other settings'),
    (b'{"model": "x"}', 'other settings')])
def test_damaged_settings_of_a_run_are_refused(text, word, tmp_path):
    (tmp_path/'spectrum_runs/run').mkdir(parents=True)
    (tmp_path/'spectrum_runs/run/settings.json').write_bytes(text)
    (tmp_path/'p.txt').write_text('a red circle')
    refused(cli(tmp_path, 'run', '--prompts', 'p.txt', '--steps', '1'), word)

@pytest.mark.parametrize('data, word',
                         [(b'\xff\xfea\x00', 'not UTF-8'), (b'caf\xe9', 'not UTF-8'), (b'', 'no prompt'),
                          (b'\n \n# x\n', 'no prompt'), (b'\xef\xbb\xbf', 'no prompt')])
def test_a_prompt_file_that_is_none_is_refused(data, word, tmp_path):
    (tmp_path/'p.txt').write_bytes(data)
    refused(cli(tmp_path, 'run', '--prompts', 'p.txt'), word)

@examples(60, 600)
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda s: s.encode('utf-8', 'replace')))
def test_any_bytes_are_prompts_or_refused(data):
    path = Path('/tmp')/f'prompts-{os.getpid()}.txt'
    path.write_bytes(data)
    try: prompts = read_prompts(path)
    except ValueError as e: assert str(path) in str(e)
    else: assert all(p == p.strip() and p and not p.startswith('#') for p in prompts) and len(prompts) >= 1
    finally: path.unlink()

def test_a_prompt_listed_many_times_gets_as_many_names_at_once():
    from spectrum_nb.samples import all_jobs
    assert [j.nth for j in all_jobs(['a', 'b', 'a']*50_000, [0])][-3:] == [99_998, 49_999, 99_999]

def test_nul_bytes_and_huge_lines_are_a_prompt(tmp_path):
    (tmp_path/'p.txt').write_bytes(b'a\0b\n' + b'x'*10_000_000)
    from spectrum_nb.samples import all_jobs
    assert [len(j.prompt) for j in all_jobs(read_prompts(tmp_path/'p.txt'), [0])] == [3, 10_000_000] and all(
        len(j.name) < 70 for j in all_jobs(read_prompts(tmp_path/'p.txt'), [0]))

@pytest.mark.parametrize('c', ['\x0b', '\x0c', '\x1c', '\x85', '\u2028', '\u2029'])
def test_only_newlines_end_a_prompt(c, tmp_path):
    (tmp_path/'p.txt').write_text(f'a red{c}circle', encoding='utf-8')
    assert len(read_prompts(tmp_path/'p.txt')) == 1

@pytest.mark.parametrize('data', [b'', b'broken', None])
def test_a_damaged_checkpoint_of_a_training_is_refused(data, tmp_path):
    from safetensors.torch import save_file
    if data is None: save_file(dict(x=torch.zeros(1)), tmp_path/'vae.safetensors')
    else: (tmp_path/'vae.safetensors').write_bytes(data)
    with pytest.raises((ValueError, TypeError, RuntimeError, OSError)):
        fit('vae', [nn.Parameter(torch.zeros(1))], None, 1, tmp_path)

def test_training_for_negative_steps_is_refused(tmp_path):
    with pytest.raises((ValueError, TypeError)): fit('vae', [nn.Parameter(torch.zeros(1))], None, -5, tmp_path)

def test_training_does_not_delete_a_folder_that_is_no_pipeline(two_pipes, tmp_path):
    (tmp_path/'papers').mkdir()
    (tmp_path/'papers/thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match='something else'): save_pipeline(two_pipes[0], tmp_path/'papers', {})
    assert (tmp_path/'papers/thesis.txt').exists()


# Command lines

bad_int = st.sampled_from(
    ['0', '-1', '-99999999999999999999', '1.5', 'nan', '', ' ', 'x', '１x', '1e3', '0x10', '--', '9'*5000, '٣.٥'])

bad_float = st.sampled_from(['nan', 'inf', '-inf', '-1', '-1e-300', '1e999', 'x', '', '1,5', '--'])
words_of = st.text(st.characters(exclude_categories=['Cs']), max_size=12) | st.sampled_from(
    ['\udcff', '🦊', 'a\nb', '../..', '%s', '{}', "'", 'x'*3000])
no_file = st.sampled_from(
    ['', 'nothing.txt', 'sub', './nowhere/x', 'x'*3000, 'nul\0', '~nobody/x', '/dev/null', 'bad.txt'])
no_model = st.sampled_from(
    ['', 'tiny-flex', './nowhere', 'sub', '/', '.', 'bad.txt', '/dev/null', 'x'*300, 'nul\0', 'a\nb', 'TINY-FLUX', '🦊'])
no_name = st.sampled_from(['a/b', '/', '../x', 'x/', './x', '.'])
unknown = words_of.filter(lambda w: w and not any(c.isspace() for c in w) and '=' not in w and not any(
    o.startswith(w) for o in ('help', 'pdb', 'xtra')))
SIZES = {'--guidance': bad_float, '--height': bad_int, '--width': bad_int, '--frames': bad_int, '--fps': bad_int}
CONFIG = {
    '--alpha': bad_float, '--window': bad_float | st.just('.99'), '--warmup': bad_int,
    '--degree': bad_int.filter(lambda v: v != '0'), '--lam': bad_float, '--blend': bad_float | st.just('1.0001'),
    '--schedule': st.sampled_from(['', 'sigma', 'uniform', 'window',
                                   'Even']), '--forecaster': st.sampled_from(['', 'linear', 'spectrum', 'gram'])
}
BAD = dict(
    demo={'--model': no_model | st.just('flux'), '--prompts': bad_int, '--seeds': bad_int, '--steps': bad_int}, sample={
        '--prompt': st.sampled_from(['', ' ', '\n\t']), '--model': no_model, '--steps': bad_int,
        '--out': st.sampled_from(['x.jpg', 'x.PNG', 'a.b/c.d', 'x.🦊']), '--seed': st.sampled_from(['x', '1.5', ''])
    } | SIZES | CONFIG, run={
        '--prompts': no_file, '--model': no_model, '--name': no_name, '--limit': bad_int,
        '--seed': bad_int.filter(lambda v: v != '0'), '--seeds': bad_int, '--steps': bad_int
    } | SIZES | CONFIG, bench={
        '--what': words_of.filter(lambda w: w not in ('forecast', 'loop', 'quality')), '--prompts': bad_int,
        '--rounds': bad_int
    }, train={'--model': no_model, '--seed': st.sampled_from(['x', '1.5', ''])})
GOOD = dict(demo=[], sample=['--prompt', 'x'], run=['--prompts', 'good.txt'], bench=[], train=['trained'])

@st.composite
def bad_lines(draw):
    "A line with one thing wrong in it, and harmless things said twice around it"
    name = draw(st.sampled_from([*BAD, 'compare', 'none']))
    if name == 'none':
        return [draw(words_of.filter(lambda w: w not in COMMANDS and w != 'help' and not w.startswith('-')))]
    if name == 'compare':
        return [
            'compare', *draw(
                st.sampled_from([[], ['a'], ['a', 'b', 'c'], ['a', 'b'], ['sub', 'sub'], ['sub', 'bad.txt'],
                                 ['bad.txt', 'sub'], ['nul\0', 'sub'], ['', ''], ['x'*3000, 'sub'],
                                 ['sub', 'sub', '--no'], ['sub', 'sub', '--out'], ['🦊', '\udcff']]))
        ]
    good, (option, values) = GOOD[name], draw(st.sampled_from(sorted(BAD[name].items(), key=lambda i: i[0])))
    wrong = draw(
        st.one_of(values.map(lambda v: [f'{option}={v}']),
                  values.filter(lambda v: not v.startswith('-')).map(lambda v: [option, v]),
                  unknown.map(lambda w: [f'--{w}-']), st.just([option]), st.sampled_from([['stray'], [option,
                                                                                                      option]])))
    return [name, *good, *draw(st.sampled_from([[], [], ['--pdb']])), *wrong]

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cli')
    (folder/'sub').mkdir()
    (folder/'bad.txt').write_bytes(b'caf\xe9')
    (folder/'good.txt').write_text('a red circle')
    return folder

@examples(300, 3000)
@given(line=bad_lines())
def test_bad_command_lines_are_answered_in_one_line(line, place):
    refused(cli(place, *line))

@pytest.mark.parametrize('name', COMMANDS)
def test_help(name, place):
    assert cli(place, name, '--help') == (0, '', set())

HUGE = '1' + '0'*400
@pytest.mark.parametrize('line, word', [
    (['sample', '--prompt', 'x', '--steps', HUGE], 'steps'),
    (['sample', '--prompt', 'x', '--degree', HUGE], 'degree'),
    (['run', '--prompts', 'good.txt', '--limit', HUGE], 'limit'),
    (['sample', '--prompt', 'x', '--steps', '1000000'], 'steps'),
    (['sample', '--prompt', 'x', '--steps', '9', '--degree', '1000000'], 'degree'),
    (['demo', '--steps', '1000000'], 'steps'),
    pytest.param(['sample', '--prompt', 'x', '--device', 'cuda'], 'cuda',
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is one')),
    pytest.param(['run', '--prompts', 'good.txt', '--device', 'cuda'], 'cuda',
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is one')),
    (['sample', '--prompt', 'x', '--device', 'toaster'], 'toaster'),
    (['bench', '--what', 'loop', '--device', 'toaster'], 'toaster'),
    (['sample', '--prompt', 'x', '--steps', '1', '--seed', '9'*30], 'seed'),
    (['sample', '--prompt', 'x', '--steps', '1', '--frames', '3'], 'num_frames'),
    (['sample', '--prompt', 'x', '--steps', '1', '--out', 'good.txt/x'], ''),
    (['sample', '--prompt', 'x', '--steps', '1', '--height', '9'*30], 'height'),
    (['run', '--prompts', 'good.txt', '--steps', '1', '--seed', '9'*30], 'seed'),
    (['run', '--prompts', 'good.txt', '--model', './nowhere', '--name', '..'], 'one folder'),
    (['run', '--prompts', 'good.txt', '--model', './nowhere', '--name', ''], 'one folder'),
    (['sample', '--prompt', '\udcff', '--steps', '1'], 'UTF-8'),
    (['sample', '--prompt', 'x', '--steps', '1', '--guidance', '1e308'], 'guidance'),
    (['sample', '--prompt', 'x', '--steps', '1', '--height', '7'], 'height'),
    (['sample', '--prompt', 'x', '--steps', '1', '--out', '..'], 'out'),
    (['sample', '--prompt', 'x', '--steps', '1', '--out', ''], 'out'),
    (['sample', '--prompt', 'x', '--steps', '1', '--model', 'tiny-wan', '--fps', '9'*20], 'fps'),
    (['train', '', '--model', 'tiny-wan'], 'out'), (['train', 'x', '--seed', '-1'], 'seed'),
    (['train', 'x', '--denoiser_steps', '-5'], 'denoiser'), (['train', 'sub/papers'], 'something else'),
    (['train', 'good.txt'], 'no folder'),
])
def test_arguments_that_are_answered_late_or_badly(line, word, place, tmp_path):
    shutil.copytree(place, tmp_path/'here')
    (tmp_path/'here/sub/papers').mkdir()
    (tmp_path/'here/sub/papers/thesis.txt').write_text('years of work')
    refused(cli(tmp_path/'here', *line), word)


# Plans

numbers = st.sampled_from([0., 1., -1., .5, 2., 1e308, -1e308, 1e-320, 1e-46,
                           float('nan'), float('inf')]) | st.floats(-10, 10)
@st.composite
def odd_plans(draw):
    "(passes, weights, checks): now and then a plan"
    n = draw(st.integers(0, 8))
    square = lambda values: st.lists(st.lists(values, min_size=n, max_size=n), min_size=n, max_size=n)
    passes = draw(
        st.one_of(st.lists(st.integers(-2, 9), max_size=8),
                  st.lists(st.sampled_from([0, 0., 1, True, None, '1', 1.5,
                                            float('nan'), 2**70, [0]]), max_size=4),
                  st.sampled_from([None, 0, 'x', (), range(3), np.arange(3), {0: 1}])))
    weights = draw(
        st.one_of(
            square(numbers),
            st.sampled_from([
                None, 0, 'x', [], [[]], [[1]], [[1, 2], [3]],
                np.eye(3),
                np.eye(3, dtype=int),
                np.eye(2)[None],
                torch.eye(3), [['a']], [[None]], [[1j]]
            ])))
    return passes, weights, draw(st.none() | square(numbers) | st.just('x'))

@st.composite
def near_plans(draw):
    "Triangular weights that read earlier passes: plans unless one number is odd"
    n = draw(st.integers(1, 12))
    passes = sorted({0} | draw(st.sets(st.integers(0, n - 1))))
    values = st.sampled_from([0., 1., -1., .5, 2., -3.25]) | st.floats(-4, 4)
    W, C = np.zeros((n, n)), np.zeros((n, n))
    for i in range(n):
        for p in passes:
            if i == p: W[i, p] = 1
            elif p < i: (C if i in passes else W)[i, p] = draw(values)
    if draw(st.booleans()) and draw(st.booleans()):
        W[draw(st.integers(0, n - 1)), draw(st.integers(0, n - 1))] = draw(numbers)
    return passes, W, C

def execute(plan):
    toy, oracle, rng = Toy(), Oracle(plan, plan.n_steps), np.random.default_rng(0)
    bounded = np.abs(plan.weights).max() < 1e6 and np.abs(
        plan.checks).max() < 1e6 and not ((np.abs(plan.weights) < 1e-30) & (plan.weights != 0)).any()
    with apply_spectrum(toy, plan) as run:
        for i in range(plan.n_steps):
            x = rng.integers(1, 33, (2, 4))/4
            got, before = toy(torch.tensor(x, dtype=torch.float32), i/4), toy.passes
            want, slack, ran = oracle.call('', x, torch.float32, i/4)
            if bounded: assert (abs(got.double().numpy() - want) <= slack + 1e-30).all()
            assert torch.isfinite(got).all()
    assert run.stats[0].n_steps == plan.n_steps
    if bounded: same_stats(run.stats, oracle.stats)
    repr(plan)
    plan.first(1)

@examples(250, 2000)
@given(odd_plans() | near_plans())
def test_a_plan_is_refused_or_executed(parts):
    try: plan = Plan(*parts)
    except (ValueError, TypeError): return
    execute(plan)

@pytest.mark.parametrize('passes, weights', [([float('inf')], [[1.]]), ([0], [[10**400]])])
def test_infinite_plans_are_refused(passes, weights):
    with pytest.raises((ValueError, TypeError)): Plan(passes, weights)

def test_passes_may_be_a_generator(): assert Plan((p for p in (0, 1)), np.eye(2)).passes == [0, 1]

def test_a_forecast_from_nothing_is_refused():
    with pytest.raises(ValueError, match='step 1 is no pass and its row of weights is zero'):
        Plan([0], [[1, 0], [0, 0]])

CALIBRATION = json.loads((files('spectrum_nb')/'weights'/'tiny-flux'/'calibration_28.json').read_text())

@examples(60, 2000)
@given(st.sampled_from(sorted(CALIBRATION)),
       st.one_of(st.none(), numbers, st.text(max_size=3), st.lists(numbers, max_size=4),
                 st.dictionaries(st.text(max_size=3), numbers, max_size=2)), st.booleans())
def test_a_damaged_calibration_is_refused_or_plans(tmp_path_factory, key, value, missing):
    file = tmp_path_factory.getbasetemp()/'calibration.json'
    file.write_text(json.dumps({k: v for k, v in CALIBRATION.items() if k != key} | ({} if missing else {key: value})))
    try: made = Calibration.load(file)
    except ValueError as e:
        assert 'calibration.json' in str(e)
        return
    assert made.plan(8).n_steps == 28

WORDS = None, True, 'x', [], [0, 2, 5], 10**30, np.float32(.5), np.int64(3), 'growing', 'even', Newton, max
junk = st.one_of(st.integers(-2, 9), numbers, st.sampled_from(WORDS))
def some_of(*kinds):
    "(class, some settings) of one of the kinds, or something else altogether"
    settings = lambda kind: st.fixed_dictionaries({}, optional={f.name: junk for f in fields(kind)})
    return st.one_of(*[st.tuples(st.just(kind), settings(kind)) for kind in kinds], junk)

@examples(300, 3000)
@given(some_of(*SCHEDULES.values(), Listed), some_of(Chebyshev, Newton, DampedLine, Blend, SteadyLine),
       st.none() | junk, st.none() | junk,
       st.integers(-1, 30))
def test_a_config_is_refused_or_planned(schedule, forecaster, keep, tolerance, n):
    def made(part): return part[0](**part[1]) if isinstance(part, tuple) else part
    degree = forecaster[1].get('degree') if isinstance(forecaster, tuple) else None
    if isinstance(degree, int) and degree > 99: reject()                    # more than memory holds
    try: plan = make_plan(SpectrumConfig(made(schedule), made(forecaster), keep, tolerance), n)
    except (ValueError, TypeError): return
    execute(plan)
