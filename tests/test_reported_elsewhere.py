"Situations in which other caches went wrong, as their users reported them: each works here, or is refused in words"
import copy

import diffusers
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.lab.any_denoiser import EXAMPLES, denoiser_classes
from spectrum_nb.settings import SpectrumConfig

from pipelines import (fixed, flux_call, latents, picture, quiet, random_denoiser, random_vae, relative, stubbed,
                       tiny_pipeline)
from toys import N, PAPER, PASSES, in_thread

pytestmark = pytest.mark.filterwarnings('ignore')
EVERY = SpectrumConfig(speedup=1)

# What others reported of caches

def framepack():
    "(a pipeline that draws a film in sections, a function that draws)"
    net, _ = random_denoiser('HunyuanVideoFramepackTransformer3DModel')
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=['HunyuanVideoDownBlock3D']*4, up_block_types=['HunyuanVideoUpBlock3D']*4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4).eval()

    class Stubbed(diffusers.HunyuanVideoFramepackPipeline):
        def encode_prompt(self, *args, **kwargs): return fixed(1, 5, 8), fixed(1, 8), torch.ones(1, 5)
        def encode_image(self, *args, **kwargs): return fixed(1, 3, 8)

    made = quiet(Stubbed(text_encoder=None, tokenizer=None, transformer=net, vae=vae,
                         scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder_2=None, tokenizer_2=None,
                         image_encoder=None, feature_extractor=None))

    def draw():
        noise = torch.Generator().manual_seed(0)
        films = made(image=picture(), prompt='', height=32, width=32, num_frames=9, latent_window_size=2,
                     num_inference_steps=N, generator=noise, output_type='latent', return_dict=False)[0]
        return films[0]

    return made, draw


def test_framepack_whose_sections_are_runs_of_their_own():
    pipe, draw = framepack()
    plain = draw()
    with apply_spectrum(pipe, EVERY): assert torch.equal(draw(), plain)
    with apply_spectrum(pipe, PAPER) as run: fast = draw()
    assert [s.passes for s in run.stats] == [PASSES]*2
    assert not any(s.fallbacks for s in run.stats)
    assert relative(fast, plain) < .02
    assert torch.equal(draw(), plain)


def test_stable_cascade_whose_sampler_adds_noise_is_refused():
    torch.manual_seed(0)
    config, _ = EXAMPLES['StableCascadeUNet']
    narrow = dict(clip_image_in_channels=8, clip_text_in_channels=8)
    net = denoiser_classes()['StableCascadeUNet'](**config | narrow).eval()
    embeds = lambda: (fixed(1, 5, 8), fixed(1, 1, 8), fixed(1, 5, 8, seed=1), fixed(1, 1, 8, seed=1))
    pipe = quiet(stubbed(diffusers.StableCascadePriorPipeline, embeds, tokenizer=None, text_encoder=None, prior=net,
                         scheduler=diffusers.DDPMWuerstchenScheduler()))

    def draw():
        noise = torch.Generator().manual_seed(0)
        call = dict(prompt='', height=64, width=64, num_inference_steps=N, generator=noise, output_type='pt')
        return pipe(**call).image_embeddings

    plain = draw()
    with apply_spectrum(pipe, PAPER):
        with pytest.raises(ValueError, match='DDPMWuerstchenScheduler adds noise'): draw()
    with apply_spectrum(pipe, EVERY): assert torch.equal(draw(), plain)


def ledits_pp():
    "(a pipeline of LEDITS++, a function that inverts a picture, one that inverts and edits it)"
    model, _ = random_denoiser('UNet2DConditionModel')
    model.register_to_config(sample_size=64)
    pipe, _ = tiny_pipeline('tiny-sdxl')

    class Encoder(nn.Module):
        dtype, device, config = torch.float32, torch.device('cpu'), pipe.text_encoder.config
        def forward(self, ids, **kwargs): return (fixed(*ids.shape, model.config.cross_attention_dim),)

    sampler = diffusers.DPMSolverMultistepScheduler(algorithm_type='sde-dpmsolver++', solver_order=2)
    made = quiet(diffusers.LEditsPPPipelineStableDiffusion(
        vae=random_vae(), text_encoder=Encoder(), tokenizer=pipe.tokenizer, unet=model, safety_checker=None,
        feature_extractor=None, scheduler=sampler, requires_safety_checker=False))

    def invert():
        noise = torch.Generator().manual_seed(0)
        made.invert(image=picture(), num_inversion_steps=10, skip=.2, source_prompt='a circle',
                    source_guidance_scale=2., generator=noise)

    def edit():
        invert()
        return made(editing_prompt=['a cross'], edit_guidance_scale=5., edit_threshold=.8, output_type='latent',
                    use_intersect_mask=False).images

    return made, invert, edit


def test_ledits_pp_whose_sampler_adds_noise_is_refused():
    pipe, invert, edit = ledits_pp()
    plain = edit()
    with apply_spectrum(pipe, EVERY): assert torch.equal(edit(), plain)
    with apply_spectrum(pipe, PAPER):
        with pytest.raises(ValueError, match='DPMSolverMultistepScheduler adds noise'): invert()


class Packed(nn.Module):
    "A layer whose weights are bytes, made numbers when it is called, as those of GGUF and of nunchaku are"
    def __init__(self, layer):
        super().__init__()
        self.bias, self.scale = layer.bias, layer.weight.detach().abs().max()/127
        packed = (layer.weight.detach()/self.scale + 128).round().to(torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x): return nn.functional.linear(x, (self.weight.to(x.dtype) - 128)*self.scale, self.bias)


def pack(module):
    "Pack all layers within; how many"
    found = [(owner, name) for owner in module.modules() for name, m in owner.named_children() if type(m) is nn.Linear]
    for owner, name in found: setattr(owner, name, Packed(getattr(owner, name)))
    return len(found)


def test_weights_that_are_bytes():
    pipe, call = tiny_pipeline('tiny-flux')
    assert pack(pipe.transformer) > 50
    plain = latents(pipe, call)
    with apply_spectrum(pipe, EVERY): assert torch.equal(latents(pipe, call), plain)
    with apply_spectrum(pipe, PAPER) as run: assert relative(latents(pipe, call), plain) < .15
    assert [s.passes for s in run.stats] == [PASSES]
    assert not run.stats[0].fallbacks
    assert torch.equal(latents(pipe, call), plain)


class AllBlocks(nn.Module):
    "What nunchaku puts in place of the blocks of FLUX"
    runs = 0

    def __init__(self, *blocks):
        super().__init__()
        self.inside = nn.ModuleList(blocks)

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None,
                **kwargs):
        self.runs += 1
        for b in self.inside:
            encoder_hidden_states, hidden_states = b(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=temb,
                image_rotary_emb=image_rotary_emb)
        return encoder_hidden_states, hidden_states


def test_one_module_in_place_of_all_blocks():
    pipe, call = tiny_pipeline('tiny-flux')
    net = pipe.transformer
    with apply_spectrum(pipe, PAPER): own = latents(pipe, call)
    fused = AllBlocks(*net.transformer_blocks, *net.single_transformer_blocks)
    net.transformer_blocks, net.single_transformer_blocks = nn.ModuleList([fused]), nn.ModuleList()

    with apply_spectrum(pipe, PAPER) as run: assert torch.allclose(latents(pipe, call), own, atol=1e-4)
    assert [s.passes for s in run.stats] == [PASSES]
    assert fused.runs == len(PASSES)


def test_guidance_by_skipped_layers_which_is_asked_for_at_some_steps():
    pipe, call = tiny_pipeline('tiny-sd3')
    call |= dict(guidance_scale=4., skip_guidance_layers=[0], skip_layer_guidance_start=.1, skip_layer_guidance_stop=.5)
    plain = latents(pipe, call)
    with apply_spectrum(pipe, EVERY): assert torch.equal(latents(pipe, call), plain)
    with apply_spectrum(pipe, SpectrumConfig(speedup=1.3)) as run:
        fast, again = latents(pipe, call), latents(pipe, call)

    unskipped = latents(pipe, call | dict(skip_guidance_layers=None))
    assert relative(fast, plain) < .1 < relative(unskipped, plain)
    assert torch.equal(fast, again)
    assert [s.context for s in run.stats] == ['', '']
    assert not any(s.fallbacks for s in run.stats)


def test_guidance_that_a_callback_turns_off():
    pipe, call = tiny_pipeline('tiny-sdxl')

    def off(pipe, i, t, given):
        if i != 12: return given
        pipe._guidance_scale = 1.
        return {k: v if k == 'latents' else v[-1:] for k, v in given.items()}

    call |= dict(guidance_scale=5., callback_on_step_end=off,
                 callback_on_step_end_tensor_inputs=['latents', 'prompt_embeds', 'add_text_embeds', 'add_time_ids'])
    plain = latents(pipe, call)
    with apply_spectrum(pipe, EVERY): assert torch.equal(latents(pipe, call), plain)
    with apply_spectrum(pipe, PAPER) as run: assert relative(latents(pipe, call), plain) < .15
    assert list(run.stats[0].fallbacks) == [13]
    assert 'shape' in run.stats[0].fallbacks[13]


def test_merged_tokens_whose_blocks_have_another_class():
    seen, runs = [], []

    class Merged(BasicTransformerBlock):
        "As tomesd does, which also looks at the size of what the denoiser is given"
        def forward(self, x, *args, **kwargs):
            runs.append(seen[-1])
            return super().forward(.9*x + .1*x.mean(1, keepdim=True), *args, **kwargs)

    pipe, call = tiny_pipeline('tiny-sdxl')
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    blocks = [m for m in pipe.unet.modules() if type(m) is BasicTransformerBlock]
    for m in blocks: m.__class__ = Merged
    plain = latents(pipe, call)
    runs.clear()
    seen.clear()

    with apply_spectrum(pipe, PAPER) as run: latents(pipe, call)
    assert [s.passes for s in run.stats] == [PASSES]
    assert len(seen) == N
    assert len(runs) == len(PASSES)*len(blocks)
    assert torch.equal(latents(pipe, call), plain)


def test_a_cache_of_diffusers_that_is_enabled_before_or_meanwhile():
    pipe, call = tiny_pipeline('tiny-flux')
    net, cache = pipe.transformer, diffusers.FirstBlockCacheConfig(threshold=.1)
    latents(pipe, call)                                              # which leaves contexts behind
    with apply_spectrum(pipe, PAPER) as run:
        net.enable_cache(cache)
        with pytest.raises(RuntimeError, match='disable_cache'): latents(pipe, call)
        net.disable_cache()
        fast = latents(pipe, call)

    net.enable_cache(cache)
    with pytest.raises(RuntimeError, match='disable it first'): apply_spectrum(pipe, PAPER)
    net.disable_cache()
    with apply_spectrum(pipe, PAPER) as again: assert torch.equal(latents(pipe, call), fast)
    assert [s.passes for s in run.stats + again.stats] == [PASSES]*2


def test_two_experts_of_a_distilled_model_count_their_own_steps():
    pipe, call = tiny_pipeline('tiny-wan')
    torch.manual_seed(0)
    scheduler, expert = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.transformer)
    two = quiet(diffusers.WanPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, scheduler, pipe.transformer, expert,
                                      boundary_ratio=.6))

    def steps_of(run): return {expert_of(s): s.n_steps for s in run.stats}

    def expert_of(s): return s.context.split('/')[0]

    for n in (4, 20):
        plain = latents(two, call, n)
        with apply_spectrum(two, EVERY) as run: assert torch.equal(latents(two, call, n), plain)
        lengths = steps_of(run)
        assert len(lengths) == 2
        assert sum(lengths.values()) == n
        assert min(lengths.values()) > 0

    with apply_spectrum(two, SpectrumConfig(n_passes=10)) as run: latents(two, call, 20)
    assert all(s.n_steps == lengths[expert_of(s)] for s in run.stats)
    assert sum(s.n_passes for s in run.stats)/2 == pytest.approx(10, abs=1)


def test_many_requests_at_once_on_one_pipeline_are_refused_and_harm_nothing(flux):
    pipe, call = flux
    with apply_spectrum(pipe, PAPER) as run: alone = latents(pipe, call)
    run, refused = apply_spectrum(pipe.transformer, PAPER, N), []

    def request(seed):
        inputs = flux_call(pipe.transformer) | dict(hidden_states=fixed(1, 16, 16, seed=seed))
        try: pipe.transformer(**inputs, timestep=torch.ones(1))
        except RuntimeError as error: refused.append(str(error))

    def intrude(*_):
        for k in range(3): in_thread(lambda: request(k))

    inside = pipe.transformer.x_embedder.register_forward_pre_hook(intrude)
    try: request(0)
    finally:
        inside.remove()
        run.remove()

    assert len(refused) == 3
    assert all('in the middle of a call in another thread' in r for r in refused)
    with apply_spectrum(pipe, PAPER): assert torch.equal(latents(pipe, call), alone)
