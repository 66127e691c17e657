"Pipelines small enough for a test: the tiny trained ones, and random ones of other classes"
import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from spectrum_nb.lab.any_denoiser import EXAMPLES, denoiser_classes
from spectrum_nb.presets import call_defaults, load_pipeline

from toys import N

torch.set_num_threads(1)


def quiet(pipe):
    "The pipeline without its progress bar"
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pipeline(name):
    "(a tiny trained pipeline, the arguments of a call)"
    pipe = quiet(load_pipeline(name, 'cpu'))
    return pipe, call_defaults(pipe, name)


def latents(pipe, call, n=N, seed=3, prompt='a red circle', **more):
    "The latents that a pipeline draws of one prompt"
    noise = torch.Generator().manual_seed(seed)
    settings = dict(prompt=prompt, num_inference_steps=n, generator=noise, output_type='latent', return_dict=False)
    return pipe(**settings, **call | more)[0]


def relative(x, y): return ((x.float() - y.float()).norm()/y.float().norm()).item()


def fixed(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(size=32):
    pixels = np.random.default_rng(0).random((size, size, 3))*255
    return Image.fromarray(pixels.astype(np.uint8))


def random_denoiser(name, seed=0):
    "(denoiser with random weights, arguments of a call) of a class of diffusers"
    config, inputs = EXAMPLES[name]
    torch.manual_seed(seed)
    model = denoiser_classes()[name](**config).eval()
    for p in model.parameters():
        if not p.any(): nn.init.normal_(p, std=.05)
    torch.manual_seed(1)
    return model, inputs()


def random_vae():
    "A random autoencoder of pictures, with half the resolution and four channels inside"
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=[8, 16], in_channels=3, out_channels=3, down_block_types=['DownEncoderBlock2D']*2,
        up_block_types=['UpDecoderBlock2D']*2, latent_channels=4, norm_num_groups=4)


def stubbed(cls, embeds, **parts):
    "A pipeline whose text encoding is random: only what is around the denoiser is tried"
    class Stubbed(cls):
        def encode_prompt(self, *args, **kwargs): return embeds()

    Stubbed.__name__ = cls.__name__
    return Stubbed(**parts)


def flux_call(net):
    "The arguments of a call of a tiny FLUX denoiser, but for the time"
    c = net.config
    return dict(hidden_states=torch.ones(1, 16, c.in_channels),
                encoder_hidden_states=torch.ones(1, 5, c.joint_attention_dim),
                pooled_projections=torch.ones(1, c.pooled_projection_dim), img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(5, 3), guidance=torch.ones(1))


def random_lora(denoiser, prefix, seed, rank=4, size=.1):
    "A state dict of random low-rank changes to every attention's queries and values, and the head's"
    torch.manual_seed(seed)
    changed = {name: m for name, m in denoiser.named_modules()
               if isinstance(m, nn.Linear) and name.rsplit('.', 1)[-1] in ('to_q', 'to_v', 'proj_out')}
    out = {}
    for name, m in changed.items():
        out[f'{prefix}.{name}.lora_A.weight'] = torch.randn(rank, m.in_features)*size
        out[f'{prefix}.{name}.lora_B.weight'] = torch.randn(m.out_features, rank)*size
    return out
