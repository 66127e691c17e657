"What belongs to one run and what does not: tiles, panoramas, schedulers that are copied, threads, inversions"
import copy
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.settings import SpectrumConfig

from pipelines import fixed, flux_call, latents, picture, quiet, random_denoiser, random_vae, relative, tiny_pipeline
from toys import N, PAPER, PASSES

pytestmark = pytest.mark.filterwarnings('ignore')

# What a run is

def draw_tiled(pipe, samples, encoded, added):
    "The latents of several tiles, in which each has a state of the scheduler of its own"
    y = [x.clone() for x in samples]
    scheduler = pipe.scheduler
    scheduler.set_timesteps(N)
    states = [copy.deepcopy(vars(scheduler)) for _ in y]
    with torch.no_grad():
        for t in scheduler.timesteps:
            for j in range(len(y)):
                vars(scheduler).update(states[j])
                scaled = scheduler.scale_model_input(y[j], t)
                noise = pipe.unet(scaled, t, encoder_hidden_states=encoded, added_cond_kwargs=added).sample
                y[j] = scheduler.step(noise, t, y[j]).prev_sample
                states[j] = copy.deepcopy(vars(scheduler))
    return torch.cat(y)


def test_tiles_with_a_scheduler_state_each():
    pipe, _ = tiny_pipeline('tiny-sdxl')
    net = pipe.unet
    samples = [fixed(1, 4, 16, 16, seed=k) for k in range(3)]
    encoded = fixed(1, 7, net.config.cross_attention_dim, seed=9)
    width = net.add_embedding.linear_1.in_features - 6*net.config.addition_time_embed_dim
    added = dict(text_embeds=torch.zeros(1, width), time_ids=torch.zeros(1, 6))

    with apply_spectrum(pipe, PAPER): alone = torch.cat([draw_tiled(pipe, [x], encoded, added) for x in samples])
    with apply_spectrum(pipe, PAPER) as run:
        fast, again = (draw_tiled(pipe, samples, encoded, added) for _ in range(2))

    assert [(s.context, s.n_steps) for s in run.stats] == [(c, N) for c in ('', '#2', '#3')]*2
    assert all(s.passes == PASSES and not s.fallbacks for s in run.stats)
    assert torch.equal(fast, again)
    assert torch.equal(fast, alone)


class Panorama(diffusers.StableDiffusionPanoramaPipeline):
    "With views of eight latents, not 64"
    def get_views(self, height, width, **kwargs):
        return super().get_views(4*height, 4*width, window_size=8, stride=4)


def test_a_panorama():
    pipe, _ = tiny_pipeline('tiny-sdxl')
    model, _ = random_denoiser('UNet2DConditionModel')
    made = quiet(Panorama(vae=random_vae(), text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=model,
                          scheduler=diffusers.DDIMScheduler(clip_sample=False), safety_checker=None,
                          feature_extractor=None, requires_safety_checker=False))
    width = model.config.cross_attention_dim
    embeds = dict(prompt_embeds=torch.randn(1, 5, width), negative_prompt_embeds=torch.zeros(1, 5, width))

    def draw():
        noise = torch.Generator().manual_seed(0)
        return made(**embeds, num_inference_steps=N, height=16, width=32, generator=noise, output_type='latent')[0]

    plain = draw()
    with apply_spectrum(made, PAPER) as run: draw()
    # a history for each view
    assert len(run.stats) == 3
    assert all(s.passes == PASSES and not s.fallbacks for s in run.stats)
    with apply_spectrum(made, SpectrumConfig(speedup=1)): assert np.array_equal(draw(), plain)


def test_an_own_loop_in_which_the_scheduler_is_copied_at_each_step(flux):
    pipe, call = flux
    plain = latents(pipe, call)
    own = pipe.scheduler

    def copying(pipe, i, t, given):
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        return given

    try:
        whole = latents(pipe, call, callback_on_step_end=copying)
        pipe.scheduler = own
        with apply_spectrum(pipe, PAPER) as run: fast = latents(pipe, call, callback_on_step_end=copying)
    finally: pipe.scheduler = own

    assert torch.equal(whole, plain)
    assert [s.passes for s in run.stats] == [PASSES]
    assert relative(fast, plain) < .3


def test_each_step_on_another_worker_thread(flux):
    pipe, call = flux
    net, pools = pipe.transformer, [ThreadPoolExecutor(1) for _ in range(3)]
    encoded, pooled, text_ids = pipe.encode_prompt('a red circle', 'a red circle', max_sequence_length=16)

    def steps():
        "The sample after each step"
        y = fixed(1, 16, 16)
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1/N, N), mu=.5)
        for t in pipe.scheduler.timesteps:
            with torch.no_grad():
                v = net(y, timestep=t.expand(1)/1000, guidance=torch.tensor([2.5]), pooled_projections=pooled,
                        encoder_hidden_states=encoded, txt_ids=text_ids, img_ids=torch.zeros(16, 3),
                        return_dict=False)[0]
            y = pipe.scheduler.step(v, t, y, return_dict=False)[0]
            yield y

    def last_of_handed_round():
        it = steps()
        return [pools[i % 3].submit(next, it).result() for i in range(N)][-1]

    with apply_spectrum(pipe, PAPER) as run:
        alone = [*steps()][-1]
        last = last_of_handed_round()
    assert torch.equal(last, alone)
    assert [s.passes for s in run.stats] == [PASSES]*2

    with apply_spectrum(net, PAPER, N) as run: last = last_of_handed_round()
    assert torch.equal(last, alone)
    assert [s.passes for s in run.stats] == [PASSES]
    for p in pools: p.shutdown()


def diffedit():
    "(a pipeline of DiffEdit, a function that inverts a picture with it)"
    model, _ = random_denoiser('UNet2DConditionModel')
    pipe, _ = tiny_pipeline('tiny-sdxl')
    vae = random_vae()
    model.register_to_config(sample_size=64)
    made = quiet(diffusers.StableDiffusionDiffEditPipeline(
        vae=vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=model,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        inverse_scheduler=diffusers.DDIMInverseScheduler(clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False))
    width = model.config.cross_attention_dim
    embeds = dict(prompt_embeds=fixed(1, 5, width, seed=1), negative_prompt_embeds=torch.zeros(1, 5, width))

    def invert():
        noise = torch.Generator().manual_seed(0)
        return made.invert(**embeds, image=picture(32), num_inference_steps=24, inpaint_strength=.8, generator=noise,
                           guidance_scale=1.5).latents

    return made, invert


@pytest.mark.parametrize('before', [False, True])
def test_an_inversion_on_a_second_scheduler(before):
    pipe, invert = diffedit()
    if before: pipe.scheduler.set_timesteps(24)
    plain = invert()
    with apply_spectrum(pipe, SpectrumConfig(speedup=1)): assert torch.equal(invert(), plain)
    with apply_spectrum(pipe, SpectrumConfig(n_passes=8)) as run: fast = invert(), invert()
    assert [s.n_passes for s in run.stats] == [8]*2
    assert all(relative(f, plain) < .5 for f in fast)


@pytest.mark.parametrize('speedup', [1, 3])
def test_steps_that_cannot_be_told_get_one_clear_message(flux, speedup):
    pipe, call = flux
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, .1, 10), mu=.5)
    names_the_call = pytest.raises(RuntimeError, match=r'apply_spectrum\(pipe.transformer, n_steps=…\)')
    with apply_spectrum(pipe, SpectrumConfig(speedup=speedup)), names_the_call, torch.no_grad():
        for t in (900., 700., 500.):
            pipe.transformer(**flux_call(pipe.transformer), timestep=torch.tensor([t/1000]))
