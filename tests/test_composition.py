"What else diffusers offers, with Spectrum: ControlNet, adapters, LoRA, offloading, casting, compilation, processes, quantisation, callbacks"
import copy
import functools
import gc
import json
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from spectrum_nb.anatomy import blocks_of, count_calls, find_anatomy
from spectrum_nb.apply import apply_spectrum, find_denoisers
from spectrum_nb.calibrate import record
from spectrum_nb.forecast import DampedLine, Newton
from spectrum_nb.hook import SpectrumHook
from spectrum_nb.lab.captions import held_captions
from spectrum_nb.pipeline_clock import levels_of
from spectrum_nb.plan import Plan, make_plan
from spectrum_nb.presets import call_defaults, load_pipeline
from spectrum_nb.schedule import Even, Listed, NoiseSpaced
from spectrum_nb.settings import SpectrumConfig

N = 14
ONE, PAPER = SpectrumConfig(speedup=1), SpectrumConfig.paper()
PLAN = make_plan(PAPER, N)
# relative distance of latents from the run without Spectrum; see test_the_threshold_would_catch_a_broken_history
NEAR = .2
ALL = ('tiny-flux', 'tiny-sd3', 'tiny-sdxl', 'tiny-hunyuan', 'tiny-wan')
TWO = ('tiny-flux', 'tiny-sdxl')


pytestmark = pytest.mark.filterwarnings('ignore')


def the(pipe): return next(iter(find_denoisers(pipe).values()))


def relative(x, y): return ((x.float() - y.float()).norm()/y.float().norm()).item()


def sampler(pipe, name, **more):
    "A function that samples latents of two captions, the same ones each time"
    call = call_defaults(pipe, name)
    call = dict(prompt=held_captions(call, 2), num_inference_steps=N, output_type='latent',
                return_dict=False) | call | more
    def sample(**changes):
        torch.manual_seed(0)        # SD3's ControlNet encodes its picture with noise of no generator
        return pipe(**(call | dict(generator=torch.Generator().manual_seed(3)) | changes))[0]
    return sample


def load(name, **more):
    "(pipeline, its denoiser, its sampler)"
    pipe = load_pipeline(name, 'cpu')
    pipe.set_progress_bar_config(disable=True)
    return pipe, the(pipe), sampler(pipe, name, **more)


def traces(denoiser):
    "What a hook could leave behind: modules, their attributes, their hooks, who answers `forward`"
    hooks = lambda m: tuple(m._diffusers_hook._hook_order) if '_diffusers_hook' in vars(m) else ()
    return {
        n: (id(m), sorted(vars(m)), hooks(m), len(m._forward_pre_hooks), len(m._forward_hooks), list(m._modules))
        for n, m in denoiser.named_modules()
    }


def by_plan(stats, plan=PLAN):
    "Whether every context of the finished runs did what the plan says, and nothing else"
    return bool(stats) and all(
        s.passes == plan.passes and not s.fallbacks and all(np.isfinite(e) for e in s.errors.values()) for s in stats)


def check(sample, target, denoiser, exact=True, near=NEAR, counted=True, same=None):
    "The four runs: without, with every step a pass, with the paper's plan, after removal. Returns (without, with, stats)"
    same = same or (torch.equal if exact else lambda x, y: relative(x, y) < 1e-4)
    blocks = blocks_of(denoiser)
    plain = sample()
    before = traces(denoiser)
    with apply_spectrum(target, ONE) as run:
        assert same(sample(), plain)
        assert by_plan(run.stats, make_plan(ONE, N))
    assert traces(denoiser) == before
    with ExitStack() as stack:
        run = stack.enter_context(apply_spectrum(target, PAPER))
        counts = stack.enter_context(count_calls(blocks)) if counted else None
        fast = sample()
    assert by_plan(run.stats), run.stats
    if counted: assert counts == [len(PLAN.passes)*len(run.stats)]*len(blocks)
    assert torch.isfinite(fast).all() and 0 < relative(fast, plain) < near, relative(fast, plain)
    assert traces(denoiser) == before
    assert same(sample(), plain)
    return plain, fast, run.stats


@pytest.mark.parametrize('name', ALL)
def test_the_default_follows_the_noise_levels(name):
    pipe, denoiser, sample = load(name)
    plain, before = sample(), traces(denoiser)
    with apply_spectrum(pipe) as run: fast = sample()
    plan = make_plan(SpectrumConfig(), N, levels_of(pipe.scheduler))
    assert by_plan(run.stats, plan) and len(plan.passes) == 8 and plan.passes != make_plan(SpectrumConfig(), N).passes
    assert 0 < relative(fast, plain) < .35 and traces(denoiser) == before and torch.equal(sample(), plain)


def check_order(sample, target, denoiser, change, plain=None, exact=True, near=NEAR):
    "Spectrum first, `change` second: what `check` asks, while and after; `plain` is what the changed pipeline samples"
    same = torch.equal if exact else lambda x, y: relative(x, y) < 1e-4
    run = apply_spectrum(target, PAPER)
    undo = change()
    with count_calls(blocks_of(denoiser)) as counts: fast = sample()
    assert by_plan(run.stats), run.stats
    assert counts == [len(PLAN.passes)*len(run.stats)]*len(counts)
    with count_calls(blocks_of(denoiser)) as counts: assert torch.equal(sample(), fast)     # a second run
    assert counts == [len(PLAN.passes)*len(run.stats)//2]*len(counts)
    run.remove()
    assert SpectrumHook.NAME not in [h for n, t in traces(denoiser).items() for h in t[2]]
    after = sample()
    if plain is not None: assert same(after, plain)
    assert 0 < relative(fast, after) < near
    if undo: undo()
    return fast


@pytest.mark.parametrize('name', ALL)
def test_the_threshold_would_catch_a_broken_history(name):
    pipe, denoiser, sample = load(name)
    plain, fast, _ = check(sample, pipe, denoiser)
    W = np.zeros((N, N))
    W[:, 0] = 1
    W[PLAN.passes] = np.eye(N)[PLAN.passes]       # every forecast gives what step 0 gave
    with apply_spectrum(pipe, Plan(PLAN.passes, W)): stale = sample()
    print(f'\n{name}: Spectrum {relative(fast, plain):.3f}, stale {relative(stale, plain):.3f}')
    assert relative(fast, plain) < NEAR < relative(stale, plain)


# ControlNet, T2I-Adapter

def picture(): return Image.fromarray((np.random.default_rng(0).random((32, 32, 3))*255).astype(np.uint8))


def randomised(module, std=.02):
    "Weights that diffusers starts at zero, made random"
    torch.manual_seed(1)
    for p in module.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=std)
    return module


def controlled(name, kind='controlnet'):
    "(pipeline, denoiser, sampler, sampler without control) with a random ControlNet or adapter around a tiny pipeline's parts"
    from diffusers import ControlNetModel, FluxControlNetModel, FluxControlNetPipeline, SD3ControlNetModel, StableDiffusion3ControlNetPipeline, StableDiffusionXLAdapterPipeline, StableDiffusionXLControlNetPipeline, T2IAdapter
    pipe, denoiser, _ = load(name)
    torch.manual_seed(0)
    parts = {k: v for k, v in pipe.components.items()}
    if kind == 'adapter':
        adapter = T2IAdapter(3, [64, 112], 1, 8, 'full_adapter_xl')
        new, more, off = StableDiffusionXLAdapterPipeline(**parts, adapter=adapter), dict(
            image=[picture()]*2, adapter_conditioning_scale=.5), dict(adapter_conditioning_scale=0.)
    elif name == 'tiny-flux':
        net = randomised(
            FluxControlNetModel.from_transformer(denoiser, 1, 2, 32, 4, load_weights_from_transformer=False))
        new, more, off = FluxControlNetPipeline(**parts, controlnet=net), dict(
            control_image=picture(), controlnet_conditioning_scale=.5), dict(controlnet_conditioning_scale=0.)
    elif name == 'tiny-sd3':
        net = randomised(SD3ControlNetModel.from_transformer(denoiser, 2, num_extra_conditioning_channels=0))
        new, more, off = StableDiffusion3ControlNetPipeline(**parts, controlnet=net), dict(
            control_image=picture(), controlnet_conditioning_scale=.5), dict(controlnet_conditioning_scale=0.)
    else:
        net = randomised(ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=(16, 32, 32)))
        new, more, off = StableDiffusionXLControlNetPipeline(**parts, controlnet=net), dict(
            image=picture(), controlnet_conditioning_scale=1.), dict(controlnet_conditioning_scale=0.)
    new.set_progress_bar_config(disable=True)
    if name == 'tiny-flux': new.default_sample_size = pipe.default_sample_size
    return new, denoiser, sampler(new, name, **more), lambda: sampler(new, name, **more)(**off)


@pytest.mark.parametrize('name, kind',
                         [('tiny-flux', 'controlnet'), ('tiny-sd3', 'controlnet'), ('tiny-sdxl', 'controlnet'),
                          ('tiny-sdxl', 'adapter')])
def test_a_controlnet_and_a_t2i_adapter(name, kind):
    pipe, denoiser, sample, without = controlled(name, kind)
    plain, _, _ = check(sample, pipe, denoiser)
    assert relative(plain, without()) > .01                     # the control has an effect
    extra = pipe.adapter if kind == 'adapter' else pipe.controlnet
    with apply_spectrum(pipe, PAPER), count_calls([extra]) as n: sample()
    print(f'\n{name} {kind}: the {kind} ran {n[0]} times in {N} steps, the blocks {len(PLAN.passes)}')


def test_residuals_of_a_controlnet_do_not_reach_a_forecast():
    pipe, denoiser, sample, _ = controlled('tiny-sdxl')
    got, heads = [], []
    hook = denoiser.conv_norm_out.register_forward_hook(lambda m, args, out: heads.append(args[0].clone()))
    inner = type(denoiser).forward
    @functools.wraps(inner)
    def forward(self, *args, **kwargs):
        got.append({k for k in kwargs if 'residual' in k and kwargs[k] is not None})
        return inner(self, *args, **kwargs)
    try:
        type(denoiser).forward = forward
        with apply_spectrum(pipe, PAPER): sample()
    finally:
        type(denoiser).forward = inner
        hook.remove()
    assert [bool(g) for g in got] == [i in PLAN.passes for i in range(N)] and len(heads) == N


@pytest.mark.parametrize('kind', ['guess_mode', 'two', 'ends early'])
def test_a_controlnets_options(kind):
    from diffusers import MultiControlNetModel
    pipe, denoiser, sample, _ = controlled('tiny-sdxl')
    more = dict(guess_mode=True) if kind == 'guess_mode' else dict(control_guidance_end=.5)
    if kind == 'two':
        pipe.controlnet = MultiControlNetModel([pipe.controlnet, copy.deepcopy(pipe.controlnet)])
        more = dict(image=[picture()]*2, controlnet_conditioning_scale=[.3, .2])
    check(lambda: sample(**more), pipe, denoiser)


# IP-Adapter

def ip_adapter(denoiser, width=24):
    "Random weights in the format of diffusers' loader"
    torch.manual_seed(2)
    r = lambda *shape: torch.randn(shape)*.2
    if hasattr(denoiser, 'conv_in'):
        cross, keys = denoiser.config.cross_attention_dim, {}
        procs = [n for n in denoiser.attn_processors]
        for i, n in enumerate(procs):
            if n.endswith('attn2.processor'):
                attn = denoiser.get_submodule(n.removesuffix('.processor'))
                keys |= {
                    f'{i}.to_k_ip.weight': r(attn.to_q.out_features, cross),
                    f'{i}.to_v_ip.weight': r(attn.to_q.out_features, cross)
                }
    else:
        cross, keys = denoiser.config.joint_attention_dim, {}
        for i in range(len(denoiser.transformer_blocks)):
            keys |= {
                f'{i}.to_{k}_ip.{p}': r(denoiser.inner_dim, *([cross] if p == 'weight' else [])) for k in 'kv'
                for p in ('weight', 'bias')
            }
    return dict(
        image_proj={
            'proj.weight': r(4*cross, width), 'proj.bias': r(4*cross), 'norm.weight': torch.ones(cross),
            'norm.bias': torch.zeros(cross)
        }, ip_adapter=keys)


@pytest.mark.parametrize('order', ['adapter first', 'spectrum first'])
@pytest.mark.parametrize('name', TWO)
def test_an_ip_adapter(name, order):
    pipe, denoiser, sample = load(name)
    torch.manual_seed(5)
    image = torch.randn(1 if name == 'tiny-flux' else 2, 1, 24)
    more = dict(ip_adapter_image_embeds=[image]) | (dict(negative_ip_adapter_image_embeds=[torch.zeros_like(image)],
                                                         true_cfg_scale=1.) if name == 'tiny-flux' else {})
    # diffusers does not repeat image embeddings for several prompts
    more |= dict(prompt=held_captions(call_defaults(pipe, name), 1))
    plainly = dict(prompt=more['prompt'])
    bare = sample(**plainly)
    run = apply_spectrum(pipe, PAPER) if order == 'spectrum first' else None
    pipe.load_ip_adapter(
        ip_adapter(denoiser), subfolder='', weight_name='',
        **(dict(image_encoder_pretrained_model_name_or_path=None) if name == 'tiny-flux' else dict(
            image_encoder_folder=None)))
    pipe.set_ip_adapter_scale(.7)
    if run:
        fast = sample(**more)
        assert by_plan(run.stats)
        run.remove()
        with apply_spectrum(pipe, PAPER): assert torch.equal(sample(**more), fast)
    plain, _, _ = check(lambda: sample(**more), pipe, denoiser)
    assert relative(plain, bare) > .02
    pipe.unload_ip_adapter()
    with apply_spectrum(pipe, PAPER) as run: sample(**plainly)
    assert by_plan(run.stats) and torch.equal(sample(**plainly), bare)


# LoRA

def lora(denoiser, prefix, seed, rank=4, size=.1):
    "A state dict of random low-rank changes to every attention's queries and values, and the head's"
    torch.manual_seed(seed)
    out = {}
    for n, m in denoiser.named_modules():
        if isinstance(m, torch.nn.Linear) and n.rsplit('.', 1)[-1] in ('to_q', 'to_v', 'proj_out'):
            out |= {
                f'{prefix}.{n}.lora_A.weight': torch.randn(rank, m.in_features)*size,
                f'{prefix}.{n}.lora_B.weight': torch.randn(m.out_features, rank)*size
            }
    return out


@pytest.mark.parametrize('name', ALL)
def test_lora_between_runs_of_one_handle(name):
    def series(config=None):
        pipe, denoiser, sample = load(name)
        prefix = 'unet' if name == 'tiny-sdxl' else 'transformer'
        one, two = (lora(denoiser, prefix, seed) for seed in (1, 2))
        todo = [('bare', lambda: None), ('loaded', lambda: pipe.load_lora_weights(dict(one), adapter_name='one')),
                ('scaled', lambda: pipe.set_adapters(['one'], [.5])),
                ('second', lambda:
                 (pipe.load_lora_weights(dict(two), adapter_name='two'), pipe.set_adapters(['two'], [1.]))),
                ('both', lambda: pipe.set_adapters(['one', 'two'], [.3, .3])), ('off', pipe.disable_lora),
                ('on', pipe.enable_lora), ('fused', lambda: pipe.fuse_lora()), ('unfused', lambda: pipe.unfuse_lora()),
                ('unloaded', pipe.unload_lora_weights)]
        run, out = apply_spectrum(pipe, config) if config else None, {}
        with count_calls(blocks_of(denoiser)) as counts:
            for what, change in todo:
                change()
                out[what] = sample()
        if run:
            plan = make_plan(config, N)
            assert by_plan(run.stats, plan) and counts == [len(plan.passes)*len(run.stats)]*len(counts)
            run.remove()
            out['removed'] = sample()
        else: out['removed'] = out['unloaded']
        return out
    plain, same, fast = series(), series(ONE), series(PAPER)
    assert all(torch.equal(same[w], plain[w]) for w in plain)
    for a, b in [('bare', 'loaded'), ('loaded', 'scaled'), ('scaled', 'second'), ('second', 'both'), ('both', 'off')]:
        assert relative(plain[b], plain[a]) > .005, (a, b)
    near = {w: relative(fast[w], plain[w]) for w in plain if w != 'removed'}
    assert all(0 < e < NEAR for e in near.values()), near
    assert torch.equal(fast['removed'], plain['removed'])
    assert relative(fast['unloaded'], fast['bare']) < 1e-2


def test_hot_swap_keeps_what_is_compiled():
    pipe, denoiser, sample = load('tiny-flux')
    one, two = (lora(denoiser, 'transformer', seed) for seed in (1, 2))
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(dict(one), adapter_name='one')
    with compiling() as backend, apply_spectrum(pipe, PAPER) as run:
        denoiser.compile_repeated_blocks(backend=backend, fullgraph=True)
        first = sample()
        n = backend.compiled
        pipe.load_lora_weights(dict(two), adapter_name='one', hotswap=True)
        second = sample()
        assert by_plan(run.stats) and relative(second, first) > .01
        assert backend.compiled == n > 0


@pytest.mark.parametrize('name', TWO)
def test_lora_scale_of_a_call(name):
    pipe, denoiser, sample = load(name)
    prefix, key = ('unet', 'cross_attention_kwargs') if name == 'tiny-sdxl' else ('transformer',
                                                                                  'joint_attention_kwargs')
    pipe.load_lora_weights(lora(denoiser, prefix, 1))
    whole = sample()
    plain, _, _ = check(lambda: sample(**{key: dict(scale=.3)}), pipe, denoiser)
    assert relative(plain, whole) > .01


# Offloading

@contextmanager
def fetched():
    "Count what accelerate's and diffusers' hooks bring in before a module runs: [modules or groups, bytes]"
    from accelerate import hooks as accelerated
    from diffusers.hooks.group_offloading import ModuleGroup
    total, set_tensor, onload = [0, 0], accelerated.set_module_tensor_to_device, ModuleGroup.onload_
    def fetch(module, name, device, value=None, **more):
        if value is not None:
            total[0] += 1
            total[1] += value.nbytes
        return set_tensor(module, name, device, value=value, **more)
    def bring(self):
        out = onload(self)
        tensors = [t for m in self.modules for t in (*m.parameters(), *m.buffers())] + [*self.parameters, *self.buffers]
        total[0] += 1
        total[1] += sum(t.nbytes for t in tensors)
        return out
    accelerated.set_module_tensor_to_device, ModuleGroup.onload_ = fetch, bring
    try: yield total
    finally: accelerated.set_module_tensor_to_device, ModuleGroup.onload_ = set_tensor, onload


def offload_pipeline(pipe, what):
    "enable_model_cpu_offload or enable_sequential_cpu_offload onto the CPU itself; accelerate cannot offload transformers' text encoders so, they stay"
    pipe._exclude_from_cpu_offload = [
        n for n, m in pipe.components.items() if isinstance(m, torch.nn.Module) and m is not the(pipe)
    ]
    getattr(pipe, f'enable_{what}_cpu_offload')(device='cpu')


def share_fetched(name, what, sample, target, denoiser):
    "Fetched bytes with Spectrum, as a share of those without; and what that share should be"
    tensors = lambda modules: {t for m in modules for t in (*m.parameters(), *m.buffers())}
    with fetched() as without: sample()
    with apply_spectrum(target, PAPER), fetched() as with_: sample()
    print(
        f'\n{name} {what}: fetched without Spectrum {without[0]} × , {without[1]/2**20:.1f} MiB; with {with_[0]} × , '
        f'{with_[1]/2**20:.1f} MiB ({with_[1]/max(without[1], 1):.0%}); passes {len(PLAN.passes)} of {N}'
    )
    return with_[1]/without[1]


@pytest.mark.parametrize('order', ['offload first', 'spectrum first'])
@pytest.mark.parametrize('name', TWO)
def test_a_pipelines_offloading(name, order):
    pipe, denoiser, sample = load(name)
    plain = sample()
    def change(): offload_pipeline(pipe, 'model')
    if order == 'offload first':
        change()
        assert torch.equal(check(sample, pipe, denoiser)[0], plain)
    else: check_order(sample, pipe, denoiser, change, plain)


def test_offloading_without_an_accelerator_is_refused_by_diffusers():
    pipe = load('tiny-flux')[0]
    for enable in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(RuntimeError, match='requires accelerator'): enable()


def test_sequential_offloading_onto_the_cpu_is_refused_by_accelerate():
    "It puts plain tensors in place of parameters; without Spectrum, too. accelerate.cpu_offload, which it calls, is tested below"
    pipe, denoiser, sample = load('tiny-flux')
    offload_pipeline(pipe, 'sequential')
    with pytest.raises(TypeError, match='requires_grad'): sample()


@pytest.mark.parametrize('order', ['offload first', 'spectrum first'])
@pytest.mark.parametrize('what', ['cpu_offload', 'cpu_offload_with_hook', 'dispatch', 'disk_offload'])
@pytest.mark.parametrize('name', TWO)
def test_accelerates_offloading(name, what, order, tmp_path):
    import accelerate
    pipe, denoiser, sample = load(name)
    plain = sample()
    def change():
        if what == 'cpu_offload': accelerate.cpu_offload(denoiser, 'cpu', offload_buffers=True)
        if what == 'cpu_offload_with_hook': accelerate.cpu_offload_with_hook(denoiser, 'cpu')
        if what == 'disk_offload': accelerate.disk_offload(denoiser, tmp_path, 'cpu', offload_buffers=True)
        if what == 'dispatch':
            body = [
                f'{n}.{i}' if isinstance(denoiser.get_submodule(n), torch.nn.ModuleList) else n
                for n in find_anatomy(denoiser).body for i in range(
                    len(denoiser.get_submodule(n)) if isinstance(denoiser.get_submodule(n), torch.nn.ModuleList) else 1)
            ]
            others = [n for n, _ in denoiser.named_children() if n not in find_anatomy(denoiser).body]
            accelerate.dispatch_model(
                denoiser, {n: 'cpu' for n in others} | {b: ('disk' if i % 2 else 'cpu') for i, b in enumerate(body)},
                main_device='cpu', offload_dir=tmp_path)
    if order == 'offload first':
        change()
        assert torch.equal(check(sample, pipe, denoiser)[0], plain)
        if what != 'cpu_offload_with_hook': assert share_fetched(name, what, sample, pipe, denoiser) < .8
    else:
        check_order(sample, pipe, denoiser, change, plain)
        accelerate.hooks.remove_hook_from_module(denoiser, recurse=True)
        assert torch.equal(sample(), plain)


@pytest.mark.parametrize('order', ['offload first', 'spectrum first'])
@pytest.mark.parametrize('level', ['block_level', 'leaf_level'])
@pytest.mark.parametrize('place', ['cpu', 'disk'])
@pytest.mark.parametrize('name', TWO)
def test_group_offloading(name, place, level, order, tmp_path):
    pipe, denoiser, sample = load(name)
    plain = sample()
    def change():
        denoiser.enable_group_offload(torch.device('cpu'), torch.device('cpu'), level,
                                      num_blocks_per_group=1 if level == 'block_level' else None,
                                      offload_to_disk_path=str(tmp_path) if place == 'disk' else None)
    if order == 'offload first':
        change()
        assert torch.equal(check(sample, pipe, denoiser)[0], plain)
        assert share_fetched(name, f'{place} {level}', sample, pipe, denoiser) < .9
    else: check_order(sample, pipe, denoiser, change, plain)


@contextmanager
def pretended_streams():
    "diffusers' group offloading with streams on a CPU: the same hooks, streams that do nothing"
    from diffusers.hooks import group_offloading as g
    class Quiet:
        def synchronize(self): pass
    class Backend:
        Stream = Quiet
        def __init__(self, device): pass
        def stream(self, stream): return nullcontext()
        def current_stream(self): return Quiet()
    @contextmanager
    def unpinned(self): yield self.cpu_param_dict
    kept = g.TorchDeviceBackend, g.ModuleGroup._pinned_memory_tensors
    g.TorchDeviceBackend, g.ModuleGroup._pinned_memory_tensors = Backend, unpinned
    try:
        yield lambda module, level: g._apply_group_offloading(
            module,
            g.GroupOffloadingConfig(torch.device('cpu'), torch.device('cpu'), g.GroupOffloadingType(level), True, False,
                                    True, 1, None, Quiet()))
    finally: g.TorchDeviceBackend, g.ModuleGroup._pinned_memory_tensors = kept


@pytest.mark.parametrize('order', ['offload first', 'spectrum first'])
@pytest.mark.parametrize('level', ['block_level', 'leaf_level'])
@pytest.mark.parametrize('name', TWO)
def test_group_offloading_with_streams(name, level, order):
    pipe, denoiser, sample = load(name)
    plain = sample()
    with pretended_streams() as apply:
        if order == 'spectrum first': check_order(sample, pipe, denoiser, lambda: apply(denoiser, level), plain)
        else:
            apply(denoiser, level)
            with apply_spectrum(pipe, PAPER) as run, count_calls(blocks_of(denoiser)) as counts:
                fast, again = sample(), sample()
            assert by_plan(run.stats) and counts == [2*len(PLAN.passes)]*len(counts)
            assert torch.equal(fast, again) and 0 < relative(fast, plain) < NEAR
            assert torch.equal(check(sample, pipe, denoiser)[0], plain)


@pytest.mark.parametrize('what, order',
                         [('model', 'offload first'), ('model', 'spectrum first'), ('group', 'offload first'),
                          ('group', 'spectrum first')])
def test_lora_on_an_offloaded_denoiser(what, order, monkeypatch):
    # diffusers enables offloading again without saying where
    monkeypatch.setattr('diffusers.pipelines.pipeline_utils.get_device', lambda: 'cpu:0')
    pipe, denoiser, sample = load('tiny-flux')
    offload = lambda: denoiser.enable_group_offload(torch.device('cpu'), torch.device(
        'cpu'), 'block_level', num_blocks_per_group=1) if what == 'group' else offload_pipeline(pipe, what)
    weights = lora(denoiser, 'transformer', 1)
    if order == 'offload first': offload()
    with apply_spectrum(pipe, PAPER) as run:
        if order == 'spectrum first': offload()
        bare = sample()
        pipe.load_lora_weights(dict(weights))
        with count_calls(blocks_of(denoiser)) as counts: fast = sample()
        assert len(run.stats) == 2 and by_plan(run.stats) and counts == [len(PLAN.passes)]*len(counts)
        pipe.unload_lora_weights()
        assert torch.equal(sample(), bare) and len(run.stats) == 3
    pipe.load_lora_weights(dict(weights))
    plain = sample()
    assert relative(plain, bare) > .01 and 0 < relative(fast, plain) < NEAR


# Precision, modes, layouts

@pytest.mark.parametrize('order', ['casting first', 'spectrum first'])
@pytest.mark.parametrize('name', ALL)
def test_layerwise_casting(name, order):
    pipe, denoiser, sample = load(name)
    change = lambda: denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    if order == 'casting first':
        change()
        check(sample, pipe, denoiser)
    else: check_order(sample, pipe, denoiser, change)


@pytest.mark.parametrize('name', ALL)
def test_autocast(name):
    pipe, denoiser, sample = load(name)
    def casting():
        with torch.autocast('cpu', torch.bfloat16): return sample()
    plain, fast, stats = check(casting, pipe, denoiser)
    exactly = sample()
    print(
        f'\n{name}: autocast {relative(plain, exactly):.3f} from float32, Spectrum {relative(fast, plain):.3f} from '
        f'autocast; history {[s.nbytes for s in stats]} bytes'
    )


@pytest.mark.parametrize('name', ALL)
def test_bfloat16(name):
    pipe, denoiser, sample = load(name)
    pipe.to(torch.bfloat16)
    check(sample, pipe, denoiser)


@pytest.mark.parametrize('name', ALL)
def test_inference_mode_and_back(name):
    pipe, denoiser, sample = load(name)
    def inferring():
        with torch.inference_mode(): return sample()
    check(inferring, pipe, denoiser)
    with apply_spectrum(pipe, PAPER) as run: assert torch.equal(inferring(), sample()) and by_plan(run.stats)


@pytest.mark.parametrize('name, what', [(n, w) for n in ALL for w in ('tiling', 'slicing')])
def test_a_vaes_tiling_and_slicing(name, what):
    pipe, denoiser, sample = load(name, output_type='pt')
    getattr(pipe.vae, f'enable_{what}')()
    check(lambda: torch.as_tensor(sample()), pipe, denoiser)


@pytest.mark.parametrize('name', ALL)
def test_fused_projections_and_attention_backends_between_runs(name):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
    pipe, denoiser, sample = load(name)
    usual = registry.get_active_backend()[0]
    def series(config=None):
        def quietly(what, *args):
            try: getattr(denoiser, what)(*args)
            except Exception as e: print(f'\n{name}: {what} refused: {type(e).__name__}: {str(e)[:120]}')
        todo = [('bare', ()), ('fused', ('fuse_qkv_projections',)), ('unfused', ('unfuse_qkv_projections',)),
                ('backend', ('set_attention_backend', '_native_math')), ('reset', ('reset_attention_backend',))]
        run, out = apply_spectrum(pipe, config) if config else None, {}
        for what, change in todo:
            if change: quietly(*change)
            if what == 'reset':
                # diffusers' reset leaves the backend set for the whole process
                registry.set_active_backend(usual)
            out[what] = sample()
        if run:
            assert by_plan(run.stats, make_plan(config, N)) and len(run.stats) % len(todo) == 0
            run.remove()
        return out
    plain, same, fast = series(), series(ONE), series(PAPER)
    print(f'\n{name}: from the bare run, without Spectrum',
          {w: round(relative(plain[w], plain['bare']), 6) for w in plain})
    differ = {w: relative(same[w], plain[w]) for w in plain if not torch.equal(same[w], plain[w])}
    assert not differ, differ
    if name == 'tiny-sd3':
        # without Spectrum: diffusers' fused SD3 is another model
        assert relative(plain.pop('fused'), plain['bare']) > .3
    assert all(0 < relative(fast[w], plain[w]) < NEAR for w in plain)

@pytest.mark.parametrize('when', ['before', 'between runs'])
def test_channels_last(when):
    pipe, denoiser, sample = load('tiny-sdxl')
    if when == 'before':
        denoiser.to(memory_format=torch.channels_last)
        return check(sample, pipe, denoiser)
    with apply_spectrum(pipe, PAPER) as run:
        fast = sample()
        denoiser.to(memory_format=torch.channels_last)
        assert relative(sample(), fast) < 1e-4 and by_plan(run.stats)


# Compilation

class Counting:
    "A backend that runs the graph as it is and counts compilations and calls"
    def __init__(self): self.compiled, self.ran = 0, 0
    def __call__(self, graph, inputs):
        self.compiled += 1
        def run(*args):
            self.ran += 1
            return graph(*args)
        return run


@contextmanager
def compiling():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try: yield Counting()
    finally: torch._dynamo.reset()


def check_compiled(backend, sample, run, fast):
    "Two runs with the handle on: the second compiles nothing; what is computed is what the uncompiled one computed"
    first = sample()
    n, ran = backend.compiled, backend.ran
    assert n > 0 and relative(first, fast) < 1e-4
    assert torch.equal(sample(), first)
    print(f'\n{n} compilations, {ran} graphs run; second run: {backend.compiled - n} compilations')
    assert backend.compiled == n
    assert by_plan(run.stats)


@pytest.mark.slow
@pytest.mark.parametrize('order', ['compile first', 'spectrum first'])
@pytest.mark.parametrize('name', ALL)
def test_compiled_blocks(name, order):
    pipe, denoiser, sample = load(name)
    plain = sample()
    with apply_spectrum(pipe, PAPER): fast = sample()
    with compiling() as backend:
        def compile():
            if denoiser._repeated_blocks: return denoiser.compile_repeated_blocks(backend=backend)
            for b in blocks_of(denoiser): b.compile(backend=backend)             # SD3 names none: diffusers refuses
        if order == 'compile first':
            compile()
            sample()
        with apply_spectrum(pipe, PAPER) as run:
            if order == 'spectrum first': compile()
            check_compiled(backend, sample, run, fast)
        n = backend.compiled
        assert relative(sample(), plain) < 1e-4 and backend.compiled == n


@pytest.mark.slow
@pytest.mark.parametrize('order', ['compile first', 'spectrum first'])
@pytest.mark.parametrize('how', ['torch.compile', 'module.compile'])
@pytest.mark.parametrize('name', TWO)
def test_a_compiled_denoiser(name, how, order):
    pipe, denoiser, sample = load(name)
    plain = sample()
    with apply_spectrum(pipe, PAPER): fast = sample()
    with compiling() as backend:
        def compile():
            if how == 'module.compile': denoiser.compile(backend=backend)
            else:
                setattr(pipe, 'unet' if name == 'tiny-sdxl' else 'transformer',
                        torch.compile(denoiser, backend=backend))
        if order == 'compile first':
            compile()
            sample()
        with apply_spectrum(pipe, PAPER) as run:
            if order == 'spectrum first': compile()
            check_compiled(backend, sample, run, fast)
        assert relative(sample(), plain) < 1e-4
        n = backend.compiled
        assert relative(sample(), plain) < 1e-4 and backend.compiled == n


@pytest.mark.slow
@pytest.mark.parametrize('name', TWO)
def test_a_compiled_denoiser_saves_the_blocks(name):
    "Graphs run at a forecast must be those of the embedding and the head: fewer operations than a pass"
    pipe, denoiser, sample = load(name)
    ops = []
    with compiling():
        def backend(graph, inputs):
            n = sum(node.op.startswith('call') for node in graph.graph.nodes)
            def run(*args):
                ops.append(n)
                return graph(*args)
            return run
        denoiser.compile(backend=backend)
        with apply_spectrum(pipe, ONE):
            sample()
            ops.clear()
            sample()
            every = sum(ops)
        with apply_spectrum(pipe, PAPER):
            sample()
            ops.clear()
            sample()
            few = sum(ops)
    print(f'\n{name}: operations run {every} → {few}')
    assert few < .85*every


# Processes

KINDS = 'ddp', 'ddp wrapper', 'fsdp', 'fsdp prefetch', 'fsdp lora', 'ulysses', 'ulysses after', 'ulysses wan'
REFUSED = {'ring': 'does not support return_lse', 'tensor parallel': "not supported on device type 'cpu'"}


def of_rank(rank): return dict(prompt=held_captions(dict(height=32), 2)[rank:rank + 1])


def own_loop(pipe, call, steps=N):
    "A loop of one's own over a FLUX denoiser"
    from spectrum_nb.lab.flux import flux_embeds, flux_velocity
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    embeds = flux_embeds(pipe, call['prompt'])
    with torch.no_grad():
        for i in range(steps):
            x = x - flux_velocity(pipe, x, torch.tensor([1 - i/steps]), embeds, torch.tensor([2.5]))/steps
    return x


def of_kind(kind, rank):
    "[latents, passes] of every step a pass, then of the default, for one of two processes"
    name = 'tiny-wan' if kind.endswith('wan') else 'tiny-flux'
    pipe, denoiser, sample = load(name)
    passes = lambda run: [s.passes for s in run.stats if not s.fallbacks]
    if kind.startswith('ddp'):
        from torch.nn.parallel import DistributedDataParallel as DDP
        ddp = DDP(denoiser)
        out = []
        for config in (ONE, PAPER):
            with apply_spectrum(ddp if kind == 'ddp wrapper' else ddp.module, config, n_steps=N) as run:
                pipe.transformer = ddp
                out.append(own_loop(pipe, of_rank(rank)))
            out.append(passes(run))
        return out
    call = of_rank(rank) if kind.startswith('fsdp') else {}
    def parallel():
        from diffusers import ContextParallelConfig
        if 'fsdp' in kind:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            mesh = init_device_mesh('cpu', (2,))
            blocks = blocks_of(denoiser)
            for b in blocks: fully_shard(b, mesh=mesh)
            fully_shard(denoiser, mesh=mesh)
            if 'prefetch' in kind:
                denoiser.set_modules_to_forward_prefetch(blocks[:1])
                for a, b in zip(blocks, blocks[1:]): a.set_modules_to_forward_prefetch([b])
        else:
            torch.accelerator.device_count = lambda: 1                  # diffusers asks for an accelerator's number
            if 'tensor' in kind:
                from diffusers import TensorParallelConfig
                return denoiser.enable_parallelism(config=TensorParallelConfig(tp_degree=2))
            denoiser.enable_parallelism(config=ContextParallelConfig(
                **{'ring_degree' if kind == 'ring' else 'ulysses_degree': 2}))
    if 'lora' in kind: pipe.load_lora_weights(lora(denoiser, 'transformer', 1))
    if not kind.endswith('after'):
        parallel()
        sample(**call)                                                             # without Spectrum it runs
    out = []
    for config in (ONE, PAPER):
        with apply_spectrum(pipe, config) as run:
            if kind.endswith('after') and config is ONE: parallel()
            out.append(sample(**call))
        out.append(passes(run))
    return out


def worker(folder, rank, kinds):
    import datetime, traceback
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=20))
    for kind in kinds:
        try: out = of_kind(kind, rank) if kind != 'tolerance' else disagreeing(rank)
        except BaseException as e: out = f'{type(e).__name__}: {e}\n{traceback.format_exc()}'
        torch.save(out, f'{folder}/{kind} {rank}.pt')
    dist.destroy_process_group()


def two_processes(folder, kinds, seconds=240):
    "What both processes of each kind returned: {kind: [of rank 0, of rank 1]}"
    env = os.environ | dict(OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo')
    procs = [
        subprocess.Popen([sys.executable, __file__, folder, str(rank), *kinds], env=env, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True) for rank in (0, 1)
    ]
    try: said = [p.communicate(timeout=seconds)[0] for p in procs]
    except subprocess.TimeoutExpired: said = ['timed out']*2
    finally: [p.kill() for p in procs]
    read = lambda f: torch.load(f, weights_only=False) if f.exists() else f'nothing came back: {said}'
    return {k: [read(Path(folder)/f'{k} {rank}.pt') for rank in (0, 1)] for k in kinds}


@pytest.fixture(scope='module')
def together(tmp_path_factory): return two_processes(str(tmp_path_factory.mktemp('two')), [*KINDS, *REFUSED])


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_two_processes(kind, together):
    for rank, out in enumerate(together[kind]):
        assert not isinstance(out, str), out
        alone = alone_of(kind, rank)
        every, passes_every, fast, passes = out
        assert passes_every == alone[1] and passes == alone[3] == [PLAN.passes]*len(passes)
        assert relative(every, alone[0]) < 1e-4 and relative(fast, alone[2]) < 1e-4 and relative(fast, every) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('kind', REFUSED)
def test_what_diffusers_refuses_on_two_cpu_processes(kind, together):
    for out in together[kind]: assert isinstance(out, str) and REFUSED[kind] in out, out


def alone_of(kind, rank):
    "What one process alone returns for the kind"
    if kind.startswith('ddp'):
        pipe, denoiser, _ = load('tiny-flux')
        out = []
        for config in (ONE, PAPER):
            with apply_spectrum(denoiser, config, n_steps=N) as run: out.append(own_loop(pipe, of_rank(rank)))
            out.append([s.passes for s in run.stats])
        return out
    pipe, denoiser, sample = load('tiny-wan' if kind.endswith('wan') else 'tiny-flux')
    if 'lora' in kind: pipe.load_lora_weights(lora(denoiser, 'transformer', 1))
    out = []
    for config in (ONE, PAPER):
        with apply_spectrum(pipe, config) as run: out.append(sample(**(of_rank(rank) if 'fsdp' in kind else {})))
        out.append([s.passes for s in run.stats])
    return out


def disagreeing(rank):
    "Sharded weights, another caption in each process, and a tolerance between the errors that the two measure"
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    pipe, denoiser, sample = load('tiny-flux')
    with apply_spectrum(pipe, PAPER) as run: sample(**of_rank(rank))
    errors = [None]*2
    dist.all_gather_object(errors, run.stats[0].errors)
    at = next(i for i in errors[0] if errors[0][i] != errors[1][i])
    tolerance = (errors[0][at] + errors[1][at])/2
    mesh = init_device_mesh('cpu', (2,))
    for b in blocks_of(denoiser): fully_shard(b, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)
    with apply_spectrum(pipe, SpectrumConfig.paper(tolerance=tolerance)) as run: sample(**of_rank(rank))
    passes = [None]*2
    dist.all_gather_object(passes, run.stats[0].passes)
    return passes


@pytest.mark.slow
def test_processes_that_share_weights_agree_on_passes(tmp_path):
    outs = two_processes(str(tmp_path), ['tolerance'], 90)['tolerance']
    assert not any(isinstance(o, str) for o in outs), outs[0]
    assert outs[0][0] == outs[0][1]


# Quantised weights

@pytest.mark.parametrize('order', ['quantised first', 'spectrum first'])
@pytest.mark.parametrize('name', ALL)
def test_int8_weights(name, order):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    pipe, denoiser, sample = load(name)
    plain = sample()
    change = lambda: quantize_(denoiser, Int8WeightOnlyConfig())
    if order == 'spectrum first': return check_order(sample, pipe, denoiser, lambda: change() and None)
    change()
    quantised, _, _ = check(sample, pipe, denoiser)
    assert 0 < relative(quantised, plain) < .2


# What a call can ask for

@pytest.mark.parametrize('name', ALL)
def test_a_callback_that_changes_latents(name):
    pipe, denoiser, sample = load(name)
    def push(pipe, i, t, given):
        if i == 7: given['latents'] = given['latents']*1.05
        return given
    plain, _, _ = check(lambda: sample(callback_on_step_end=push), pipe, denoiser)
    assert not torch.equal(plain, sample())


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('how', ['interrupt', 'raise'])
def test_a_run_that_is_broken_off(name, how):
    pipe, denoiser, sample = load(name)
    plain = sample()
    before = traces(denoiser)
    def stop(pipe, i, t, given):
        if i == 8:
            if how == 'raise': raise KeyboardInterrupt
            pipe._interrupt = True
        return given
    with apply_spectrum(pipe, PAPER) as run:
        fast = sample()
        n = len(run.stats)
        with pytest.raises(KeyboardInterrupt) if how == 'raise' else nullcontext(): sample(callback_on_step_end=stop)
        assert len(run.stats) == n
        assert torch.equal(sample(), fast) and len(run.stats) == 2*n and by_plan(run.stats)
    assert torch.equal(sample(), plain) and traces(denoiser) == before


@pytest.mark.parametrize('name', ['tiny-sdxl', 'tiny-wan', 'tiny-sd3'])
def test_guidance_switched_off_in_a_run(name):
    pipe, denoiser, sample = load(name)
    keys = dict([('tiny-sdxl', ('prompt_embeds', 'add_text_embeds', 'add_time_ids')),
                 ('tiny-sd3', ('prompt_embeds', 'pooled_prompt_embeds'))]).get(name, ())
    off = 8
    def switch(pipe, i, t, given):
        if i == off - 1:
            pipe._guidance_scale = 0.
            for k in keys: given[k] = given[k].chunk(2)[-1]
        return given
    cut = lambda **more: sample(callback_on_step_end=switch, callback_on_step_end_tensor_inputs=['latents', *keys], **
                                more)
    plain = cut()
    before = traces(denoiser)
    with apply_spectrum(pipe, ONE): assert torch.equal(cut(), plain)
    with apply_spectrum(pipe, PAPER) as run, count_calls(blocks_of(denoiser)) as counts:
        fast = cut()
        if name == 'tiny-wan':            # two calls a step: the second is not made any more
            assert [s.context for s in run.stats] == ['cond'] and by_plan(run.stats)
            assert counts == [len(PLAN.passes) + sum(p < off for p in PLAN.passes)]*len(counts)
        else:                             # one batch: half of it is left, the rest is planned anew
            rest = [off + p for p in make_plan(PAPER, N - off).passes]
            (s,) = run.stats
            assert list(s.fallbacks) == [off] and 'input changed its shape' in s.fallbacks[off]
            assert s.passes == [p for p in PLAN.passes if p < off] + rest and counts == [len(s.passes)]*len(counts)
        whole = sample()
        assert by_plan(run.stats[1:] if name != 'tiny-wan' else run.stats)
    with apply_spectrum(pipe, PAPER): assert torch.equal(sample(), whole)
    assert torch.isfinite(fast).all() and 0 <= relative(fast, plain) < NEAR
    assert torch.equal(cut(), plain) and traces(denoiser) == before and relative(plain, sample()) > .01


@pytest.mark.parametrize('name', ALL)
def test_several_images_and_prompts(name):
    pipe, denoiser, sample = load(name)
    several = 'num_videos_per_prompt' if 'num_frames' in call_defaults(pipe, name) else 'num_images_per_prompt'
    plain, fast, _ = check(lambda: sample(**{several: 2}), pipe, denoiser)
    assert len(plain) == 4
    with apply_spectrum(pipe, PAPER) as run:             # the number changes from run to run
        one = [sample(prompt=held_captions(call_defaults(pipe, name), 1)), sample(), sample(**{several: 2})]
        assert by_plan(run.stats) and list(map(len, one)) == [1, 2, 4] and torch.equal(one[2], fast)


@pytest.mark.parametrize('name', ALL)
def test_prompt_embeddings(name):
    pipe, denoiser, sample = load(name)
    call = call_defaults(pipe, name)
    captions, length = held_captions(call,
                                     2), {k: call[k] for k in ('max_sequence_length', 'prompt_template') if k in call}
    if name == 'tiny-flux':
        e = dict(zip(('prompt_embeds', 'pooled_prompt_embeds'), pipe.encode_prompt(captions, captions, **length)))
    if name == 'tiny-sd3':
        e = dict(
            zip(('prompt_embeds', 'negative_prompt_embeds', 'pooled_prompt_embeds', 'negative_pooled_prompt_embeds'),
                pipe.encode_prompt(captions, captions, captions, **length)))
    if name == 'tiny-sdxl':
        e = dict(
            zip(('prompt_embeds', 'negative_prompt_embeds', 'pooled_prompt_embeds', 'negative_pooled_prompt_embeds'),
                pipe.encode_prompt(captions)))
    if name == 'tiny-hunyuan':
        e = dict(
            zip(('prompt_embeds', 'pooled_prompt_embeds', 'prompt_attention_mask'),
                pipe.encode_prompt(captions, **length)))
    if name == 'tiny-wan':
        e = dict(zip(('prompt_embeds', 'negative_prompt_embeds'), pipe.encode_prompt(captions, '', **length)))
    plain, fast, _ = check(lambda: sample(prompt=None, **e), pipe, denoiser)
    with apply_spectrum(pipe, PAPER): assert relative(sample(), fast) < 1e-4


@pytest.mark.parametrize('name', ALL)
def test_output_types_and_dicts(name):
    pipe, denoiser, sample = load(name)
    with apply_spectrum(pipe, PAPER) as run:
        latents = sample()
        pictures = sample(output_type='np')
        assert torch.equal(next(iter(pipe(**{**call_of(pipe, name), 'return_dict': True}).values())), latents)
        assert np.isfinite(pictures).all() and by_plan(run.stats)


def call_of(pipe, name):
    call = call_defaults(pipe, name)
    return dict(prompt=held_captions(call, 2), num_inference_steps=N, output_type='latent',
                generator=torch.Generator().manual_seed(3)) | call


if __name__ == '__main__': worker(sys.argv[1], int(sys.argv[2]), sys.argv[3:])


# Schedules and calibration

@pytest.mark.parametrize('name', ALL)
def test_passes_where_the_samplers_steps_are_large(name):
    pipe, denoiser, sample = load(name)
    config = SpectrumConfig(NoiseSpaced(6), Newton(1))
    with apply_spectrum(pipe, config) as run, count_calls(blocks_of(denoiser)) as counts:
        sample()
        sample(num_inference_steps=9)             # planned anew for another length
    assert len(pipe.scheduler.sigmas) == 10
    wanted = [s.passes for s in run.stats[-1:]]
    assert wanted == [config.passes(9, pipe.scheduler.sigmas.tolist())]
    assert all(s.n_passes == 6 and not s.fallbacks for s in run.stats) and counts == [6*len(run.stats)]*len(counts)


def test_passes_are_spaced_evenly_where_a_sampler_tells_no_noise_levels():
    pipe, _, sample = load('tiny-sdxl')
    own, config = pipe.scheduler.config, SpectrumConfig(NoiseSpaced(6))
    pipe.scheduler = diffusers.IPNDMScheduler.from_config(own)
    with apply_spectrum(pipe, config) as run: sample()
    assert [s.passes for s in run.stats] == [Even(6)(N)]
    pipe.scheduler = diffusers.DDIMScheduler.from_config(own)           # tells them by its alphas
    with apply_spectrum(pipe, config) as run: sample()
    assert [s.passes for s in run.stats] == [make_plan(config, N, levels_of(pipe.scheduler)).passes]


def test_a_published_list_is_followed_and_refuses_a_run_of_another_length():
    pipe, _, sample = load('tiny-flux')
    passes = [0, 1, 3, N - 1]
    with apply_spectrum(pipe, SpectrumConfig(Listed(passes, N), DampedLine())) as run:
        sample()
        with pytest.raises(ValueError, match=f'is for {N} steps but the run has {N + 1}'):
            sample(num_inference_steps=N + 1)
    assert run.stats and all(s.passes == passes for s in run.stats)


@pytest.mark.parametrize('name', ALL)
def test_a_calibration_leaves_the_pipeline_as_it_was(name):
    pipe, denoiser, sample = load(name)
    call = {k: v for k, v in call_defaults(pipe, name).items()}
    plain, before, scheduler = sample(), traces(denoiser), pipe.scheduler
    made = record(pipe, held_captions(call, 1), N, probes=(2, 1), **call)
    assert traces(denoiser) == before and pipe.scheduler is scheduler and torch.equal(sample(), plain)
    assert set(made.hidden) == {'tiny-wan': {'cond', 'uncond'}, 'tiny-flux': {'cond'},
                                'tiny-hunyuan': {'cond'}}.get(name, {''})
    for feature in ('hidden', 'output'):
        with apply_spectrum(pipe, made.plan(7, forecaster='gram', feature=feature), feature=feature) as run:
            fast = sample()
        assert all(s.n_passes == 7 and not s.fallbacks for s in run.stats) and relative(fast, plain) < NEAR


@pytest.mark.parametrize('when', ['in a full run', 'in a disturbed one'])
def test_an_interrupted_calibration_leaves_the_pipeline_as_it_was(when):
    pipe, denoiser, sample = load('tiny-flux')
    call, calls = call_defaults(pipe, 'tiny-flux'), []
    plain, before, scheduler = sample(), traces(denoiser), pipe.scheduler
    def interrupt(*_):
        calls.append(1)
        if len(calls) == (5 if when == 'in a full run' else N + 5): raise KeyboardInterrupt
    embedder = denoiser.x_embedder.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt): record(pipe, ['a red cross'], N, **call)
    embedder.remove()
    assert traces(denoiser) == before and pipe.scheduler is scheduler and torch.equal(sample(), plain)
