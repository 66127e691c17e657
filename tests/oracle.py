"An executor of plans in float64, written without the engine: what must come out, and how far off it may be"
from dataclasses import fields

import numpy as np
import torch
from hypothesis import reject, strategies as st

from spectrum_nb.forecast import SteadyLine
from spectrum_nb.noise_gaps import NoiseQuantiles
from spectrum_nb.plan import Plan, make_plan
from spectrum_nb.settings import SpectrumConfig

from toys import Bang

# the unit of the last place of a type, and how far off a weighted sum of it may be
EPS = {torch.float32: (2**-23, 2e-6), torch.float64: (2**-52, 1e-14), torch.bfloat16: (2**-8, 3e-5)}
# how far off the share of a line may be
ACCURACY = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-5}
DTYPES = tuple(EPS)


def ratios_of(seen):
    """{pass: ([rows] γ, how far off a float32 γ may be, in units of the last place)} of the calls of a run, from the
    formulas of the page damping: the velocity at a pass is what the sample moves to the next call, where a step is the
    unit of time"""
    velocity = {}
    for (i, x, is_pass), (j, y, _) in zip(seen, seen[1:]):
        if is_pass and j == i + 1 and x.ndim > 1: velocity[i] = (y - x).reshape(len(x), -1)

    ratios, steps = {}, sorted(velocity)
    for a, b, c in zip(steps, steps[1:], steps[2:]):
        promised = (c - b)/(b - a)*(velocity[b] - velocity[a])
        came = velocity[c] - velocity[b]
        size = (promised**2).sum(1)
        size[size == 0] = np.inf                   # where nothing was promised nothing came true
        ratios[c] = (promised*came).sum(1)/size, abs(promised*came).sum(1)/size
    return ratios


def share_of(ratios, line):
    "([rows] share of the line that the next forecast follows, how far off it may be in the same units)"
    if not ratios: return np.array([float(line.first)]), np.zeros(1)
    latest = [ratios[p] for p in sorted(ratios)[-line.memory:]]
    smallest = np.min([rho for rho, _ in latest], 0)
    off = np.max([off for _, off in latest], 0)
    share = line.base*np.isfinite(smallest) + line.trust*np.nan_to_num(smallest, posinf=0., neginf=0.)
    return np.clip(share, 0, 1), np.nan_to_num(line.trust*off)


def weighted_sum(row, features):
    "(the sum of features with the weights of a row, the sum of the absolute values)"
    used = np.flatnonzero(row)
    return sum(row[k]*features[k] for k in used), sum(abs(row[k]*features[k]) for k in used)


def one_a_row(values, h):
    "Values of the rows of a feature, shaped so that they multiply it"
    return np.reshape(values, (-1, *[1]*(h.ndim - 1))) if h.ndim else values[0]


class Oracle:
    "What must come out, call by call: (output, how far off it may be, whether the blocks ran), or `Bang`"
    def __init__(self, config, n, feature='hidden', measure=True, wide=False, first=None):
        self.config, self.n, self.first = config, n, first
        self.output, self.measure, self.wide = feature == 'output', measure, wide
        self.runs, self.stats, self.ticks = {}, [], 0

    def step(self, context):
        "The step that the next call in a context is"
        run = self.runs.get(context)
        return 0 if run is None or run['i'] == self.n else run['i']

    def plan_for(self, run, start):
        "The plan of the steps from `start` on"
        left = self.n - start
        if not isinstance(self.config, Plan):
            return make_plan(self.config, self.first if self.first and not start else left)
        undisturbed = not start and not run['why']
        return self.config if undisturbed else make_plan(SpectrumConfig(speedup=1), left)

    def begin(self, run, start):
        "Begin a history at the step `start` of a run"
        left = self.n - start
        plan = self.plan_for(run, start)
        W, C, S = plan.weights[:left, :left], plan.checks[:left, :left], plan.slopes[:left, :left]
        uses = lambda k: [j for j in range(k + 1, left) if W[j, k] or C[j, k] or S[j, k]]
        last_use = [max(uses(k), default=-1) for k in range(left)]
        kept = [sum(last_use[k] > i for k in range(i + 1)) for i in range(left)]
        run |= dict(start=start, W=W, C=C, S=S, line=plan.damping, seen=[], h={},
                    passes_planned={p for p in plan.passes if p < left}, last_use=last_use, capacity=max(kept))

    def run_of(self, context):
        "The run that a call in a context belongs to; a new one where there is none or it is over"
        self.ticks += 1
        run = self.runs.get(context)
        # a first call that failed leaves nothing: the next one begins the run
        if run is None or run['i'] == self.n or run['unborn']:
            # contexts that were not called since are of runs that are over
            since = run['began'] if run else 0
            self.runs = {c: r for c, r in self.runs.items() if r['called'] >= since}
            run = dict(began=self.ticks, i=0, kind=None, passes=[], why={}, errors={}, forced=set(), nbytes=0,
                       unborn=False)
            self.runs[context] = run
            self.begin(run, 0)
        run['called'] = self.ticks
        return run

    def weigh(self, run, row, slope, kept):
        "(feature, size of what is summed, how much farther off a measured share of a line may put it), or None"
        all_kept = lambda weights: all(k in run['h'] for k in np.flatnonzero(weights))
        if not row.any() or not all_kept(row): return None
        h, size = weighted_sum(row, run['h'])
        if run['line'] is None or not slope.any(): return h, size, 0*size
        if not all_kept(slope): return None

        share, off = share_of(ratios_of(run['seen']), run['line'])
        share = one_a_row(share, h)
        off = one_a_row(np.minimum(off*ACCURACY[kept], 1), h)
        added, added_size = weighted_sum(slope, run['h'])
        rounding = EPS[kept][0]*(abs(h) + abs(added))
        return h + share*added, size + added_size, off*abs(added) + rounding

    def measure_error(self, run, i, at, truth, kept):
        "Note the error at a pass, and force a pass at the next step where it is above the tolerance"
        check = self.weigh(run, run['C'][at], run['S'][at], kept)
        if check is None: return
        predicted, summed, farther = check
        (eps, acc), norm = EPS[kept], np.linalg.norm
        size = norm(truth)
        if size == 0: reject()
        error = norm(predicted - truth)/size
        off = (acc*norm(summed) + norm(farther) + 2*eps*(norm(predicted) + size))/size + 1e-5*error
        run['errors'][i] = error, off

        limit = getattr(self.config, 'tolerance', None)
        if limit is None: return
        if abs(error - limit) <= off: reject()      # either answer would be right
        if error > limit and i + 1 < self.n and at + 1 not in run['passes_planned']:
            run['forced'].add(i + 1)
            run['why'][i + 1] = 'tolerance'

    def note_pass(self, run, i, at, truth, kept):
        "What a pass leaves behind: an error measured, a feature kept, or a new history where it is not finite"
        run['passes'].append(i)
        if not np.isfinite(truth).all():
            run['why'][i] = 'not finite'
            if i + 1 < self.n: self.begin(run, i + 1)
            return
        if self.measure and run['C'][at].any(): self.measure_error(run, i, at, truth, kept)
        if at in run['passes_planned']:
            run['h'][at] = truth
            if run['last_use'][at] > at:
                run['nbytes'] = max(run['nbytes'], run['capacity']*truth.size*kept.itemsize)

    def call(self, context, x, dtype, t, bang=None, sample=None):
        run = self.run_of(context)
        i, kind = run['i'], (x.shape, dtype)
        if run['kind'] not in (None, kind):
            run['why'][i] = 'input'
            self.begin(run, i)
        run['kind'] = kind
        at, planned = i - run['start'], i - run['start'] in run['passes_planned']
        kept = torch.float32 if self.wide and dtype == torch.float64 else dtype
        run['seen'].append((i, x if sample is None else sample, planned))

        forecast = None
        if not planned and i not in run['forced']:
            forecast = self.weigh(run, run['W'][at], run['S'][at], kept)
            if forecast is None: run['why'][i] = 'missing'
        is_pass = forecast is None
        # at a forecast the embedding and the head run, unless it is the output that is forecast
        if bang and (is_pass or (not self.output and not bang.startswith('block'))):
            run['unborn'] = i == 0
            raise Bang

        factor = 1 if self.output else 2
        if is_pass:
            truth = (x + 3*t)*(2 if self.output else 1)
            out, slack = factor*truth, 0
            self.note_pass(run, i, at, truth, kept)
        else:
            (eps, acc), (h, size, farther) = EPS[kept], forecast
            out, slack = factor*h, factor*(eps*abs(h) + acc*size + farther)
        run['i'] += 1
        if run['i'] == self.n: self.stats.append(self.stats_of(context, run))
        return out, slack, is_pass

    def stats_of(self, context, run):
        "What is to be known of a run that is over"
        ratios = ratios_of(run['seen']) if run['line'] else {}
        return context, self.n, run['passes'], run['why'], run['errors'], run['nbytes'], ratios


WHY = {
    'input': 'the input changed', 'missing': 'a pass that', 'tolerance': 'the error measured',
    'not finite': 'the feature is not finite'
}


def same_stats(got, want):
    "Assert that the statistics of the runs are those of the oracle, numbers as near as they can be"
    assert len(got) == len(want)
    for s, (context, n, passes, why, errors, nbytes, ratios) in zip(got, want):
        assert (s.context, s.n_steps, s.passes, s.nbytes) == (context, n, passes, nbytes)

        assert s.fallbacks.keys() == why.keys(), (s.fallbacks, why)
        assert all(s.fallbacks[i].startswith(WHY[reason]) for i, reason in why.items()), (s.fallbacks, why)

        assert s.errors.keys() == errors.keys(), (s.errors, errors)
        assert all(abs(s.errors[i] - error) <= off for i, (error, off) in errors.items()), (s.errors, errors)

        assert s.ratios.keys() == ratios.keys(), (s.ratios, ratios)
        for p, (rho, off) in ratios.items():
            atol = 1e-5*np.nan_to_num(off.max())
            assert np.isclose(s.ratios[p], np.min(rho), rtol=1e-5, atol=atol, equal_nan=True), (s.ratios, ratios)


# Settings at random

keeps = st.none() | st.integers(1, 8)
tolerances = st.none() | st.floats(0, 3)
PAPER_SETTINGS = ('degree', 'lam', 'blend', 'window', 'alpha', 'warmup', 'keep', 'tolerance')
paper_configs = st.tuples(
    st.integers(0, 6), st.sampled_from([0, 0., .01, .1, 10.]), st.sampled_from([0, .3, .5, 1]), st.floats(1, 6),
    st.floats(0, 4), st.integers(1, 8), keeps, tolerances)
noise_quantiles = st.builds(
    NoiseQuantiles, speedup=st.none() | st.floats(1, 6), power=st.floats(0, 2), room=st.floats(0, 2),
    least=st.integers(1, 8))
steady_lines = st.builds(
    SteadyLine, trust=st.sampled_from([0, .5, 1., 2., 5.]), base=st.sampled_from([0., .5, 1.]),
    first=st.sampled_from([0., .5, 1.]), memory=st.integers(1, 4))
steady_configs = st.tuples(noise_quantiles, steady_lines, keeps, tolerances)
default_config = st.just(tuple(getattr(SpectrumConfig(), f.name) for f in fields(SpectrumConfig)[:4]))
configs = paper_configs | steady_configs | default_config


def config_of(drawn):
    "The config of settings that were drawn; ridge strength 0 where it cannot be becomes .1"
    if isinstance(drawn[0], NoiseQuantiles): return SpectrumConfig(*drawn)
    settings = dict(zip(PAPER_SETTINGS, drawn))
    try: return SpectrumConfig.paper(**settings)
    except ValueError: return SpectrumConfig.paper(**settings | dict(lam=.1))
