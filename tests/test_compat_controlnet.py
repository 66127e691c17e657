"Spectrum with what steers a denoiser from outside: ControlNets, T2I-Adapters, IP-Adapters"
import copy
import functools

import diffusers
import pytest
import torch
from torch import nn

from spectrum_nb.anatomy import count_calls
from spectrum_nb.apply import apply_spectrum

from four_runs import N, PAPER, PLAN, TWO, captions, check_four_runs, followed, load_tiny, sampler
from pipelines import picture, quiet, relative

pytestmark = pytest.mark.filterwarnings('ignore')

# ControlNet, T2I-Adapter

def randomised(module, std=.02):
    "Weights that diffusers starts at zero, made random"
    torch.manual_seed(1)
    for p in module.parameters():
        if not p.any(): nn.init.normal_(p, std=std)
    return module


def random_net(name, denoiser):
    "A random ControlNet for a tiny pipeline's denoiser"
    if name == 'tiny-flux':
        net = diffusers.FluxControlNetModel.from_transformer(denoiser, 1, 2, 32, 4, load_weights_from_transformer=False)
    elif name == 'tiny-sd3':
        net = diffusers.SD3ControlNetModel.from_transformer(denoiser, 2, num_extra_conditioning_channels=0)
    else:
        net = diffusers.ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=(16, 32, 32))
    return randomised(net)


CONTROLLED = {
    'tiny-flux': diffusers.FluxControlNetPipeline,
    'tiny-sd3': diffusers.StableDiffusion3ControlNetPipeline,
    'tiny-sdxl': diffusers.StableDiffusionXLControlNetPipeline,
}
PICTURE = {'tiny-flux': 'control_image', 'tiny-sd3': 'control_image', 'tiny-sdxl': 'image'}
STRENGTH = {'tiny-flux': .5, 'tiny-sd3': .5, 'tiny-sdxl': 1.}


def controlled(name, kind='controlnet'):
    """(pipeline, denoiser, sampler, sampler without control) with a random ControlNet or adapter around a tiny
    pipeline's parts"""
    pipe, denoiser, _ = load_tiny(name)
    torch.manual_seed(0)
    if kind == 'adapter':
        adapter = diffusers.T2IAdapter(3, [64, 112], 1, 8, 'full_adapter_xl')
        new = diffusers.StableDiffusionXLAdapterPipeline(**pipe.components, adapter=adapter)
        scale, more = 'adapter_conditioning_scale', dict(image=[picture()]*2, adapter_conditioning_scale=.5)
    else:
        new = CONTROLLED[name](**pipe.components, controlnet=random_net(name, denoiser))
        scale = 'controlnet_conditioning_scale'
        more = {PICTURE[name]: picture(), scale: STRENGTH[name]}
    quiet(new)
    if name == 'tiny-flux': new.default_sample_size = pipe.default_sample_size
    sample = sampler(new, name, **more)
    return new, denoiser, sample, lambda: sample(**{scale: 0.})


@pytest.mark.parametrize('name, kind', [
    ('tiny-flux', 'controlnet'),
    ('tiny-sd3', 'controlnet'),
    ('tiny-sdxl', 'controlnet'),
    ('tiny-sdxl', 'adapter'),
])
def test_a_controlnet_and_a_t2i_adapter(name, kind):
    pipe, denoiser, sample, without = controlled(name, kind)
    plain, _, _ = check_four_runs(sample, pipe, denoiser)
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
        got.append(any('residual' in k and v is not None for k, v in kwargs.items()))
        return inner(self, *args, **kwargs)

    try:
        type(denoiser).forward = forward
        with apply_spectrum(pipe, PAPER): sample()
    finally:
        type(denoiser).forward = inner
        hook.remove()

    assert got == [i in PLAN.passes for i in range(N)]
    assert len(heads) == N


@pytest.mark.parametrize('kind', ['guess_mode', 'two', 'ends early'])
def test_a_controlnets_options(kind):
    pipe, denoiser, sample, _ = controlled('tiny-sdxl')
    if kind == 'guess_mode': more = dict(guess_mode=True)
    if kind == 'ends early': more = dict(control_guidance_end=.5)
    if kind == 'two':
        pipe.controlnet = diffusers.MultiControlNetModel([pipe.controlnet, copy.deepcopy(pipe.controlnet)])
        more = dict(image=[picture()]*2, controlnet_conditioning_scale=[.3, .2])
    check_four_runs(lambda: sample(**more), pipe, denoiser)


# IP-Adapter

def unet_keys(denoiser, random):
    "Random keys and values of an image for every cross-attention of a U-Net, in the format of diffusers' loader"
    cross, keys = denoiser.config.cross_attention_dim, {}
    for i, name in enumerate(denoiser.attn_processors):
        if not name.endswith('attn2.processor'): continue
        attn = denoiser.get_submodule(name.removesuffix('.processor'))
        keys[f'{i}.to_k_ip.weight'] = random(attn.to_q.out_features, cross)
        keys[f'{i}.to_v_ip.weight'] = random(attn.to_q.out_features, cross)
    return cross, keys


def transformer_keys(denoiser, random):
    "The same for the blocks of a transformer"
    cross, keys = denoiser.config.joint_attention_dim, {}
    for i in range(len(denoiser.transformer_blocks)):
        for k in 'kv':
            keys[f'{i}.to_{k}_ip.weight'] = random(denoiser.inner_dim, cross)
            keys[f'{i}.to_{k}_ip.bias'] = random(denoiser.inner_dim)
    return cross, keys


def random_ip_adapter(denoiser, width=24):
    "Random weights in the format of diffusers' loader"
    torch.manual_seed(2)
    random = lambda *shape: torch.randn(shape)*.2
    cross, keys = (unet_keys if hasattr(denoiser, 'conv_in') else transformer_keys)(denoiser, random)
    image_proj = {
        'proj.weight': random(4*cross, width), 'proj.bias': random(4*cross), 'norm.weight': torch.ones(cross),
        'norm.bias': torch.zeros(cross)
    }
    return dict(image_proj=image_proj, ip_adapter=keys)


@pytest.mark.parametrize('order', ['adapter first', 'spectrum first'])
@pytest.mark.parametrize('name', TWO)
def test_an_ip_adapter(name, order):
    pipe, denoiser, sample = load_tiny(name)
    flux = name == 'tiny-flux'
    # diffusers does not repeat image embeddings for several prompts
    prompt = captions(pipe, name, 1)
    torch.manual_seed(5)
    image = torch.randn(1 if flux else 2, 1, 24)
    more = dict(ip_adapter_image_embeds=[image], prompt=prompt)
    if flux: more |= dict(negative_ip_adapter_image_embeds=[torch.zeros_like(image)], true_cfg_scale=1.)
    bare = sample(prompt=prompt)

    run = apply_spectrum(pipe, PAPER) if order == 'spectrum first' else None
    encoder = 'image_encoder_pretrained_model_name_or_path' if flux else 'image_encoder_folder'
    pipe.load_ip_adapter(random_ip_adapter(denoiser), subfolder='', weight_name='', **{encoder: None})
    pipe.set_ip_adapter_scale(.7)
    if run:
        fast = sample(**more)
        assert followed(run.stats)
        run.remove()
        with apply_spectrum(pipe, PAPER): assert torch.equal(sample(**more), fast)

    plain, _, _ = check_four_runs(lambda: sample(**more), pipe, denoiser)
    assert relative(plain, bare) > .02
    pipe.unload_ip_adapter()
    with apply_spectrum(pipe, PAPER) as run: sample(prompt=prompt)
    assert followed(run.stats)
    assert torch.equal(sample(prompt=prompt), bare)
