"The engine at its edges: odd features, names and precisions; removal in odd moments; forecasts that overflow"
import gc
import weakref

import pytest
import torch

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.plan import Plan
from spectrum_nb.settings import SpectrumConfig

from oracle import DTYPES
from toys import FaultyToy

pytestmark = pytest.mark.filterwarnings('ignore')

# Odd features, and removal in odd moments

def test_a_feature_that_changes_its_shape_at_two_passes_in_a_row_begins_two_histories():
    with apply_spectrum(toy := FaultyToy(), SpectrumConfig.paper(), 20):
        for i in range(20): toy(torch.ones(2, 4), float(i), copies=min(i, 2) + 1)


def test_a_feature_may_be_a_scalar():
    with apply_spectrum(toy := FaultyToy(), SpectrumConfig.paper(blend=0), 9):
        got = [toy(torch.tensor(1.), float(i)).item() for i in range(9)]
    assert got == pytest.approx([2*(1 + 3*i) for i in range(9)])


def test_an_empty_batch_passes_as_it_does_without():
    with apply_spectrum(toy := FaultyToy(), SpectrumConfig.paper(), 9):
        shapes = [toy(torch.ones(0, 4), float(i)).shape for i in range(9)]
    assert shapes == [(0, 4)]*9


def test_contexts_that_differ_by_a_blank_do_not_mix():
    toy = FaultyToy()
    with apply_spectrum(toy, SpectrumConfig.paper(), 9) as run:
        for i in range(9):
            for name in ('a', 'a '):
                with toy.cache_context(name): toy(torch.ones(2), float(i))
    assert [s.context for s in run.stats] == ['a', 'a ']


def test_a_head_that_works_in_float32_is_forecast_in_float32():
    class Upcast(FaultyToy):
        def forward(self, hidden_states, timestep): return super().forward(hidden_states.float(), timestep)

    x, toy = torch.ones(2, 64, dtype=torch.bfloat16), Upcast()
    with apply_spectrum(toy, SpectrumConfig.paper(blend=0), 9):
        got = [toy(x, i*.1)[0, 0].item() for i in range(9)]        # the feature of step 0 is 1, exact in bfloat16
    assert got == pytest.approx([2*(1 + .3*i) for i in range(9)], rel=1e-5)


def test_removal_during_a_call_does_not_spoil_it():
    toy = FaultyToy()
    handle = apply_spectrum(toy, SpectrumConfig.paper(blend=0), 9)
    for i in range(5): toy(torch.ones(2), float(i))

    def remove_within(x):                                      # as another thread, or a callback, might
        handle.remove()
        return x

    toy.embed.forward = remove_within
    try: got = toy(torch.ones(2), 5.)                          # a forecast
    except RuntimeError: return                                # refused in words would do, too
    assert got.tolist() == [32., 32.], f'{got.tolist()} came out'


def test_a_wrapper_put_on_later_survives_removal():
    toy, calls = FaultyToy(), []
    handle = apply_spectrum(toy, SpectrumConfig.paper(), 9)
    inner = toy.forward

    def wrapper(*args):
        calls.append(1)
        return inner(*args)

    toy.forward = wrapper
    handle.remove()
    toy(torch.ones(2), 0.)
    assert calls


def test_removal_frees_the_history_of_an_unfinished_run_at_once():
    toy = FaultyToy()
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
    plan = Plan([0], [[1, 0, 0], [1000, 0, 0], [.5, 0, 0]])
    with apply_spectrum(toy := FaultyToy(), plan) as run: first, second, third = (toy(x, i*1e-6) for i in range(3))

    assert torch.equal(first, 2*x)
    assert torch.equal(second, 2*x)
    assert torch.equal(third, x)
    assert run.stats[0].passes == [0, 1]
    assert run.stats[0].fallbacks == {1: 'the forecast is not finite'}
