"Pipelines of other kinds: modular ones, two nets in step, copies of a scheduler; inpainting, Kontext and other sigmas"
import gc
import weakref
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.modular_pipelines import FluxAutoBlocks

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.pipeline_clock import PipelineClock
from spectrum_nb.settings import SpectrumConfig

from pipelines import latents, picture, quiet, random_denoiser, tiny_pipeline
from toys import N, PAPER, PASSES

pytestmark = pytest.mark.filterwarnings('ignore')

# Other pipelines

def test_a_modular_pipeline(flux):
    pipe, call = flux
    modular = FluxAutoBlocks().init_pipeline()
    parts = {k: v for k, v in pipe.components.items() if v is not None and k in modular._component_specs}
    modular.update_components(**parts)
    assert isinstance(modular, diffusers.ModularPipeline)
    quiet(modular)

    def draw():
        noise = torch.Generator().manual_seed(3)
        return modular(prompt='a red circle', num_inference_steps=N, generator=noise, output_type='latent',
                       output='latents', **call)

    plain = draw()
    with apply_spectrum(modular, SpectrumConfig(speedup=1)): assert torch.equal(draw(), plain)
    with apply_spectrum(modular) as run: fast, again = draw(), draw()
    with apply_spectrum(pipe) as ordinary: latents(pipe, call)
    assert [s.passes for s in run.stats] == [s.passes for s in ordinary.stats]*2
    assert torch.equal(fast, again)
    assert torch.equal(draw(), plain)


def test_two_nets_in_step_are_refused_with_what_works():
    torch.manual_seed(0)
    both = diffusers.UNetControlNetXSModel(
        sample_size=16, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), block_out_channels=(4, 8), cross_attention_dim=8,
        transformer_layers_per_block=1, num_attention_heads=2, norm_num_groups=4,
        ctrl_conditioning_embedding_out_channels=(2, 2), ctrl_block_out_channels=(2, 4), ctrl_num_attention_heads=2,
        ctrl_max_norm_num_groups=2, use_linear_projection=False, upcast_attention=False).eval()
    call = dict(sample=torch.randn(1, 4, 8, 8), encoder_hidden_states=torch.randn(1, 5, 8),
                controlnet_cond=torch.randn(1, 3, 16, 16))

    with pytest.raises(ValueError, match="feature='output'"): apply_spectrum(both, PAPER, N)
    with torch.no_grad(), apply_spectrum(both, PAPER, N, feature='output') as run:
        for i in range(N): both(**call, timestep=torch.tensor(900 - i))
    assert [s.passes for s in run.stats] == [PASSES]


def test_a_pipeline_that_steps_copies_of_its_scheduler_is_told_the_call_that_works():
    net, call = random_denoiser('SkyReelsV2Transformer3DModel')
    pipe = SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), config={}, transformer=net)
    pipe.scheduler.set_timesteps(N)

    def steps(n):
        for i in range(n): net(**call | dict(timestep=torch.tensor([900 - 40*i])))

    with torch.no_grad(), apply_spectrum(net, PAPER, N) as run:
        hook = run.hooks[0]
        by_times, hook.clock = hook.clock, PipelineClock(pipe, net, attribute='transformer')
        with pytest.raises(RuntimeError, match=r'apply_spectrum\(pipe.transformer, n_steps=…\)'): steps(3)
        run.reset()
        hook.clock = by_times
        steps(N)
    assert [s.passes for s in run.stats] == [PASSES]


# What held

def test_what_held_with_kontext_inpainting_and_other_sigmas(flux, sdxl):
    pipe, call = flux
    kontext = dict(image=picture(), _auto_resize=False, max_area=32*32)
    inpaint = dict(image=picture(), mask_image=picture(), strength=1.)
    for cls, more in ((diffusers.FluxKontextPipeline, kontext), (diffusers.FluxInpaintPipeline, inpaint)):
        made = quiet(cls(**pipe.components))
        with apply_spectrum(made, PAPER) as run: latents(made, call, **more)
        assert run.stats
        assert all(s.passes == PASSES for s in run.stats)

    pipe, call = sdxl
    own = pipe.scheduler
    try:
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(own.config, use_karras_sigmas=True)
        with apply_spectrum(pipe, PAPER) as run:
            latents(pipe, call)
            latents(pipe, call, height=40, width=48)
        assert [s.passes for s in run.stats] == [PASSES]*2
    finally: pipe.scheduler = own


def test_what_held_when_memory_runs_out_and_when_a_pipeline_goes(flux):
    pipe, call = tiny_pipeline('tiny-flux')

    def out_of_memory(pipe, i, t, given): raise torch.OutOfMemoryError('no memory')

    with apply_spectrum(pipe, PAPER) as run:
        with pytest.raises(torch.OutOfMemoryError): latents(pipe, call, callback_on_step_end=out_of_memory)
        first = latents(pipe, call)
    with apply_spectrum(pipe, PAPER): assert torch.equal(latents(pipe, call), first)

    with apply_spectrum(pipe, PAPER) as run:
        latents(pipe, call)
        pipe.to(torch.bfloat16)
        latents(pipe, call)
        pipe.to(torch.float32)                                    # the weights stay rounded
        last = latents(pipe, call)
        assert [s.passes for s in run.stats] == [PASSES]*3
    with apply_spectrum(pipe, PAPER): assert torch.equal(latents(pipe, call), last)

    gone = weakref.ref(pipe.transformer)
    del pipe, run, out_of_memory
    gc.collect()
    assert gone() is None
