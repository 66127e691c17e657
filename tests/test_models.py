"""What the five tiny pipelines have in common: one test for each promise, over all of them

What is peculiar to a model stands on its page, from `25_flux` to `29_wan`."""
import copy
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from spectrum_nb.anatomy import count_calls
from spectrum_nb.apply import apply_spectrum, find_denoisers
from spectrum_nb.lab.captions import held_captions
from spectrum_nb.lab.flux import flux_embeds, flux_velocity, new_tiny_flux
from spectrum_nb.lab.hunyuan_video import hunyuan_embeds, hunyuan_velocity, new_tiny_hunyuan
from spectrum_nb.lab.sd3 import new_tiny_sd3, sd3_embeds, sd3_velocity
from spectrum_nb.lab.sdxl import new_tiny_sdxl, sdxl_embeds, sdxl_noise
from spectrum_nb.lab.wan import new_tiny_wan, wan_embeds, wan_velocity
from spectrum_nb.plan import make_plan
from spectrum_nb.presets import call_defaults, load_pipeline
from spectrum_nb.settings import SpectrumConfig

STEPS = 50
PASSES = {.75: 14, 3: 10}     # by the growth α of the paper's window
PICTURE, CLIP = (2, 4, 8, 8), (2, 4, 3, 8, 8)      # latents of two samples
TRUE_GUIDANCE = dict(negative_prompt=['']*2, true_cfg_scale=2.5, guidance_scale=1.)


@dataclass(frozen=True)
class Model:
    "What the tests must know of a model that they do not look for themselves"
    name:str
    new:object           # makes the pipeline with random weights
    predict:object       # one call of its denoiser
    embeds:object        # of captions, for that call
    latents:tuple        # shape of those of two samples
    blocks:tuple         # lists of blocks, or single ones
    contexts:tuple       # of the calls of a step
    always:tuple=()      # modules that run at every step
    per_sample:tuple=()  # shape of what the head is given, for one sample
    guided:tuple=()      # further arguments by which a step becomes two calls


MODELS = {m.name: m for m in (
    Model('tiny-flux', new_tiny_flux, flux_velocity, flux_embeds, PICTURE,
          ('transformer_blocks', 'single_transformer_blocks'), ('cond',), ('norm_out',), guided=TRUE_GUIDANCE),
    Model('tiny-sd3', new_tiny_sd3, sd3_velocity, sd3_embeds, PICTURE, ('transformer_blocks',), ('',), ('norm_out',),
          per_sample=(2, 16, 128)),
    Model('tiny-sdxl', new_tiny_sdxl, sdxl_noise, sdxl_embeds, PICTURE, ('down_blocks', 'mid_block', 'up_blocks'),
          ('',), ('conv_norm_out', 'conv_in')),
    Model('tiny-hunyuan', new_tiny_hunyuan, hunyuan_velocity, hunyuan_embeds, CLIP,
          ('transformer_blocks', 'single_transformer_blocks'), ('cond',),
          ('norm_out', 'context_embedder.token_refiner.refiner_blocks.0'), per_sample=(1, 48, 112),
          guided=TRUE_GUIDANCE),
    Model('tiny-wan', new_tiny_wan, wan_velocity, wan_embeds, CLIP, ('blocks',), ('cond', 'uncond'), ('norm_out',)),
)}
every_model = pytest.mark.parametrize('name', MODELS)
N_BLOCKS = {'tiny-flux': 6, 'tiny-sd3': 6, 'tiny-sdxl': 5, 'tiny-hunyuan': 5, 'tiny-wan': 6}


@cache
def tiny(name):
    "(pipeline, its denoiser, arguments of its call, held-out captions)"
    pipe = load_pipeline(name, device='cpu')
    pipe.set_progress_bar_config(disable=True)
    denoiser, = find_denoisers(pipe).values()
    call = call_defaults(pipe, name)
    return pipe, denoiser, call, held_captions(call, 8)


def draw(name, n=2, steps=STEPS, **kwargs):
    "`n` samples, a seed each"
    pipe, _, call, captions = tiny(name)
    generator = [torch.Generator().manual_seed(i) for i in range(n)]
    return pipe(captions[:n], num_inference_steps=steps, generator=generator, output_type='np', **call | kwargs)[0]


def parts(denoiser, names):
    "The modules that `names` mean, those of a list one by one"
    found = [denoiser.get_submodule(n) for n in names]
    return [m for f in found for m in (f if isinstance(f, torch.nn.ModuleList) else [f])]


def planned(alpha, n=STEPS): return make_plan(SpectrumConfig.paper(alpha=alpha), n).passes


def state(module):
    "Every attribute, submodule and hook of a module and of all within it"
    return [dict(d) for m in module.modules() for d in (vars(m), m._modules, m._forward_hooks, m._forward_pre_hooks)]


def same(a, b):
    "Whether two states hold the very same objects"
    return len(a) == len(b) and all(x.keys() == y.keys() and all(x[k] is y[k] for k in x) for x, y in zip(a, b))


# The pipelines

@every_model
def test_the_shipped_pipeline_is_of_the_classes_that_new_ones_are_made_of(name):
    pipe, _, _, captions = tiny(name)
    words = ' '.join(captions).split()
    vae = () if name == 'tiny-flux' else (load_pipeline('tiny-flux', device='cpu').vae,)
    def kinds(p):
        return {k: type(v).__name__ for k, v in p.components.items() if v is not None and 'tokenizer' not in k}
    assert kinds(MODELS[name].new(words, *vae)) == kinds(pipe)


# Counted in the blocks

def counted(name, alpha, n, **kwargs):
    "(how often each block ran, how often the rest, shapes that the head was given, statistics of the run)"
    model, (pipe, denoiser, _, _), sizes = MODELS[name], tiny(name), set()
    blocks, always = parts(denoiser, model.blocks), parts(denoiser, model.always)
    spy = always[0].register_forward_pre_hook(lambda m, args: sizes.add(tuple(args[0].shape)))
    with count_calls([*blocks, *always]) as counts, apply_spectrum(pipe, SpectrumConfig.paper(alpha=alpha)) as run:
        draw(name, n, **kwargs)
    spy.remove()
    return counts[:len(blocks)], counts[len(blocks):], sizes, run.stats


@every_model
@pytest.mark.parametrize('alpha', PASSES)
def test_blocks_run_at_the_passes_and_the_rest_at_every_step(name, alpha):
    model, n = MODELS[name], 3
    ran, always, sizes, stats = counted(name, alpha, n)
    calls = len(model.contexts)
    assert ran == [calls*PASSES[alpha]]*N_BLOCKS[name] and always == [calls*STEPS]*len(model.always)
    if model.per_sample: assert sizes == {(n*model.per_sample[0], *model.per_sample[1:])}
    assert [(s.context, s.n_steps, s.passes, s.fallbacks) for s in stats] == [
        (context, STEPS, planned(alpha), {}) for context in model.contexts]


@pytest.mark.parametrize('name', [m.name for m in MODELS.values() if m.guided])
def test_with_true_guidance_each_branch_has_a_history_and_follows_the_plan(name):
    ran, always, sizes, stats = counted(name, .75, 2, **MODELS[name].guided)
    assert ran == [28]*N_BLOCKS[name] and always == [2*STEPS]*len(MODELS[name].always)
    assert [(s.context, s.passes, s.fallbacks) for s in stats] == [
        (context, planned(.75), {}) for context in ('cond', 'uncond')]


@pytest.mark.parametrize('alpha', PASSES)
def test_wan_follows_the_plan_at_the_shift_of_720p_too(alpha):
    pipe = tiny('tiny-wan')[0]
    own = pipe.scheduler
    pipe.scheduler = type(own).from_config(own.config, flow_shift=5.)
    try: ran, _, _, stats = counted('tiny-wan', alpha, 2)
    finally: pipe.scheduler = own
    assert ran == [2*PASSES[alpha]]*6
    assert [(s.context, s.passes, s.fallbacks) for s in stats] == [
        (context, planned(alpha), {}) for context in ('cond', 'uncond')]


# Two calls are one batch of two

def times(name, scheduler):
    "The scheduler's times for a run, set as the pipeline sets them"
    if name == 'tiny-flux': scheduler.set_timesteps(sigmas=np.linspace(1, 1/STEPS, STEPS), mu=calculate_shift(16))
    elif name == 'tiny-hunyuan': scheduler.set_timesteps(sigmas=np.linspace(1, 0, STEPS + 1)[:-1])
    else: scheduler.set_timesteps(STEPS)
    return scheduler.timesteps


def noise_of(name): return torch.randn(MODELS[name].latents, generator=torch.Generator().manual_seed(0))


def near(a, b): return (a - b).abs().max() < 1e-5*b.abs().max()


def by_pipeline(name, noise):
    "Latents at the end of the pipeline's own run at ten passes"
    pipe, _, call, captions = tiny(name)
    kwargs = call | dict(MODELS[name].guided)
    with apply_spectrum(pipe, SpectrumConfig.paper(alpha=3)):
        return pipe(captions[:2], num_inference_steps=STEPS, latents=noise, output_type='latent', **kwargs)[0]


@pytest.mark.parametrize('name', ['tiny-flux', 'tiny-hunyuan', 'tiny-wan'])
@torch.no_grad()
def test_two_calls_of_a_step_are_one_batch_of_both_branches(name):
    model, (pipe, denoiser, _, captions), x = MODELS[name], tiny(name), noise_of(name)
    pack = (lambda x: pipe._pack_latents(x, *x.shape)) if name == 'tiny-flux' else torch.clone
    apart = by_pipeline(name, pack(x))
    scheduler, embeds = copy.deepcopy(pipe.scheduler), model.embeds(pipe, captions[:2] + ['', ''])
    with apply_spectrum(denoiser, SpectrumConfig.paper(alpha=3), n_steps=STEPS) as run:
        for t in times(name, scheduler):
            both = model.predict(pipe, torch.cat([x, x]), t.expand(4)/1000, embeds, torch.ones(4))
            v_c, v_0 = both.chunk(2)
            x = scheduler.step(v_0 + 2.5*(v_c - v_0), t, x).prev_sample
    assert run.stats[0].n_passes == 10 and near(pack(x), apart)


@pytest.mark.parametrize('name', ['tiny-sd3', 'tiny-sdxl'])
@torch.no_grad()
def test_one_batch_of_both_branches_is_two_calls_of_denoisers_apart(name):
    model, (pipe, denoiser, call, captions), x = MODELS[name], tiny(name), noise_of(name)
    together = by_pipeline(name, x.clone())
    part = 'unet' if name == 'tiny-sdxl' else 'transformer'
    branches = [copy.copy(pipe) for _ in range(2)]
    for b in branches: setattr(b, part, copy.deepcopy(denoiser))
    handles = [apply_spectrum(getattr(b, part), SpectrumConfig.paper(alpha=3), n_steps=STEPS) for b in branches]
    embeds = [model.embeds(pipe, texts) for texts in (captions[:2], ['', ''])]
    scheduler, scale = copy.deepcopy(pipe.scheduler), 1 if name == 'tiny-sdxl' else 1000
    steps = times(name, scheduler)
    scaled = getattr(scheduler, 'scale_model_input', lambda x, t: x)
    x = x*getattr(scheduler, 'init_noise_sigma', 1.)
    for t in steps:
        v_c, v_0 = (model.predict(b, scaled(x, t), t.expand(2)/scale, e) for b, e in zip(branches, embeds))
        x = scheduler.step(v_0 + call['guidance_scale']*(v_c - v_0), t, x).prev_sample
    assert [h.stats[0].n_passes for h in handles] == [10, 10] and near(x, together)


# Nothing is left behind

@every_model
def test_never_skipping_and_having_been_removed_give_the_untouched_sample(name):
    pipe, denoiser, _, _ = tiny(name)
    full, before = draw(name), state(denoiser)
    with apply_spectrum(pipe, SpectrumConfig(speedup=1)) as run: assert (draw(name) == full).all()
    assert [(s.context, s.n_passes) for s in run.stats] == [(c, STEPS) for c in MODELS[name].contexts]
    with apply_spectrum(pipe, SpectrumConfig.paper()): assert not (draw(name) == full).all()
    assert (draw(name) == full).all()
    assert 'forward' not in vars(denoiser) and same(state(denoiser), before)
    # a pipeline that names its calls has made a registry of hooks, in which none is left
    if MODELS[name].contexts == ('',): assert '_diffusers_hook' not in vars(denoiser)
    else: assert not denoiser._diffusers_hook.hooks


def test_one_handle_serves_runs_of_other_lengths_sizes_and_batches():
    pipe, lengths = tiny('tiny-flux')[0], (28, 50, 4, 1, 13, 50)
    with apply_spectrum(pipe, SpectrumConfig.paper()) as run:
        for steps, n in zip(lengths, (1, 3, 2, 1, 8)): draw('tiny-flux', n, steps)
        draw('tiny-flux', 1, height=48, width=32)
    assert [(s.n_steps, s.n_passes) for s in run.stats] == [(n, len(planned(.75, n))) for n in lengths]


# However a run ends

class Stop(Exception): pass


def bomb(error, step):
    "A hook that raises `error` at the call after the first `step`"
    calls = [0]
    def hook(*_):
        calls[0] += 1
        if calls[0] > step: raise error
    return hook


@pytest.fixture
def flux():
    "(pipeline with a handle, its denoiser, state of the lists of blocks, what it draws); untouched in the end"
    pipe, denoiser, _, _ = tiny('tiny-flux')
    full, before = draw('tiny-flux'), state(denoiser)
    handle = apply_spectrum(pipe, SpectrumConfig.paper())
    yield denoiser, before[1], draw('tiny-flux')
    handle.remove()
    assert (draw('tiny-flux') == full).all() and 'forward' not in vars(denoiser)


@pytest.mark.parametrize('where, step', [
    ('single_transformer_blocks.1', 5),     # call 5 of a block is pass 6; of the others it is step 5, a forecast
    ('norm_out', 5), ('proj_out', 6), ('x_embedder', 5)])
@pytest.mark.parametrize('error', [Stop, KeyboardInterrupt])
def test_after_an_exception_anywhere_the_next_run_starts_clean(flux, where, step, error):
    denoiser, modules, want = flux
    hook = denoiser.get_submodule(where).register_forward_hook(bomb(error(), step))
    try:
        with pytest.raises(error): draw('tiny-flux')
    finally: hook.remove()
    assert all(denoiser._modules[name] is m for name, m in modules.items())
    assert len(denoiser.norm_out._forward_pre_hooks) == 1
    assert (draw('tiny-flux') == want).all()


def test_after_an_interrupted_callback_the_next_run_starts_clean(flux):
    def interrupt(pipe, i, t, kwargs):
        if i == 7: raise KeyboardInterrupt
        return kwargs
    with pytest.raises(KeyboardInterrupt): draw('tiny-flux', callback_on_step_end=interrupt)
    assert (draw('tiny-flux') == flux[-1]).all()


def test_after_a_run_that_the_pipeline_stopped_the_next_one_starts_clean(flux):
    def give_up(pipe, i, t, kwargs):
        pipe._interrupt = i >= 9
        return kwargs
    draw('tiny-flux', callback_on_step_end=give_up)
    assert (draw('tiny-flux') == flux[-1]).all()


# What is refused

def test_another_cache_on_the_same_denoiser_is_refused_before_and_within_a_run():
    pipe, denoiser, _, _ = tiny('tiny-flux')
    full = draw('tiny-flux')
    denoiser.enable_cache(FirstBlockCacheConfig(threshold=.1))
    with pytest.raises(RuntimeError, match='disable it first'): apply_spectrum(pipe, SpectrumConfig.paper())
    denoiser.disable_cache()
    handle = apply_spectrum(pipe, SpectrumConfig.paper())
    denoiser.enable_cache(FirstBlockCacheConfig(threshold=.1))
    with pytest.raises((RuntimeError, ValueError), match='disable_cache'): draw('tiny-flux', 1, steps=6)
    denoiser.disable_cache()
    handle.remove()
    assert (draw('tiny-flux') == full).all()


def test_a_plan_is_for_runs_of_its_own_length():
    with apply_spectrum(tiny('tiny-flux')[0], make_plan(SpectrumConfig.paper(), STEPS)) as run:
        with pytest.raises((RuntimeError, ValueError), match='28'): draw('tiny-flux', 1, steps=28)
        draw('tiny-flux', 1)
    assert run.stats[0].n_passes == 14
