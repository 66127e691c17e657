"Spectrum in the pipelines as they are: the default, the threshold of the comparisons, schedules and calibration"
import diffusers
import numpy as np
import pytest
import torch

from spectrum_nb.anatomy import blocks_of, count_calls
from spectrum_nb.apply import apply_spectrum
from spectrum_nb.calibrate import record
from spectrum_nb.forecast import DampedLine, Newton
from spectrum_nb.noise_gaps import NoiseSpaced
from spectrum_nb.plan import Plan, make_plan
from spectrum_nb.presets import call_defaults
from spectrum_nb.schedule import Even, Listed
from spectrum_nb.scheduler_facts import levels_of
from spectrum_nb.settings import SpectrumConfig

from four_runs import ALL, N, NEAR, PLAN, captions, check_four_runs, followed, load_tiny, traces
from pipelines import relative

pytestmark = pytest.mark.filterwarnings('ignore')

# The default, and the threshold of these tests

@pytest.mark.parametrize('name', ALL)
def test_the_default_follows_the_noise_levels(name):
    pipe, denoiser, sample = load_tiny(name)
    plain, before = sample(), traces(denoiser)

    with apply_spectrum(pipe) as run: fast = sample()

    plan = make_plan(SpectrumConfig(), N, levels_of(pipe.scheduler))
    assert followed(run.stats, plan)
    assert len(plan.passes) == 8
    assert plan.passes != make_plan(SpectrumConfig(), N).passes
    assert 0 < relative(fast, plain) < .35
    assert traces(denoiser) == before
    assert torch.equal(sample(), plain)


@pytest.mark.parametrize('name', ALL)
def test_the_threshold_would_catch_a_broken_history(name):
    pipe, denoiser, sample = load_tiny(name)
    plain, fast, _ = check_four_runs(sample, pipe, denoiser)
    W = np.zeros((N, N))
    W[:, 0] = 1
    W[PLAN.passes] = np.eye(N)[PLAN.passes]       # every forecast gives what step 0 gave
    with apply_spectrum(pipe, Plan(PLAN.passes, W)): stale = sample()

    print(f'\n{name}: Spectrum {relative(fast, plain):.3f}, stale {relative(stale, plain):.3f}')
    assert relative(fast, plain) < NEAR < relative(stale, plain)


# Schedules and calibration

@pytest.mark.parametrize('name', ALL)
def test_passes_where_the_samplers_steps_are_large(name):
    pipe, denoiser, sample = load_tiny(name)
    config = SpectrumConfig(NoiseSpaced(6), Newton(1))
    with apply_spectrum(pipe, config) as run, count_calls(blocks_of(denoiser)) as counts:
        sample()
        sample(num_inference_steps=9)             # planned anew for another length

    assert len(pipe.scheduler.sigmas) == 10
    assert run.stats[-1].passes == config.passes(9, pipe.scheduler.sigmas.tolist())
    assert all(s.n_passes == 6 and not s.fallbacks for s in run.stats)
    assert counts == [6*len(run.stats)]*len(counts)


def test_passes_are_spaced_evenly_where_a_sampler_tells_no_noise_levels():
    pipe, _, sample = load_tiny('tiny-sdxl')
    own, config = pipe.scheduler.config, SpectrumConfig(NoiseSpaced(6))

    pipe.scheduler = diffusers.IPNDMScheduler.from_config(own)
    with apply_spectrum(pipe, config) as run: sample()
    assert [s.passes for s in run.stats] == [Even(6)(N)]

    pipe.scheduler = diffusers.DDIMScheduler.from_config(own)           # tells them by its alphas
    with apply_spectrum(pipe, config) as run: sample()
    assert [s.passes for s in run.stats] == [make_plan(config, N, levels_of(pipe.scheduler)).passes]


def test_a_published_list_is_followed_and_refuses_a_run_of_another_length():
    pipe, _, sample = load_tiny('tiny-flux')
    passes = [0, 1, 3, N - 1]
    with apply_spectrum(pipe, SpectrumConfig(Listed(passes, N), DampedLine())) as run:
        sample()
        with pytest.raises(ValueError, match=f'is for {N} steps but the run has {N + 1}'):
            sample(num_inference_steps=N + 1)
    assert run.stats and all(s.passes == passes for s in run.stats)


CONTEXTS = {'tiny-wan': {'cond', 'uncond'}, 'tiny-flux': {'cond'}, 'tiny-hunyuan': {'cond'}}


@pytest.mark.parametrize('name', ALL)
def test_a_calibration_leaves_the_pipeline_as_it_was(name):
    pipe, denoiser, sample = load_tiny(name)
    call = call_defaults(pipe, name)
    plain, before, scheduler = sample(), traces(denoiser), pipe.scheduler

    calibration = record(pipe, captions(pipe, name, 1), N, probes=(2, 1), **call)
    assert traces(denoiser) == before
    assert pipe.scheduler is scheduler
    assert torch.equal(sample(), plain)
    assert set(calibration.hidden) == CONTEXTS.get(name, {''})

    for feature in ('hidden', 'output'):
        plan = calibration.plan(7, forecaster='gram', feature=feature)
        with apply_spectrum(pipe, plan, feature=feature) as run: fast = sample()
        assert all(s.n_passes == 7 and not s.fallbacks for s in run.stats)
        assert relative(fast, plain) < NEAR


@pytest.mark.parametrize('when', ['in a full run', 'in a disturbed one'])
def test_an_interrupted_calibration_leaves_the_pipeline_as_it_was(when):
    pipe, denoiser, sample = load_tiny('tiny-flux')
    call, calls = call_defaults(pipe, 'tiny-flux'), []
    plain, before, scheduler = sample(), traces(denoiser), pipe.scheduler
    last = 5 if when == 'in a full run' else N + 5

    def interrupt(*_):
        calls.append(1)
        if len(calls) == last: raise KeyboardInterrupt

    embedder = denoiser.x_embedder.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt): record(pipe, ['a red cross'], N, **call)
    embedder.remove()

    assert traces(denoiser) == before
    assert pipe.scheduler is scheduler
    assert torch.equal(sample(), plain)
