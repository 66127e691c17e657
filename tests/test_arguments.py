"Pictures among the arguments of a pipeline: recorded, sampled, asked for on the command line"
import ast
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

import spectrum_nb
from spectrum_nb.calibrate import record
from spectrum_nb.runs import sample_all
from spectrum_nb.samples import all_jobs, make_sample
from spectrum_nb.sampling import sample
from spectrum_nb.settings import SpectrumConfig

from pipelines import fixed, picture, quiet, random_denoiser, stubbed, tiny_pipeline

pytestmark = pytest.mark.filterwarnings('ignore')

# Arguments of a pipeline

def kontext(monkeypatch):
    pipe, call = tiny_pipeline('tiny-flux')
    made = diffusers.FluxKontextPipeline(**pipe.components)
    return made, call | dict(image=picture(), _auto_resize=False, max_area=32*32)


def wan_i2v(monkeypatch):
    pipe, call = tiny_pipeline('tiny-wan')
    c = pipe.transformer.config
    torch.manual_seed(0)
    config = {k: v for k, v in c.items() if not k.startswith('_')}
    net = type(pipe.transformer)(**config | dict(in_channels=2*c.in_channels + 4, image_dim=None)).eval()
    embeds = lambda: tuple(fixed(1, 16, c.text_dim, seed=k) for k in range(2))
    made = stubbed(diffusers.WanImageToVideoPipeline, embeds, tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder,
                   vae=pipe.vae, scheduler=pipe.scheduler, transformer=net, image_encoder=None, image_processor=None)
    return made, call | dict(image=picture())


def small_flow(shift=3.):
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=True, base_shift=.5,
                                                     max_shift=1.15)


def qwen_edit(monkeypatch):
    # not a million pixels
    monkeypatch.setattr(pipeline_qwenimage_edit, 'calculate_dimensions', lambda area, ratio: (32, 32, None))
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1,
                                           temperal_downsample=[False], latents_mean=[0.]*4, latents_std=[1.]*4).eval()
    net, _ = random_denoiser('QwenImageTransformer2DModel')
    embeds = lambda: (fixed(1, 5, 8), torch.ones(1, 5, dtype=torch.long))
    made = stubbed(diffusers.QwenImageEditPipeline, embeds, scheduler=small_flow(), vae=vae, text_encoder=None,
                   tokenizer=None, processor=None, transformer=net)
    return made, dict(image=picture(), height=32, width=32, negative_prompt=' ', true_cfg_scale=2.)


def flux_2(cls, **settings):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(down_block_types=['DownEncoderBlock2D']*2, up_block_types=['UpDecoderBlock2D']*2,
                                       block_out_channels=[8, 8], layers_per_block=1, latent_channels=1,
                                       norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False).eval()
    net, _ = random_denoiser('Flux2Transformer2DModel')
    made = stubbed(cls, lambda: (fixed(1, 5, 8), torch.zeros(1, 5, 4)), scheduler=small_flow(), vae=vae,
                   text_encoder=None, tokenizer=None, transformer=net, **settings)
    return made, dict(image=picture(64), height=32, width=32, guidance_scale=2.5)


def flux_2_dev(monkeypatch): return flux_2(diffusers.Flux2Pipeline)


def klein(monkeypatch): return flux_2(diffusers.Flux2KleinPipeline, is_distilled=False)


MADE = dict(kontext=kontext, wan_i2v=wan_i2v, qwen_edit=qwen_edit, flux_2=flux_2_dev, klein=klein)


@pytest.mark.parametrize('what', MADE)
def test_pictures_as_arguments(what, tmp_path, monkeypatch):
    pipe, call = MADE[what](monkeypatch)
    quiet(pipe)
    made, again = (record(pipe, ['a red circle'], 6, probes=(1, 1), keep=tmp_path/'parts', **call) for _ in range(2))
    # a picture is the same picture
    assert np.array_equal(made.output, again.output)
    made.check(pipe, 6, call)

    sample, ran = make_sample(pipe, 'a red circle', 0, 6, made.plan(3), call)
    assert {len(passes) for passes in ran['passes'].values()} == {3}
    assert np.isfinite(sample).all()

    jobs = all_jobs(['a red circle'], [0])
    done = sample_all(pipe, jobs, tmp_path/'run', dict(steps=6), 6, SpectrumConfig(n_passes=3), call)
    assert done == (1, 0, [])


def test_a_picture_from_the_command_line(tmp_path, capsys):
    pipe, _ = tiny_pipeline('tiny-flux')
    diffusers.FluxImg2ImgPipeline(**pipe.components).save_pretrained(tmp_path/'model')
    picture().save(tmp_path/'picture.png')
    (tmp_path/'text.png').write_text('no picture')
    given = dict(prompt='a red circle', model=str(tmp_path/'model'), steps=10, guidance=2.5, height=32, width=32,
                 device='cpu')

    sample(**given, image=str(tmp_path/'picture.png'), out=str(tmp_path/'sample'))
    assert Image.open(tmp_path/'sample.png').size == (32, 32)
    assert 'passes of 6 steps' in capsys.readouterr().out                   # of strength .6

    other = dict(out=str(tmp_path/'other'))
    with pytest.raises((ValueError, SystemExit)): sample(**given, image=str(tmp_path/'text.png'), **other)
    without = given | dict(model='tiny-flux')
    with pytest.raises((ValueError, SystemExit)): sample(**without, image=str(tmp_path/'picture.png'), **other)
    assert not (tmp_path/'other.png').exists()


def test_nothing_of_ours_passes_a_prompt_by_place():
    for file in Path(spectrum_nb.__file__).parent.glob('*.py'):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            if getattr(call.func, 'id', '') in ('pipe', 'source', 'pipeline'):
                assert not call.args, f'{file.name}:{call.lineno}'
