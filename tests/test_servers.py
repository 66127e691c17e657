"A pipeline that serves requests for long: caches are bounded, memory is flat, swapped models and adapters are noticed"
import copy
import gc
import warnings

import numpy as np
import pytest
import torch

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.settings import SpectrumConfig
from spectrum_nb.shipped import shipped_calibration

from pipelines import latents, random_lora, tiny_pipeline
from profiles import NIGHTLY
from toys import N, PAPER, PASSES, Toy, loop, resident, state_of

pytestmark = pytest.mark.filterwarnings('ignore')

# Servers

def test_every_cache_is_bounded():
    with apply_spectrum(toy := Toy(), SpectrumConfig(speedup=2), N) as run:
        finder, book = run.hooks[0].finder, run.book
        for n in range(2, 300): run.plan_for(n, sigmas=tuple(np.linspace(1, 0, n + 1)))
        assert len(book._plans) <= book.KEPT_PLANS

        for k in range(700):
            with toy.cache_context(f'request {k}'): loop(toy, range(2))
        assert len(finder.runs) <= 2*finder.KEPT
        assert len(finder.calls) <= 2*finder.KEPT
        assert len(finder.clock.known) <= 64

        for _ in range(book.KEPT_STATS + 10): book.note(None)
        assert len(run.stats) <= book.KEPT_STATS


def test_memory_is_flat_over_requests_of_any_size_and_length():
    rng, n = np.random.default_rng(0), 10_000 if NIGHTLY else 400

    def request(toy):
        "A run of any length and size, of three in ten the end is cut off"
        steps, size = int(rng.integers(1, 30)), int(rng.integers(1, 40))
        times = np.linspace(rng.uniform(.3, 1), 0, steps + 1)[:-1]
        times = times[:steps if rng.random() < .7 else int(rng.integers(1, steps + 1))]
        loop(toy, times, torch.ones(int(rng.integers(1, 3)), size))

    with torch.no_grad(), apply_spectrum(toy := Toy(), SpectrumConfig(), 12):
        for _ in range(200): request(toy)
        gc.collect()
        before = resident()
        for _ in range(n): request(toy)
        gc.collect()
        assert resident() - before < 6_000_000


def test_a_denoiser_that_is_swapped_is_noticed_and_followed(flux):
    pipe, call = flux
    first, second = pipe.transformer, copy.deepcopy(pipe.transformer)
    states = lambda: (state_of(first), state_of(second), list(vars(pipe)))
    plain, before = latents(pipe, call), states()
    try:
        with apply_spectrum(pipe, PAPER) as run:
            fast = latents(pipe, call)
            pipe.transformer = second
            with pytest.warns(UserWarning, match='holds another transformer'): swapped = latents(pipe, call)
            assert torch.equal(swapped, fast)
            assert [s.passes for s in run.stats] == [PASSES]*2
            assert state_of(first) == before[0]

            pipe.transformer = first
            assert torch.equal(latents(pipe, call), fast)
            assert len(run.stats) == 3
        assert states() == before
        assert torch.equal(latents(pipe, call), plain)
    finally: pipe.transformer = first


def test_adapters_that_are_changed_within_a_run_begin_a_new_history(flux):
    pipe, call = tiny_pipeline('tiny-flux')
    weights = random_lora(pipe.transformer, 'transformer', 1)

    def sample_with(change):
        "The fallbacks of a run after whose step 7 the adapters are changed"
        def at(pipe, i, t, given):
            if i == 7: change()
            return given

        with apply_spectrum(pipe, PAPER) as run: latents(pipe, call, callback_on_step_end=at)
        return run.stats[0].fallbacks

    for change in (lambda: pipe.load_lora_weights(dict(weights), adapter_name='one'),
                   lambda: pipe.set_adapters(['one'], [.2]), pipe.disable_lora, pipe.unload_lora_weights):
        fallbacks = sample_with(change)
        assert list(fallbacks) == [8]
        assert 'adapters' in fallbacks[8]


def test_a_calibration_looks_at_the_model_and_not_at_what_adapters_add(flux):
    pipe, call = tiny_pipeline('tiny-flux')
    calibration = shipped_calibration('tiny-flux', 28)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        calibration.check(pipe, 28, call)
        pipe.load_lora_weights(random_lora(pipe.transformer, 'transformer', 1))
        calibration.check(pipe, 28, call)
        pipe.unload_lora_weights()
        pipe.transformer.fuse_qkv_projections()
        calibration.check(pipe, 28, call)

    with pytest.warns(UserWarning, match='dtype'): calibration.check(pipe.to(torch.bfloat16), 28, call)
    pipe.to(torch.float32)
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith('_')}
    pipe.transformer = type(pipe.transformer)(**config | dict(num_layers=config['num_layers'] + 1))
    with pytest.raises(ValueError, match='num_layers was'): calibration.check(pipe, 28, call)
