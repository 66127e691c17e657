"What a call of a pipeline can ask for: callbacks, interruption, other guidance, several images, embeddings, outputs"
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from spectrum_nb.anatomy import blocks_of, count_calls
from spectrum_nb.apply import apply_spectrum
from spectrum_nb.plan import make_plan
from spectrum_nb.presets import call_defaults

from four_runs import (ALL, N, NEAR, ONE, PAPER, PLAN, captions, check_four_runs, followed, load_tiny, nearly_equal,
                       traces)
from pipelines import relative

pytestmark = pytest.mark.filterwarnings('ignore')

# What a call can ask for

@pytest.mark.parametrize('name', ALL)
def test_a_callback_that_changes_latents(name):
    pipe, denoiser, sample = load_tiny(name)

    def push(pipe, i, t, given):
        if i == 7: given['latents'] = given['latents']*1.05
        return given

    plain, _, _ = check_four_runs(lambda: sample(callback_on_step_end=push), pipe, denoiser)
    assert not torch.equal(plain, sample())


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('how', ['interrupt', 'raise'])
def test_a_run_that_is_broken_off(name, how):
    pipe, denoiser, sample = load_tiny(name)
    plain = sample()
    before = traces(denoiser)

    def stop(pipe, i, t, given):
        if i == 8 and how == 'raise': raise KeyboardInterrupt
        if i == 8: pipe._interrupt = True
        return given

    with apply_spectrum(pipe, PAPER) as run:
        fast = sample()
        n = len(run.stats)
        with pytest.raises(KeyboardInterrupt) if how == 'raise' else nullcontext(): sample(callback_on_step_end=stop)
        assert len(run.stats) == n
        assert torch.equal(sample(), fast)
        assert len(run.stats) == 2*n
        assert followed(run.stats)
    assert torch.equal(sample(), plain)
    assert traces(denoiser) == before


GUIDED = {
    'tiny-sdxl': ('prompt_embeds', 'add_text_embeds', 'add_time_ids'),
    'tiny-sd3': ('prompt_embeds', 'pooled_prompt_embeds'),
}


@pytest.mark.parametrize('name', ['tiny-sdxl', 'tiny-wan', 'tiny-sd3'])
def test_guidance_switched_off_in_a_run(name):
    pipe, denoiser, sample = load_tiny(name)
    keys, off, two_calls = GUIDED.get(name, ()), 8, name == 'tiny-wan'

    def switch(pipe, i, t, given):
        if i == off - 1:
            pipe._guidance_scale = 0.
            for k in keys: given[k] = given[k].chunk(2)[-1]
        return given

    def cut(): return sample(callback_on_step_end=switch, callback_on_step_end_tensor_inputs=['latents', *keys])

    plain = cut()
    before = traces(denoiser)
    with apply_spectrum(pipe, ONE): assert torch.equal(cut(), plain)
    with apply_spectrum(pipe, PAPER) as run, count_calls(blocks_of(denoiser)) as counts:
        fast = cut()
        first_part = [p for p in PLAN.passes if p < off]
        if two_calls:                     # in a step: the second is not made any more
            assert [s.context for s in run.stats] == ['cond']
            assert followed(run.stats)
            assert counts == [len(PLAN.passes) + len(first_part)]*len(counts)
        else:                             # one batch: half of it is left, the rest is planned anew
            rest = [off + p for p in make_plan(PAPER, N - off).passes]
            (s,) = run.stats
            assert list(s.fallbacks) == [off]
            assert 'input changed its shape' in s.fallbacks[off]
            assert s.passes == first_part + rest
            assert counts == [len(s.passes)]*len(counts)
        whole = sample()
        assert followed(run.stats if two_calls else run.stats[1:])

    with apply_spectrum(pipe, PAPER): assert torch.equal(sample(), whole)
    assert torch.isfinite(fast).all()
    assert 0 <= relative(fast, plain) < NEAR
    assert torch.equal(cut(), plain)
    assert traces(denoiser) == before
    assert relative(plain, sample()) > .01


@pytest.mark.parametrize('name', ALL)
def test_several_images_and_prompts(name):
    pipe, denoiser, sample = load_tiny(name)
    several = 'num_videos_per_prompt' if 'num_frames' in call_defaults(pipe, name) else 'num_images_per_prompt'
    two_each = {several: 2}
    plain, fast, _ = check_four_runs(lambda: sample(**two_each), pipe, denoiser)
    assert len(plain) == 4

    with apply_spectrum(pipe, PAPER) as run:             # the number changes from run to run
        samples = sample(prompt=captions(pipe, name, 1)), sample(), sample(**two_each)
    assert followed(run.stats)
    assert [len(images) for images in samples] == [1, 2, 4]
    assert torch.equal(samples[-1], fast)


EMBEDDINGS = {
    'tiny-flux': ('prompt_embeds', 'pooled_prompt_embeds'),
    'tiny-sd3': ('prompt_embeds', 'negative_prompt_embeds', 'pooled_prompt_embeds', 'negative_pooled_prompt_embeds'),
    'tiny-sdxl': ('prompt_embeds', 'negative_prompt_embeds', 'pooled_prompt_embeds', 'negative_pooled_prompt_embeds'),
    'tiny-hunyuan': ('prompt_embeds', 'pooled_prompt_embeds', 'prompt_attention_mask'),
    'tiny-wan': ('prompt_embeds', 'negative_prompt_embeds'),
}


def embedded(pipe, name):
    "{argument: embedding} of the two captions"
    prompts, call = captions(pipe, name), call_defaults(pipe, name)
    length = {k: call[k] for k in ('max_sequence_length', 'prompt_template') if k in call}
    if name == 'tiny-flux': embeds = pipe.encode_prompt(prompts, prompts, **length)
    if name == 'tiny-sd3': embeds = pipe.encode_prompt(prompts, prompts, prompts, **length)
    if name == 'tiny-sdxl': embeds = pipe.encode_prompt(prompts)
    if name == 'tiny-hunyuan': embeds = pipe.encode_prompt(prompts, **length)
    if name == 'tiny-wan': embeds = pipe.encode_prompt(prompts, '', **length)
    return dict(zip(EMBEDDINGS[name], embeds))


@pytest.mark.parametrize('name', ALL)
def test_prompt_embeddings(name):
    pipe, denoiser, sample = load_tiny(name)
    embeds = embedded(pipe, name)
    plain, fast, _ = check_four_runs(lambda: sample(prompt=None, **embeds), pipe, denoiser)
    with apply_spectrum(pipe, PAPER): assert nearly_equal(sample(), fast)


@pytest.mark.parametrize('name', ALL)
def test_output_types_and_dicts(name):
    pipe, denoiser, sample = load_tiny(name)
    with apply_spectrum(pipe, PAPER) as run:
        latents = sample()
        pictures = sample(output_type='np')
        (as_entry,) = pipe_output(pipe, name).values()
    assert torch.equal(as_entry, latents)
    assert np.isfinite(pictures).all()
    assert followed(run.stats)


def pipe_output(pipe, name):
    "The latents as diffusers' own kind of dictionary"
    call = dict(prompt=captions(pipe, name), num_inference_steps=N, output_type='latent',
                generator=torch.Generator().manual_seed(3)) | call_defaults(pipe, name)
    return pipe(**call, return_dict=True)
