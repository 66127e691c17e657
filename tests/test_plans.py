"Plans and settings at random: each is refused in words, or does in the engine what the executor in float64 does"
import json
from dataclasses import fields
from importlib.resources import files

import numpy as np
import pytest
import torch
from hypothesis import given, reject, strategies as st

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.calibration import Calibration
from spectrum_nb.forecast import Blend, Chebyshev, DampedLine, Newton, SteadyLine
from spectrum_nb.noise_gaps import SCHEDULES
from spectrum_nb.plan import Plan, make_plan
from spectrum_nb.schedule import Listed
from spectrum_nb.settings import SpectrumConfig

from oracle import Oracle, same_stats
from profiles import examples
from toys import FaultyToy

pytestmark = pytest.mark.filterwarnings('ignore')

# Plans

NUMBERS = 0., 1., -1., .5, 2., 1e308, -1e308, 1e-320, 1e-46, float('nan'), float('inf')
numbers = st.sampled_from(NUMBERS) | st.floats(-10, 10)
ODD_PASSES = None, 0, 'x', (), range(3), np.arange(3), {0: 1}
ODD_STEPS = 0, 0., 1, True, None, '1', 1.5, float('nan'), 2**70, [0]
ODD_WEIGHTS = (None, 0, 'x', [], [[]], [[1]], [[1, 2], [3]], np.eye(3), np.eye(3, dtype=int), np.eye(2)[None],
               torch.eye(3), [['a']], [[None]], [[1j]])


@st.composite
def odd_plans(draw):
    "(passes, weights, checks): now and then a plan"
    n = draw(st.integers(0, 8))
    square = st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=n, max_size=n)
    some_passes = st.lists(st.integers(-2, 9), max_size=8)
    odd_passes = st.lists(st.sampled_from(ODD_STEPS), max_size=4)
    passes = draw(st.one_of(some_passes, odd_passes, st.sampled_from(ODD_PASSES)))
    weights = draw(st.one_of(square, st.sampled_from(ODD_WEIGHTS)))
    checks = draw(st.none() | square | st.just('x'))
    return passes, weights, checks


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


def is_bounded(plan):
    "Whether the numbers of a plan are such that float32 follows float64"
    largest = max(np.abs(plan.weights).max(), np.abs(plan.checks).max())
    tiny = (np.abs(plan.weights) < 1e-30) & (plan.weights != 0)
    return largest < 1e6 and not tiny.any()


def execute(plan):
    "Run a plan: what comes out is finite, and what the oracle says where the numbers are not extreme"
    toy, oracle, rng = FaultyToy(), Oracle(plan, plan.n_steps), np.random.default_rng(0)
    bounded = is_bounded(plan)
    with apply_spectrum(toy, plan) as run:
        for i in range(plan.n_steps):
            x = rng.integers(1, 33, (2, 4))/4
            got = toy(torch.tensor(x, dtype=torch.float32), i/4)
            want, slack, _ = oracle.call('', x, torch.float32, i/4)
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


def test_passes_may_be_a_generator():
    plan = Plan((p for p in (0, 1)), np.eye(2))
    assert plan.passes == [0, 1]


def test_a_forecast_from_nothing_is_refused():
    with pytest.raises(ValueError, match='step 1 is no pass and its row of weights is zero'):
        Plan([0], [[1, 0], [0, 0]])


# A saved calibration

CALIBRATION = json.loads((files('spectrum_nb')/'weights'/'tiny-flux'/'calibration_28.json').read_text())
odd_values = st.one_of(st.none(), numbers, st.text(max_size=3), st.lists(numbers, max_size=4),
                       st.dictionaries(st.text(max_size=3), numbers, max_size=2))


@examples(60, 2000)
@given(st.sampled_from(sorted(CALIBRATION)), odd_values, st.booleans())
def test_a_damaged_calibration_is_refused_or_plans(tmp_path_factory, key, value, missing):
    damaged = {k: v for k, v in CALIBRATION.items() if k != key} | ({} if missing else {key: value})
    file = tmp_path_factory.getbasetemp()/'calibration.json'
    file.write_text(json.dumps(damaged))
    try: calibration = Calibration.load(file)
    except ValueError as e:
        assert 'calibration.json' in str(e)
        return
    assert calibration.plan(8).n_steps == 28


# Settings

WORDS = None, True, 'x', [], [0, 2, 5], 10**30, np.float32(.5), np.int64(3), 'growing', 'even', Newton, max
junk = st.one_of(st.integers(-2, 9), numbers, st.sampled_from(WORDS))


def some_of(*kinds):
    "(class, some settings) of one of the kinds, or something else altogether"
    settings = lambda kind: st.fixed_dictionaries({}, optional={f.name: junk for f in fields(kind)})
    return st.one_of(*[st.tuples(st.just(kind), settings(kind)) for kind in kinds], junk)


@examples(300, 3000)
@given(some_of(*SCHEDULES.values(), Listed), some_of(Chebyshev, Newton, DampedLine, Blend, SteadyLine),
       st.none() | junk, st.none() | junk, st.integers(-1, 30))
def test_a_config_is_refused_or_planned(schedule, forecaster, keep, tolerance, n):
    def made(part): return part[0](**part[1]) if isinstance(part, tuple) else part

    degree = forecaster[1].get('degree') if isinstance(forecaster, tuple) else None
    if isinstance(degree, int) and degree > 99: reject()                    # more than memory holds
    try: plan = make_plan(SpectrumConfig(made(schedule), made(forecaster), keep, tolerance), n)
    except (ValueError, TypeError): return
    execute(plan)
