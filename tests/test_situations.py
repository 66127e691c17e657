"Situations of people who do this job: each test is one kind of them; it works, or is refused in words that lead to what works"
import contextlib
import copy
import gc
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

os.environ |= dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.models.cache_utils import CacheMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from profiles import NIGHTLY, examples
from torch import nn

from spectrum_nb.anatomy import ToyDenoiser, find_anatomy
from spectrum_nb.apply import apply_spectrum, find_denoisers
from spectrum_nb.calibrate import record
from spectrum_nb.calibration import Calibration, set_up, shipped_calibration
from spectrum_nb.clock import unwrapped
from spectrum_nb.lab.any_denoiser import EXAMPLES, denoiser_classes
from spectrum_nb.plan import make_plan
from spectrum_nb.presets import call_defaults, load_pipeline
from spectrum_nb.runs import sample_all
from spectrum_nb.samples import all_jobs, make_sample
from spectrum_nb.settings import SpectrumConfig

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')
PAPER, N = SpectrumConfig.paper(blend=0), 20
PASSES = make_plan(PAPER, N).passes


class Toy(ToyDenoiser, CacheMixin): "A denoiser whose answer is 2·(x + 3t), with contexts"

class Cancelled(Exception): "Somebody presses the button"

class Shell(nn.Module):
    "Hands calls and unknown attributes on to what it wraps"
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, *args, **kwargs): return self.inner(*args, **kwargs)
    def __getattr__(self, name):
        try: return super().__getattr__(name)
        except AttributeError: return getattr(super().__getattr__('inner'), name)

def state_of(module):
    "All that removal must leave as it was"
    return [(list((k, id(v)) for k, v in vars(m).items()
                  if k not in ('runs',)), [(k, id(v)) for k, v in m._modules.items()], len(
                      m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]

def loop(denoiser, times=range(N), x=torch.ones(2, 4)): return [denoiser(x, float(t)) for t in times]
def right(got, times, x=1.):
    return all(
        torch.allclose(o, torch.full_like(o, 2*(x + 3.*t)), rtol=1e-4, atol=1e-4)
        for o, t in zip(got, times, strict=True))

def small(name, seed=0):
    "(denoiser with random weights, arguments of a call) of a class of diffusers"
    config, inputs = EXAMPLES[name]
    torch.manual_seed(seed)
    model = denoiser_classes()[name](**config).eval()
    for p in model.parameters():
        if not p.any(): nn.init.normal_(p, std=.05)
    torch.manual_seed(1)
    return model, inputs()

def tiny(name):
    pipe = load_pipeline(name, 'cpu')
    pipe.set_progress_bar_config(disable=True)
    return pipe, call_defaults(pipe, name)

@pytest.fixture(scope='module')
def flux(): return tiny('tiny-flux')

@pytest.fixture(scope='module')
def sdxl(): return tiny('tiny-sdxl')

def latents(pipe, call, n=N, seed=3, prompt='a red circle', **more):
    return pipe(prompt=prompt, num_inference_steps=n, generator=torch.Generator().manual_seed(seed),
                output_type='latent', return_dict=False, **call | more)[0]

def relative(a, b): return ((a.float() - b.float()).norm()/b.float().norm()).item()


# Wrappers

@pytest.mark.parametrize('depth', [1, 3])
@pytest.mark.parametrize('registry', [False, True])
def test_a_shell_that_hands_attributes_on_works_and_is_left_as_it_was(depth, registry):
    toy = shell = Toy()
    for _ in range(depth): shell = Shell(shell)
    if registry:
        with shell.cache_context('before'): shell(torch.ones(2, 4), 0.)
    before, plain = state_of(shell), loop(shell, range(3))
    with pytest.raises(Cancelled), apply_spectrum(shell, PAPER, N) as run:
        assert right(loop(shell), range(N)) and [s.passes for s in run.stats] == [PASSES]
        raise Cancelled
    assert state_of(shell) == before and callable(toy.forward) and all(
        torch.equal(a, b) for a, b in zip(loop(shell, range(3)), plain))

@pytest.mark.parametrize('name, key',
                         [('tiny-sdxl', 'unet'), ('tiny-flux', 'transformer'), ('tiny-wan', 'transformer')])
@pytest.mark.parametrize('order', ['wrapped first', 'Spectrum first'])
def test_a_pipeline_whose_denoiser_peft_wrapped(name, key, order):
    from peft import LoraConfig, get_peft_model
    pipe, call = tiny(name)
    inner = getattr(pipe, key)
    wrap = lambda: setattr(
        pipe, key, get_peft_model(inner, LoraConfig(r=2, target_modules=['to_q', 'to_v'], init_lora_weights=False)))
    torch.manual_seed(0)
    if order == 'wrapped first': wrap()
    run = apply_spectrum(pipe, PAPER)
    if order == 'Spectrum first': wrap()
    fast = latents(pipe, call)
    assert run.stats and all(s.passes == PASSES and not s.fallbacks for s in run.stats)
    run.remove()
    plain = latents(pipe, call)
    assert callable(inner.forward) and not torch.equal(fast, plain) and torch.equal(latents(pipe, call), plain)
    wrapper = getattr(pipe, key)
    # peft adapts in place: the same model without its wrapper
    setattr(pipe, key, inner)
    with apply_spectrum(pipe, PAPER): assert torch.equal(latents(pipe, call), fast)
    setattr(pipe, key, wrapper)
    assert not any('forward' in vars(m) for m in getattr(pipe, key).modules()) and 'progress_bar' not in vars(pipe)

def test_fsdp_1_in_one_process(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    if not dist.is_initialized():
        dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model, call = small('FluxTransformer2DModel')
        plain = model(**call)[0].detach()
        sharded = FSDP(model, device_id=torch.device('cpu'))
        with torch.no_grad(), apply_spectrum(sharded, PAPER, N) as run:
            for i in range(N): out = sharded(**call | dict(timestep=torch.tensor([.5 - i/1e4])))[0]
        assert [s.passes for s in run.stats] == [PASSES] and relative(out, plain) < .05
    finally: dist.destroy_process_group()

def test_a_shell_that_computes_by_itself_is_refused():
    class Own(Shell):
        def forward(self, x, t):
            for b in self.blocks: x = b(x, t)
            return 2*self.norm_out(x)
    shell = Own(Toy())
    before = state_of(shell)
    with apply_spectrum(shell, PAPER, N), pytest.raises(RuntimeError,
                                                        match='Own does not call the denoiser that it wraps'):
        loop(shell)
    assert state_of(shell) == before

def test_a_shallow_copy_has_hooks_of_its_own_or_is_refused():
    toy = Toy()
    with toy.cache_context('before'): toy(torch.ones(2, 4), 0.)
    twin = copy.copy(toy)
    before = state_of(toy), state_of(twin)
    with apply_spectrum(twin, PAPER, N) as run:
        assert right(loop(twin), range(N)) and len(run.stats) == 1
        assert right(loop(toy), range(N)) and len(run.stats) == 1 and callable(toy.forward)
    assert (state_of(toy), state_of(twin)) == before
    with apply_spectrum(toy, PAPER, N):
        with pytest.raises(RuntimeError): apply_spectrum(copy.copy(toy), PAPER, N)

def test_a_wrapper_with_two_modules_is_followed_to_the_one_it_hands_on_to():
    class Average(Shell):
        def __init__(self, inner):
            super().__init__(inner)
            self.average = copy.deepcopy(inner)
        def forward(self, *args): return self.average(*args) if self.use_average else self.inner(*args)
        use_average = False
    shell = Average(Toy())
    assert unwrapped(shell) is shell.inner
    with apply_spectrum(shell, PAPER, N) as run: assert right(loop(shell), range(N)) and len(run.stats) == 1


# Arguments of a pipeline

def picture(size=32): return Image.fromarray((np.random.default_rng(0).random((size, size, 3))*255).astype(np.uint8))

def stubbed(cls, embeds, **parts):
    "A pipeline whose text encoding is random: only what is around the denoiser is tried"
    class Stubbed(cls):
        def encode_prompt(self, *args, **kwargs): return embeds()
    Stubbed.__name__ = cls.__name__
    return Stubbed(**parts)

def kontext(monkeypatch):
    pipe, call = tiny('tiny-flux')
    made = diffusers.FluxKontextPipeline(**pipe.components)
    return made, call | dict(image=picture(), _auto_resize=False, max_area=32*32)

def wan_i2v(monkeypatch):
    pipe, call = tiny('tiny-wan')
    c = pipe.transformer.config
    torch.manual_seed(0)
    net = type(pipe.transformer)(**{k: v for k, v in c.items() if not k.startswith('_')}
                                 | dict(in_channels=2*c.in_channels + 4, image_dim=None)).eval()
    embeds = lambda: tuple(torch.randn(1, 16, c.text_dim, generator=torch.Generator().manual_seed(k)) for k in range(2))
    made = stubbed(diffusers.WanImageToVideoPipeline, embeds, tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder,
                   vae=pipe.vae, scheduler=pipe.scheduler, transformer=net, image_encoder=None, image_processor=None)
    return made, call | dict(image=picture())

def fixed(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def small_flow(shift=3.):
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=True, base_shift=.5,
                                                     max_shift=1.15)

def qwen_edit(monkeypatch):
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as module
    # not a million pixels
    monkeypatch.setattr(module, 'calculate_dimensions', lambda area, ratio: (32, 32, None))
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1,
                                           temperal_downsample=[False], latents_mean=[0.]*4, latents_std=[1.]*4).eval()
    net, _ = small('QwenImageTransformer2DModel')
    embeds = lambda: (fixed(1, 5, 8), torch.ones(1, 5, dtype=torch.long))
    made = stubbed(diffusers.QwenImageEditPipeline, embeds, scheduler=small_flow(), vae=vae, text_encoder=None,
                   tokenizer=None, processor=None, transformer=net)
    return made, dict(image=picture(), height=32, width=32, negative_prompt=' ', true_cfg_scale=2.)

def flux_2(cls, **settings):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(down_block_types=['DownEncoderBlock2D']*2, up_block_types=['UpDecoderBlock2D']*2,
                                       block_out_channels=[8, 8], layers_per_block=1, latent_channels=1,
                                       norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False).eval()
    net, _ = small('Flux2Transformer2DModel')
    made = stubbed(cls, lambda: (fixed(1, 5, 8), torch.zeros(1, 5, 4)), scheduler=small_flow(), vae=vae,
                   text_encoder=None, tokenizer=None, transformer=net, **settings)
    return made, dict(image=picture(64), height=32, width=32, guidance_scale=2.5)

def flux_2_dev(monkeypatch): return flux_2(diffusers.Flux2Pipeline)
def klein(monkeypatch): return flux_2(diffusers.Flux2KleinPipeline, is_distilled=False)

MADE = dict(kontext=kontext, wan_i2v=wan_i2v, qwen_edit=qwen_edit, flux_2=flux_2_dev, klein=klein)

@pytest.mark.parametrize('what', MADE)
def test_pictures_as_arguments(what, tmp_path, monkeypatch):
    pipe, call = MADE[what](monkeypatch)
    pipe.set_progress_bar_config(disable=True)
    made = record(pipe, ['a red circle'], 6, probes=(1, 1), keep=tmp_path/'parts', **call)
    # a picture is the same picture
    again = record(pipe, ['a red circle'], 6, probes=(1, 1), keep=tmp_path/'parts', **call)
    assert np.array_equal(made.output, again.output)
    made.check(pipe, 6, call)
    sample, ran = make_sample(pipe, 'a red circle', 0, 6, made.plan(3), call)
    assert {len(p) for p in ran['passes'].values()} == {3} and np.isfinite(sample).all()
    assert sample_all(pipe, all_jobs(['a red circle'], [0]), tmp_path/'run', dict(steps=6), 6,
                      SpectrumConfig(n_passes=3), call) == (1, 0, [])

def test_a_picture_from_the_command_line(tmp_path, capsys):
    from spectrum_nb.sampling import sample
    pipe, _ = tiny('tiny-flux')
    diffusers.FluxImg2ImgPipeline(**pipe.components).save_pretrained(tmp_path/'model')
    picture().save(tmp_path/'picture.png')
    (tmp_path/'text.png').write_text('no picture')
    given = dict(prompt='a red circle', model=str(tmp_path/'model'), steps=10, guidance=2.5, height=32, width=32,
                 device='cpu')
    sample(**given, image=str(tmp_path/'picture.png'), out=str(tmp_path/'sample'))
    # of strength .6
    assert Image.open(tmp_path/'sample.png').size == (32, 32) and 'passes of 6 steps' in capsys.readouterr().out
    with pytest.raises((ValueError, SystemExit)):
        sample(**given, image=str(tmp_path/'text.png'), out=str(tmp_path/'other'))
    with pytest.raises((ValueError, SystemExit)):
        sample(**given | dict(model='tiny-flux'), image=str(tmp_path/'picture.png'), out=str(tmp_path/'other'))
    assert not (tmp_path/'other.png').exists()

def test_nothing_of_ours_passes_a_prompt_by_place():
    import ast
    from pathlib import Path

    import spectrum_nb
    for file in Path(spectrum_nb.__file__).parent.glob('*.py'):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, 'id', '') in ('pipe', 'source', 'pipeline'):
                assert not call.args, f'{file.name}:{call.lineno}'


# A bare denoiser

@pytest.mark.parametrize('at', range(1, N))
@pytest.mark.parametrize('down', [True, False])
def test_a_cancelled_run_leaves_no_trace_in_the_next(at, down):
    times = [1000 - 10*i for i in range(N)] if down else [.05*i for i in range(N)]
    with apply_spectrum(toy := Toy(), PAPER, N) as run:
        loop(toy, times[:at], torch.full((2, 4), 50.))
        got = loop(toy, times), loop(toy, times)
    assert all(right(g, times) for g in got)
    assert [s.passes for s in run.stats][-1] == PASSES and (at == 1 or not run.stats[-2].fallbacks)

def test_runs_of_other_lengths_and_samplers_in_turn_need_no_reset():
    with apply_spectrum(toy := Toy(), PAPER, N) as run:
        for times in ([*range(1000, 0, -50)], [*range(600, 0, -50)], [*range(1000, 0, -25)], [*range(1000, 0, -50)],
                      [*np.linspace(80, .1, N)], [*range(1000, 0, -50)]):
            assert right(loop(toy, times), times), times
    assert [s.n_steps for s in run.stats] == [N]*5 and run.stats[-1].passes == PASSES

@pytest.mark.parametrize('calls', [2, 5])
def test_a_repeated_time_is_a_second_call_of_the_step(calls):
    with apply_spectrum(toy := Toy(), PAPER, N) as run:
        for t in range(N):
            for k in range(calls): assert right([toy(torch.full((2, 4), 10.*k), float(t))], [t], 10.*k)
    assert [(s.context, s.passes) for s in run.stats] == [('' if not k else f'#{k + 1}', PASSES)
                                                          for k in range(calls)] and toy.passes == calls*len(PASSES)

def test_a_time_that_never_moves_is_said():
    with pytest.warns(UserWarning,
                      match="70 calls carried the same time .'timestep'."), apply_spectrum(toy := Toy(), PAPER, N):
        for _ in range(80): assert right([toy(torch.ones(2, 4), 1.)], [1.])

def test_guidance_that_begins_late_has_a_history_of_its_own():
    with apply_spectrum(toy := Toy(), PAPER, N):
        for t in range(N):
            for k in range(2 if t > 7 else 1): assert right([toy(torch.full((2, 4), 10.*k), float(t))], [t], 10.*k)

def test_two_runs_in_turn_in_one_thread_do_not_mix():
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with apply_spectrum(toy := Toy(), PAPER, N):
        seen = {0: 0, 1: 0}
        for k in [0]*6 + [1]*3 + [0]*4 + [1]*8 + [0]*10 + [1]*9:
            t = seen[k]
            seen[k] += 1
            assert torch.allclose(toy(x[k], float(t)), 2*(x[k] + 3*t), atol=1e-3), (k, t)

def test_times_of_frames_of_their_own_are_one_time():
    with apply_spectrum(toy := Toy(), PAPER, N) as run:
        for i in range(N):
            t = torch.clamp(torch.tensor([[1000. - 60*i + 100*f for f in range(4)]]), 0, 1000)
            toy(torch.ones(1, 4), t)
    assert [s.n_steps for s in run.stats] == [N]


# What a run is

def test_tiles_with_a_scheduler_state_each():
    pipe, call = tiny('tiny-sdxl')
    net = pipe.unet
    config, inputs = EXAMPLES['UNet2DConditionModel']
    state, x = [], [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    embeds = [torch.randn(1, 7, net.config.cross_attention_dim, generator=torch.Generator().manual_seed(9))]
    extra = dict(
        text_embeds=torch.zeros(1, net.add_embedding.linear_1.in_features - 6*net.config.addition_time_embed_dim),
        time_ids=torch.zeros(1, 6))
    def tiled(x=x):
        y = [v.clone() for v in x]
        pipe.scheduler.set_timesteps(N)
        times = pipe.scheduler.timesteps
        views = [copy.deepcopy(vars(pipe.scheduler)) for _ in y]
        with torch.no_grad():
            for t in times:
                for j in range(len(y)):
                    vars(pipe.scheduler).update(views[j])
                    noise = net(pipe.scheduler.scale_model_input(y[j], t), t, encoder_hidden_states=embeds[0],
                                added_cond_kwargs=extra).sample
                    y[j] = pipe.scheduler.step(noise, t, y[j]).prev_sample
                    views[j] = copy.deepcopy(vars(pipe.scheduler))
        return torch.cat(y)
    with apply_spectrum(pipe, PAPER): alone = torch.cat([tiled([v]) for v in x])
    with apply_spectrum(pipe, PAPER) as run: fast, again = tiled(), tiled()
    assert [(s.context, s.n_steps) for s in run.stats] == [(c, N) for c in ('', '#2', '#3')]*2
    assert all(s.passes == PASSES and not s.fallbacks
               for s in run.stats) and torch.equal(fast, again) and torch.equal(fast, alone)

def test_a_panorama():
    pipe, call = tiny('tiny-sdxl')
    model, c = small('UNet2DConditionModel')
    class Panorama(diffusers.StableDiffusionPanoramaPipeline):
        "With views of eight latents, not 64"
        def get_views(self, height, width, **kwargs):
            return super().get_views(4*height, 4*width, window_size=8, stride=4)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=[8, 16], in_channels=3, out_channels=3,
                                  down_block_types=['DownEncoderBlock2D']*2, up_block_types=['UpDecoderBlock2D']*2,
                                  latent_channels=4, norm_num_groups=4)
    made = Panorama(vae=vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=model,
                    scheduler=diffusers.DDIMScheduler(clip_sample=False), safety_checker=None, feature_extractor=None,
                    requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    width = model.config.cross_attention_dim
    embeds = dict(prompt_embeds=torch.randn(1, 5, width), negative_prompt_embeds=torch.zeros(1, 5, width))
    def draw():
        return made(**embeds, num_inference_steps=N, height=16, width=32, generator=torch.Generator().manual_seed(0),
                    output_type='latent')[0]
    plain = draw()
    with apply_spectrum(made, PAPER) as run: draw()
    # a history for each view
    assert len(run.stats) == 3 and all(s.passes == PASSES and not s.fallbacks for s in run.stats)
    with apply_spectrum(made, SpectrumConfig(speedup=1)): assert np.array_equal(draw(), plain)

def test_an_own_loop_in_which_the_scheduler_is_copied_at_each_step(flux):
    pipe, call = flux
    plain = latents(pipe, call)
    own, seen = pipe.scheduler, []
    def copying(pipe, i, t, given):
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        return given
    try:
        whole = latents(pipe, call, callback_on_step_end=copying)
        pipe.scheduler = own
        with apply_spectrum(pipe, PAPER) as run: fast = latents(pipe, call, callback_on_step_end=copying)
    finally: pipe.scheduler = own
    assert torch.equal(whole, plain) and [s.passes for s in run.stats] == [PASSES] and relative(fast, plain) < .3

def test_each_step_on_another_worker_thread(flux):
    pipe, call = flux
    net, pools, x = pipe.transformer, [ThreadPoolExecutor(1) for _ in range(3)], torch.randn(
        1, 16, 16, generator=torch.Generator().manual_seed(0))
    encoded = pipe.encode_prompt('a red circle', 'a red circle', max_sequence_length=16)
    def steps():
        y = x
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1/N, N), mu=.5)
        for t in pipe.scheduler.timesteps:
            with torch.no_grad():
                v = net(y, timestep=t.expand(1)/1000, guidance=torch.tensor([2.5]), pooled_projections=encoded[1],
                        encoder_hidden_states=encoded[0], txt_ids=encoded[2], img_ids=torch.zeros(16, 3),
                        return_dict=False)[0]
            y = pipe.scheduler.step(v, t, y, return_dict=False)[0]
            yield y
    with apply_spectrum(pipe, PAPER) as run:
        alone = [*steps()][-1]
        it = steps()
        for i in range(N): last = pools[i % 3].submit(next, it).result()
    assert torch.equal(last, alone) and [s.passes for s in run.stats] == [PASSES]*2
    with apply_spectrum(net, PAPER, N) as run:
        it = steps()
        for i in range(N): last = pools[i % 3].submit(next, it).result()
    assert torch.equal(last, alone) and [s.passes for s in run.stats] == [PASSES]
    for p in pools: p.shutdown()

def diffedit():
    model, _ = small('UNet2DConditionModel')
    pipe, _ = tiny('tiny-sdxl')
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=[8, 16], in_channels=3, out_channels=3,
                                  down_block_types=['DownEncoderBlock2D']*2, up_block_types=['UpDecoderBlock2D']*2,
                                  latent_channels=4, norm_num_groups=4)
    model.register_to_config(sample_size=64)
    made = diffusers.StableDiffusionDiffEditPipeline(
        vae=vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=model,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        inverse_scheduler=diffusers.DDIMInverseScheduler(clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    width = model.config.cross_attention_dim
    embeds = dict(prompt_embeds=torch.randn(1, 5, width, generator=torch.Generator().manual_seed(1)),
                  negative_prompt_embeds=torch.zeros(1, 5, width))
    return made, lambda: made.invert(**embeds, image=picture(32), num_inference_steps=24, inpaint_strength=.8, generator
                                     =torch.Generator().manual_seed(0), guidance_scale=1.5).latents

@pytest.mark.parametrize('before', [False, True])
def test_an_inversion_on_a_second_scheduler(before):
    pipe, invert = diffedit()
    if before: pipe.scheduler.set_timesteps(24)
    plain = invert()
    with apply_spectrum(pipe, SpectrumConfig(speedup=1)): assert torch.equal(invert(), plain)
    with apply_spectrum(pipe, SpectrumConfig(n_passes=8)) as run: fast = invert(), invert()
    assert [s.n_passes for s in run.stats] == [8]*2 and all(relative(f, plain) < .5 for f in fast)

@pytest.mark.parametrize('speedup', [1, 3])
def test_steps_that_cannot_be_told_get_one_clear_message(flux, speedup):
    pipe, call = flux
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, .1, 10), mu=.5)
    with apply_spectrum(pipe, SpectrumConfig(speedup=speedup)), pytest.raises(
            RuntimeError, match=r'apply_spectrum\(pipe.transformer, n_steps=…\)'), torch.no_grad():
        for t in (900., 700., 500.):
            pipe.transformer(**small_flux_call(pipe.transformer), timestep=torch.tensor([t/1000]))

def small_flux_call(net):
    c = net.config
    return dict(hidden_states=torch.ones(1, 16, c.in_channels), encoder_hidden_states=torch.ones(
        1, 5, c.joint_attention_dim), pooled_projections=torch.ones(1, c.pooled_projection_dim), img_ids=torch.zeros(
            16, 3), txt_ids=torch.zeros(5, 3), guidance=torch.ones(1))


# Gradients

@pytest.mark.parametrize('feature', ['hidden', 'output'])
@pytest.mark.parametrize('of', ['sample', 'weights'])
def test_a_gradient_through_a_forecast_is_refused_when_it_is_asked_for(feature, of):
    model, call = small('FluxTransformer2DModel')
    model.requires_grad_(of == 'weights')
    x = call['hidden_states'].clone().requires_grad_(of == 'sample')
    with apply_spectrum(model, PAPER, N, feature=feature) as run:
        outs = [model(**call | dict(hidden_states=x, timestep=torch.tensor([1 - i/N])))[0] for i in range(N)]
    assert all(o.requires_grad for o in outs) and [s.passes for s in run.stats] == [PASSES]
    outs[PASSES[-1]].sum().backward()
    with pytest.raises(RuntimeError, match='a gradient was asked of a forecast'): outs[PASSES[-1] - 1].sum().backward()

@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_asked(mode, monkeypatch):
    monkeypatch.setattr('spectrum_nb.hook.with_gradient', None)
    model, call = small('FluxTransformer2DModel')
    with mode(), apply_spectrum(model, PAPER, N):
        for i in range(N): assert not model(**call | dict(timestep=torch.tensor([1 - i/N])))[0].requires_grad

def test_somebody_who_records_gradients_and_asks_for_none_is_not_disturbed():
    model, call = small('FluxTransformer2DModel')
    with torch.no_grad(), apply_spectrum(model, PAPER, N):
        want = [model(**call | dict(timestep=torch.tensor([1 - i/N])))[0] for i in range(N)]
    with apply_spectrum(model, PAPER, N):
        got = [model(**call | dict(timestep=torch.tensor([1 - i/N])))[0] for i in range(N)]
    assert all(torch.equal(a.detach(), b) for a, b in zip(got, want))


# Others at work on the same denoiser

def test_the_controls_of_hunyuandit_are_left_out_at_forecasts():
    model, call = small('HunyuanDiT2DModel')
    shape = (1, 16, model.config.hidden_size)
    controls = lambda: [torch.full(shape, .01) for _ in range(model.config.num_layers//2 - 1)]
    with torch.no_grad():
        plain = model(**call, controlnet_block_samples=controls())[0]
        with apply_spectrum(model, PAPER, N) as run:
            outs = [
                model(**call | dict(timestep=torch.tensor([5. - i*1e-5])), controlnet_block_samples=controls())[0]
                for i in range(N)
            ]
    assert [s.passes for s in run.stats] == [PASSES] and all(relative(o, plain) < 1e-3 for o in outs)

def test_a_pipeline_that_reads_attention_maps_is_refused_by_name():
    class CrossAttnStoreProcessor:
        def __init__(self): self.attention_probs = None
        def __call__(self, attn, hidden_states, **kwargs): return hidden_states
    model, call = small('UNet2DConditionModel')
    next(m for m in model.modules() if hasattr(m, 'set_processor')).processor = CrossAttnStoreProcessor()
    step = lambda i: model(**call | dict(timestep=torch.tensor(900 - i)))
    with torch.no_grad(), apply_spectrum(model, PAPER, N), pytest.raises(
            RuntimeError, match='CrossAttnStoreProcessor keeps attention maps'):
        [step(i) for i in range(N)]
    with torch.no_grad(), apply_spectrum(model, SpectrumConfig(speedup=1), N): [step(i) for i in range(N)]

def test_hooks_on_blocks_are_said():
    toy = Toy()
    toy.blocks[1].register_forward_hook(lambda *_: None)
    with apply_spectrum(toy, PAPER, N), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        loop(toy)
    assert len(said) == 1 and 'forward hooks on the blocks' in str(said[0].message)

def accelerated(self, *args, **kwargs): return type(self).before(self, *args, **kwargs)

def test_a_forward_that_somebody_replaced_is_refused_or_said():
    model, call = small('FluxTransformer2DModel')
    cls = type(model)
    own = cls.forward
    try:
        cls.forward = accelerated
        with pytest.raises(RuntimeError, match='test_situations.accelerated'): apply_spectrum(model, PAPER, N)
        with pytest.warns(UserWarning, match='test_situations.accelerated'):
            apply_spectrum(model, PAPER, N, feature='output').remove()
    finally: cls.forward = own
    model.forward = lambda *args, **kwargs: own(model, *args, **kwargs)
    with pytest.raises(RuntimeError, match='is not its class'): apply_spectrum(model, PAPER, N)
    with pytest.warns(UserWarning, match='is not its class'): apply_spectrum(model, PAPER, N, feature='output').remove()
    del model.forward
    class Patched(Toy): forward = accelerated                   # of a class of one's own it may be meant so
    Patched.before = Toy.forward
    with pytest.warns(UserWarning, match='test_situations.accelerated'), apply_spectrum(toy := Patched(), PAPER, N):
        assert right(loop(toy), range(N))
    model._is_cached = True
    with pytest.raises(RuntimeError, match='cache-dit'): apply_spectrum(model, PAPER, N)

def test_own_classes_and_known_wrappers_are_not_said():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        apply_spectrum(Toy(), PAPER, N).remove()
        for name in ('FluxTransformer2DModel', 'UNet2DConditionModel', 'WanTransformer3DModel',
                     'SD3Transformer2DModel'):
            apply_spectrum(small(name)[0], PAPER, N).remove()

def test_a_whole_graph_names_the_call_that_works(flux):
    pipe, call = flux
    torch._dynamo.reset()
    with torch.no_grad(), apply_spectrum(pipe.transformer, PAPER, N), pytest.raises(Exception,
                                                                                    match='compile_repeated_blocks'):
        torch.compile(pipe.transformer, fullgraph=True, backend='eager')(**small_flux_call(pipe.transformer),
                                                                         timestep=torch.ones(1))
    torch._dynamo.reset()


# Other pipelines

def test_a_modular_pipeline(flux):
    pipe, call = flux
    from diffusers import ModularPipeline
    from diffusers.modular_pipelines import FluxAutoBlocks
    modular = FluxAutoBlocks().init_pipeline()
    modular.update_components(
        **{k: v for k, v in pipe.components.items() if v is not None and k in modular._component_specs})
    assert isinstance(modular, ModularPipeline)
    modular.set_progress_bar_config(disable=True)
    def draw():
        return modular(prompt='a red circle', num_inference_steps=N, generator=torch.Generator().manual_seed(3),
                       output_type='latent', output='latents', **{k: v for k, v in call.items()})
    plain = draw()
    with apply_spectrum(modular, SpectrumConfig(speedup=1)): assert torch.equal(draw(), plain)
    with apply_spectrum(modular) as run: fast = draw(), draw()
    with apply_spectrum(pipe) as ordinary: latents(pipe, call)
    assert [s.passes
            for s in run.stats] == [s.passes
                                    for s in ordinary.stats]*2 and torch.equal(*fast) and torch.equal(draw(), plain)

def test_two_nets_in_step_are_refused_with_what_works():
    torch.manual_seed(0)
    both = diffusers.UNetControlNetXSModel(
        sample_size=16, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), block_out_channels=(4, 8), cross_attention_dim=8,
        transformer_layers_per_block=1, num_attention_heads=2, norm_num_groups=4,
        ctrl_conditioning_embedding_out_channels=(2, 2), ctrl_block_out_channels=(2, 4), ctrl_num_attention_heads=2,
        ctrl_max_norm_num_groups=2, use_linear_projection=False, upcast_attention=False).eval()
    with pytest.raises(ValueError, match="feature='output'"): apply_spectrum(both, PAPER, N)
    call = dict(sample=torch.randn(1, 4, 8, 8), encoder_hidden_states=torch.randn(1, 5, 8),
                controlnet_cond=torch.randn(1, 3, 16, 16))
    with torch.no_grad(), apply_spectrum(both, PAPER, N, feature='output') as run:
        [both(**call, timestep=torch.tensor(900 - i)) for i in range(N)]
    assert [s.passes for s in run.stats] == [PASSES]

def test_a_pipeline_that_steps_copies_of_its_scheduler_is_told_the_call_that_works():
    net, call = small('SkyReelsV2Transformer3DModel')
    pipe = SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), config={}, transformer=net)
    pipe.scheduler.set_timesteps(N)
    from spectrum_nb.clock import PipelineClock
    with torch.no_grad(), apply_spectrum(net, PAPER, N) as run:
        bare, run.hooks[0].clock = run.hooks[0].clock, PipelineClock(pipe, net, attribute='transformer')
        with pytest.raises(RuntimeError, match=r'apply_spectrum\(pipe.transformer, n_steps=…\)'):
            for i in range(3): net(**call | dict(timestep=torch.tensor([900 - 40*i])))
        run.reset()
        run.hooks[0].clock = bare
        for i in range(N): net(**call | dict(timestep=torch.tensor([900 - 40*i])))
    assert [s.passes for s in run.stats] == [PASSES]


# Servers

def test_every_cache_is_bounded():
    with apply_spectrum(toy := Toy(), SpectrumConfig(speedup=2), N) as run:
        for n in range(2, 300): run.plan_for(n, sigmas=tuple(np.linspace(1, 0, n + 1)))
        assert len(run._plans) <= run.KEPT_PLANS
        for k in range(700):
            with toy.cache_context(f'request {k}'): loop(toy, range(2))
        hook = run.hooks[0]
        assert len(hook.runs) <= 2*hook.KEPT and len(hook.calls) <= 2*hook.KEPT and len(hook.clock.known) <= 64
        for _ in range(run.KEPT_STATS + 10): run.note(None)
        assert len(run.stats) <= run.KEPT_STATS

def test_memory_is_flat_over_requests_of_any_size_and_length():
    def resident():
        with open('/proc/self/statm') as f: return int(f.read().split()[1])*os.sysconf('SC_PAGE_SIZE')
    rng, n = np.random.default_rng(0), 10_000 if NIGHTLY else 400
    with torch.no_grad(), apply_spectrum(toy := Toy(), SpectrumConfig(), 12) as run:
        def request():
            steps, size = int(rng.integers(1, 30)), int(rng.integers(1, 40))
            times = np.linspace(rng.uniform(.3, 1), 0,
                                steps + 1)[:-1][:steps if rng.random() < .7 else int(rng.integers(1, steps + 1))]
            loop(toy, times, torch.ones(int(rng.integers(1, 3)), size))
        for _ in range(200): request()
        gc.collect()
        before = resident()
        for _ in range(n): request()
        gc.collect()
        assert resident() - before < 6_000_000

def test_a_denoiser_that_is_swapped_is_noticed_and_followed(flux):
    pipe, call = flux
    first, second = pipe.transformer, copy.deepcopy(pipe.transformer)
    plain, before = latents(pipe, call), (state_of(first), state_of(second), list(vars(pipe)))
    try:
        with apply_spectrum(pipe, PAPER) as run:
            fast = latents(pipe, call)
            pipe.transformer = second
            with pytest.warns(UserWarning, match='holds another transformer'):
                assert torch.equal(latents(pipe, call), fast)
            assert [s.passes for s in run.stats] == [PASSES]*2 and state_of(first) == before[0]
            pipe.transformer = first
            assert torch.equal(latents(pipe, call), fast) and len(run.stats) == 3
        assert (state_of(first), state_of(second), list(vars(pipe))) == before and torch.equal(
            latents(pipe, call), plain)
    finally: pipe.transformer = first

def test_adapters_that_are_changed_within_a_run_begin_a_new_history(flux):
    pipe, call = tiny('tiny-flux')
    from test_composition import lora
    weights = lora(pipe.transformer, 'transformer', 1)
    for change in (lambda: pipe.load_lora_weights(dict(weights), adapter_name='one'),
                   lambda: pipe.set_adapters(['one'], [.2]), pipe.disable_lora, pipe.unload_lora_weights):
        def at(pipe, i, t, given):
            if i == 7: change()
            return given
        with apply_spectrum(pipe, PAPER) as run: latents(pipe, call, callback_on_step_end=at)
        assert list(run.stats[0].fallbacks) == [8] and 'adapters' in run.stats[0].fallbacks[8]

def test_a_calibration_looks_at_the_model_and_not_at_what_adapters_add(flux):
    pipe, call = tiny('tiny-flux')
    from test_composition import lora
    made = shipped_calibration('tiny-flux', 28)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        made.check(pipe, 28, call)
        pipe.load_lora_weights(lora(pipe.transformer, 'transformer', 1))
        made.check(pipe, 28, call)
        pipe.unload_lora_weights()
        pipe.transformer.fuse_qkv_projections()
        made.check(pipe, 28, call)
    with pytest.warns(UserWarning, match='dtype'): made.check(pipe.to(torch.bfloat16), 28, call)
    pipe.to(torch.float32)
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith('_')}
    pipe.transformer = type(pipe.transformer)(**config | dict(num_layers=config['num_layers'] + 1))
    with pytest.raises(ValueError, match='num_layers was'): made.check(pipe, 28, call)


# What others reported of caches

def framepack():
    net, _ = small('HunyuanVideoFramepackTransformer3DModel')
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=['HunyuanVideoDownBlock3D']*4, up_block_types=['HunyuanVideoUpBlock3D']*4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4).eval()
    class Stubbed(diffusers.HunyuanVideoFramepackPipeline):
        def encode_prompt(self, *args, **kwargs): return fixed(1, 5, 8), fixed(1, 8), torch.ones(1, 5)
        def encode_image(self, *args, **kwargs): return fixed(1, 3, 8)
    made = Stubbed(text_encoder=None, tokenizer=None, transformer=net, vae=vae,
                   scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder_2=None, tokenizer_2=None,
                   image_encoder=None, feature_extractor=None)
    made.set_progress_bar_config(disable=True)
    return made, lambda: made(image=picture(), prompt='', height=32, width=
                              32, num_frames=9, latent_window_size=2, num_inference_steps=N, generator=torch.Generator(
                              ).manual_seed(0), output_type='latent', return_dict=False)[0][0]

def test_framepack_whose_sections_are_runs_of_their_own():
    pipe, draw = framepack()
    plain = draw()
    with apply_spectrum(pipe, SpectrumConfig(speedup=1)): assert torch.equal(draw(), plain)
    with apply_spectrum(pipe, PAPER) as run: fast = draw()
    assert [s.passes for s in run.stats] == [PASSES]*2 and not any(s.fallbacks for s in run.stats)
    assert relative(fast, plain) < .02 and torch.equal(draw(), plain)

def test_stable_cascade_whose_sampler_adds_noise_is_refused():
    torch.manual_seed(0)
    net = denoiser_classes()['StableCascadeUNet'](**EXAMPLES['StableCascadeUNet'][0]
                                                  | dict(clip_image_in_channels=8, clip_text_in_channels=8)).eval()
    embeds = lambda: (fixed(1, 5, 8), fixed(1, 1, 8), fixed(1, 5, 8, seed=1), fixed(1, 1, 8, seed=1))
    pipe = stubbed(diffusers.StableCascadePriorPipeline, embeds, tokenizer=None, text_encoder=None, prior=net,
                   scheduler=diffusers.DDPMWuerstchenScheduler())
    pipe.set_progress_bar_config(disable=True)
    draw = lambda: pipe(prompt='', height=64, width=64, num_inference_steps=N, generator=torch.Generator().manual_seed(
        0), output_type='pt').image_embeddings
    plain = draw()
    with apply_spectrum(pipe, PAPER), pytest.raises(ValueError, match='DDPMWuerstchenScheduler adds noise'): draw()
    with apply_spectrum(pipe, SpectrumConfig(speedup=1)): assert torch.equal(draw(), plain)

def test_ledits_pp_whose_sampler_adds_noise_is_refused():
    model, _ = small('UNet2DConditionModel')
    model.register_to_config(sample_size=64)
    pipe, _ = tiny('tiny-sdxl')
    class Encoder(nn.Module):
        dtype, device, config = torch.float32, torch.device('cpu'), pipe.text_encoder.config
        def forward(self, ids, **kwargs): return (fixed(*ids.shape, model.config.cross_attention_dim),)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=[8, 16], down_block_types=['DownEncoderBlock2D']*2,
                                  up_block_types=['UpDecoderBlock2D']*2, norm_num_groups=4)
    made = diffusers.LEditsPPPipelineStableDiffusion(
        vae=vae, text_encoder=Encoder(), tokenizer=pipe.tokenizer, unet=model,
        safety_checker=None, feature_extractor=None, scheduler=diffusers.DPMSolverMultistepScheduler(
            algorithm_type='sde-dpmsolver++', solver_order=2), requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    invert = lambda: made.invert(image=picture(), num_inversion_steps=10, skip=.2, source_prompt='a circle',
                                 source_guidance_scale=2., generator=torch.Generator().manual_seed(0))
    def edit():
        invert()
        return made(editing_prompt=['a cross'], edit_guidance_scale=5., edit_threshold=.8, output_type='latent',
                    use_intersect_mask=False).images
    plain = edit()
    with apply_spectrum(made, SpectrumConfig(speedup=1)): assert torch.equal(edit(), plain)
    with apply_spectrum(made, PAPER), pytest.raises(ValueError, match='DPMSolverMultistepScheduler adds noise'):
        invert()

class Packed(nn.Module):
    "A layer whose weights are bytes, made numbers when it is called, as those of GGUF and of nunchaku are"
    def __init__(self, layer):
        super().__init__()
        self.bias, self.scale = layer.bias, layer.weight.detach().abs().max()/127
        self.weight = nn.Parameter((layer.weight.detach()/self.scale + 128).round().to(torch.uint8),
                                   requires_grad=False)
    def forward(self, x): return nn.functional.linear(x, (self.weight.to(x.dtype) - 128)*self.scale, self.bias)

def pack(module):
    "Pack all layers within; how many"
    found = [(owner, name) for owner in module.modules() for name, m in owner.named_children() if type(m) is nn.Linear]
    for owner, name in found: setattr(owner, name, Packed(getattr(owner, name)))
    return len(found)

def test_weights_that_are_bytes():
    pipe, call = tiny('tiny-flux')
    assert pack(pipe.transformer) > 50
    plain = latents(pipe, call)
    with apply_spectrum(pipe, SpectrumConfig(speedup=1)): assert torch.equal(latents(pipe, call), plain)
    with apply_spectrum(pipe, PAPER) as run: assert relative(latents(pipe, call), plain) < .15
    assert [s.passes
            for s in run.stats] == [PASSES] and not run.stats[0].fallbacks and torch.equal(latents(pipe, call), plain)

def test_one_module_in_place_of_all_blocks():
    class AllBlocks(nn.Module):
        "What nunchaku puts in place of the blocks of FLUX"
        runs = 0
        def __init__(self, *blocks):
            super().__init__()
            self.inside = nn.ModuleList(blocks)
        def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None, **kwargs):
            self.runs += 1
            for b in self.inside:
                encoder_hidden_states, hidden_states = b(hidden_states=hidden_states,
                                                         encoder_hidden_states=encoder_hidden_states, temb=temb,
                                                         image_rotary_emb=image_rotary_emb)
            return encoder_hidden_states, hidden_states
    pipe, call = tiny('tiny-flux')
    net = pipe.transformer
    with apply_spectrum(pipe, PAPER): own = latents(pipe, call)
    fused = AllBlocks(*net.transformer_blocks, *net.single_transformer_blocks)
    net.transformer_blocks, net.single_transformer_blocks = nn.ModuleList([fused]), nn.ModuleList()
    with apply_spectrum(pipe, PAPER) as run: assert torch.allclose(latents(pipe, call), own, atol=1e-4)
    assert [s.passes for s in run.stats] == [PASSES] and fused.runs == len(PASSES)

def test_guidance_by_skipped_layers_which_is_asked_for_at_some_steps():
    pipe, call = tiny('tiny-sd3')
    call |= dict(guidance_scale=4., skip_guidance_layers=[0], skip_layer_guidance_start=.1, skip_layer_guidance_stop=.5)
    plain, mild = latents(pipe, call), SpectrumConfig(speedup=1.3)
    with apply_spectrum(pipe, SpectrumConfig(speedup=1)): assert torch.equal(latents(pipe, call), plain)
    with apply_spectrum(pipe, mild) as run: fast, again = latents(pipe, call), latents(pipe, call)
    assert relative(fast, plain) < .1 < relative(latents(pipe, call | dict(skip_guidance_layers=None)), plain)
    assert torch.equal(fast, again) and [s.context for s in run.stats] == ['', ''] and not any(s.fallbacks
                                                                                               for s in run.stats)

def test_guidance_that_a_callback_turns_off():
    pipe, call = tiny('tiny-sdxl')
    def off(pipe, i, t, given):
        if i != 12: return given
        pipe._guidance_scale = 1.
        return {k: v if k == 'latents' else v[-1:] for k, v in given.items()}
    call |= dict(guidance_scale=5., callback_on_step_end=off,
                 callback_on_step_end_tensor_inputs=['latents', 'prompt_embeds', 'add_text_embeds', 'add_time_ids'])
    plain = latents(pipe, call)
    with apply_spectrum(pipe, SpectrumConfig(speedup=1)): assert torch.equal(latents(pipe, call), plain)
    with apply_spectrum(pipe, PAPER) as run: assert relative(latents(pipe, call), plain) < .15
    assert list(run.stats[0].fallbacks) == [13] and 'shape' in run.stats[0].fallbacks[13]

def test_merged_tokens_whose_blocks_have_another_class():
    from diffusers.models.attention import BasicTransformerBlock
    class Merged(BasicTransformerBlock):
        "As tomesd does, which also looks at the size of what the denoiser is given"
        runs = []
        def forward(self, x, *args, **kwargs):
            self.runs.append(seen[-1])
            return super().forward(.9*x + .1*x.mean(1, keepdim=True), *args, **kwargs)
    pipe, call = tiny('tiny-sdxl')
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    blocks = [m for m in pipe.unet.modules() if type(m) is BasicTransformerBlock]
    for m in blocks: m.__class__ = Merged
    plain = latents(pipe, call)
    Merged.runs.clear()
    seen.clear()
    with apply_spectrum(pipe, PAPER) as run: latents(pipe, call)
    assert [s.passes for s in run.stats] == [PASSES] and len(seen) == N and len(Merged.runs) == len(PASSES)*len(blocks)
    assert torch.equal(latents(pipe, call), plain)

def test_a_cache_of_diffusers_that_is_enabled_before_or_meanwhile():
    pipe, call = tiny('tiny-flux')
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
    pipe, call = tiny('tiny-wan')
    torch.manual_seed(0)
    two = diffusers.WanPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, copy.deepcopy(pipe.scheduler),
                                pipe.transformer, copy.deepcopy(pipe.transformer), boundary_ratio=.6)
    two.set_progress_bar_config(disable=True)
    for n in (4, 20):
        plain = latents(two, call, n)
        with apply_spectrum(two, SpectrumConfig(speedup=1)) as run: assert torch.equal(latents(two, call, n), plain)
        lengths = {s.context.split('/')[0]: s.n_steps for s in run.stats}
        assert len(lengths) == 2 and sum(lengths.values()) == n and min(lengths.values()) > 0
    with apply_spectrum(two, SpectrumConfig(n_passes=10)) as run: latents(two, call, 20)
    assert all(s.n_steps == lengths[s.context.split('/')[0]]
               for s in run.stats) and sum(s.n_passes for s in run.stats)/2 == pytest.approx(10, abs=1)

def test_many_requests_at_once_on_one_pipeline_are_refused_and_harm_nothing(flux):
    pipe, call = flux
    with apply_spectrum(pipe, PAPER) as run: alone = latents(pipe, call)
    run, refused = apply_spectrum(pipe.transformer, PAPER, N), []
    def request(seed):
        toy = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed))
        try: pipe.transformer(**small_flux_call(pipe.transformer) | dict(hidden_states=toy), timestep=torch.ones(1))
        except RuntimeError as error: refused.append(str(error))
    def intrude(*_):
        for k in range(3):
            (thread := threading.Thread(target=request, args=(k,))).start()
            thread.join()
    inside = pipe.transformer.x_embedder.register_forward_pre_hook(intrude)
    try: request(0)
    finally:
        inside.remove()
        run.remove()
    assert len(refused) == 3 and all('in the middle of a call in another thread' in r for r in refused)
    with apply_spectrum(pipe, PAPER): assert torch.equal(latents(pipe, call), alone)


# Programs of what users do

class Adapted(Toy):
    "A toy with a condition, and with what peft leaves: `peft_config`, and a shift that an adapter adds to what its blocks make"
    def forward(self, hidden_states, timestep, condition=0.):
        return super().forward(hidden_states + condition + (5. if vars(self).get('peft_config') else 0.), timestep)

class Line(diffusers.DiffusionPipeline):
    "A pipeline whose denoiser is given one sample throughout, so that its answers lie on a line: 2·(x + condition + 3t)"
    def __init__(self, transformer):
        super().__init__()
        self.register_modules(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
        object.__setattr__(self, 'transformer', transformer)

    def __call__(self, n, begin, tiles, copies, ask):
        self.scheduler.set_timesteps(n)
        self.scheduler.set_begin_index(begin)
        timesteps, self.num_timesteps = self.scheduler.timesteps[begin:], n - begin
        views = [copy.deepcopy(vars(self.scheduler)) for _ in range(tiles)] if copies else []
        with self.progress_bar(total=len(timesteps)):
            for i, t in enumerate(timesteps):
                for k in range(tiles):
                    if copies: vars(self.scheduler).update(views[k])
                    ask(i, k, t/1000)
                    if copies or k == tiles - 1: self.scheduler.step(torch.zeros(1, 4), t, torch.zeros(1, 4))
                    if copies: views[k] = copy.deepcopy(vars(self.scheduler))

lengths = st.integers(1, 26)
runs = st.fixed_dictionaries(
    dict(n=lengths, seed=st.integers(0, 2), prompt=st.integers(0, 2), cut=st.none() | st.integers(0, 25),
         tiles=st.sampled_from([1, 1, 1, 2, 3]), copies=st.booleans(), begin=st.sampled_from([0, 0, 0, 3]),
         adapter=st.none() | st.integers(1, 25)))
acts = st.lists(
    st.one_of(
        runs, runs, runs, st.tuples(st.just('thread'), st.integers(0, 2)), *[
            st.tuples(st.just(what), st.just(0))
            for what in ('wrap', 'unwrap', 'swap', 'grad', 'adapter', 'scheduler', 'copy', 'remove')
        ]), min_size=1, max_size=10)

@examples(600, 12_000)
@given(program=acts, bare=st.booleans(), rises=st.booleans())
def test_programs_of_what_users_do_draw_what_they_draw_without(program, bare, rises):
    toys, config = [Adapted(), Adapted()], SpectrumConfig.paper(blend=0, warmup=2)
    pipe, threads, now = Line(toys[0]), [ThreadPoolExecutor(1)
                                         for _ in range(2)], SimpleNamespace(at=0, grad=False, thread=0, sure=True)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(6, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    left = lambda: [[([a for a in attributes if a[0] != 'peft_config'], *rest) for attributes, *rest in state_of(t)]
                    for t in toys]
    before = left()
    def apply(): return apply_spectrum(pipe.transformer, config, N) if bare else apply_spectrum(pipe, config)
    def toggle():
        if 'peft_config' in vars(toy := toys[now.at]): del toy.peft_config
        else: toy.peft_config = {'one': None}
    def ask(run, i, k, t):
        if i == run['cut']: raise Cancelled
        if i == run['adapter'] and not k: toggle()
        seed = run['seed'] + 3*bool(run['begin'])                    # a picture from a picture begins with other noise
        toy, x = toys[now.at], (noise[seed] + k).requires_grad_(now.grad)
        ran, recorded = toy.passes, torch.enable_grad() if now.grad else torch.no_grad()
        prompt = seed if bare else run['prompt']                     # a bare denoiser knows a run by its noise
        with recorded: got = pipe.transformer(x, t, prompt)
        want = 2*(x.detach() + prompt + (5 if 'peft_config' in vars(toy) else 0) + 3*t)
        assert torch.allclose(got.detach(), want, atol=2e-3), (i, k, t, (got - want).abs().max())
        if not now.grad: return
        if toy.passes > ran: assert torch.equal(torch.autograd.grad(got.sum(), x)[0], torch.full_like(x, 2.))
        else:
            with pytest.raises(RuntimeError, match='a gradient was asked of a forecast'):
                torch.autograd.grad(got.sum(), x)
    def draw(run):
        if bare:
            times = torch.linspace(1, 1/run['n'], run['n'])
            if rises: times = 1 - times                    # every run begins at the same end, or late
            for i, t in enumerate(times[run['begin']:]):
                for k in range(run['tiles']): ask(run, i, k, t)
        else:
            pipe(run['n'], min(run['begin'], run['n'] - 1), run['tiles'], run['copies'],
                 lambda i, k, t: ask(run, i, k, t))
    handle = apply()
    try:
        for act in program:
            if isinstance(act, dict):
                done, length = len(handle.stats), max(act['n'] - act['begin'], 1)
                try: draw(act) if not now.thread else threads[now.thread - 1].submit(draw, act).result()
                except Cancelled: continue
                stats = handle.stats[done:]
                if not bare and act['adapter'] is None:
                    assert [(s.n_steps, s.passes) for s in stats
                            ] == [(length, make_plan(config, length).passes)]*act['tiles'] and not any(s.fallbacks
                                                                                                       for s in stats)
                continue
            what, which = act
            if what == 'thread': now.thread = which
            elif what == 'wrap': pipe.transformer = Shell(pipe.transformer)
            elif what == 'unwrap': pipe.transformer = vars(pipe.transformer)['_modules'].get('inner', pipe.transformer)
            elif what == 'grad': now.grad = not now.grad
            elif what == 'adapter': toggle()
            elif what == 'scheduler': pipe.scheduler = copy.deepcopy(pipe.scheduler)
            elif what == 'copy':
                hooked = toys[now.at] if bare else handle._hooked[0][0]         # a swap is followed at the next call
                with pytest.raises(RuntimeError, match='cannot be copied'): copy.deepcopy(hooked)
            elif what == 'remove':
                handle.remove()
                assert left() == before
                handle = apply()
            elif what == 'swap':
                if bare: handle.remove()
                now.at = 1 - now.at
                pipe.transformer = toys[now.at]
                if bare: handle = apply()
        handle.remove()
        assert left() == before and all(callable(t.forward) for t in toys) and 'progress_bar' not in vars(pipe)
    finally:
        handle.remove()
        for pool in threads: pool.shutdown()


# What held

def test_what_held_with_kontext_inpainting_and_other_sigmas(flux, sdxl):
    pipe, call = flux
    for cls, more in ((diffusers.FluxKontextPipeline, dict(image=picture(), _auto_resize=False, max_area=32*32)),
                      (diffusers.FluxInpaintPipeline, dict(image=picture(), mask_image=picture(), strength=1.))):
        made = cls(**{k: v for k, v in pipe.components.items()})
        made.set_progress_bar_config(disable=True)
        with apply_spectrum(made, PAPER) as run: latents(made, call, **more)
        assert run.stats and all(s.passes == PASSES for s in run.stats)
    pipe, call = sdxl
    own = pipe.scheduler
    try:
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(own.config, use_karras_sigmas=True)
        with apply_spectrum(pipe, PAPER) as run: latents(pipe, call), latents(pipe, call, height=40, width=48)
        assert [s.passes for s in run.stats] == [PASSES]*2
    finally: pipe.scheduler = own

def test_what_held_when_memory_runs_out_and_when_a_pipeline_goes(flux):
    import weakref
    pipe, call = tiny('tiny-flux')
    with apply_spectrum(pipe, PAPER) as run:
        def out(pipe, i, t, given): raise torch.OutOfMemoryError('no memory')
        with pytest.raises(torch.OutOfMemoryError): latents(pipe, call, callback_on_step_end=out)
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
    del pipe, run, out
    gc.collect()
    assert gone() is None
