"Spectrum at other precisions, in other modes, with other layouts and attention, and with quantised weights"
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.plan import make_plan

from four_runs import ALL, N, NEAR, ONE, PAPER, check_applied_first, check_four_runs, followed, load_tiny, nearly_equal
from pipelines import relative

pytestmark = pytest.mark.filterwarnings('ignore')

# Precision, modes, layouts

@pytest.mark.parametrize('order', ['casting first', 'spectrum first'])
@pytest.mark.parametrize('name', ALL)
def test_layerwise_casting(name, order):
    pipe, denoiser, sample = load_tiny(name)

    def change(): denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    if order == 'spectrum first': return check_applied_first(sample, pipe, denoiser, change)
    change()
    check_four_runs(sample, pipe, denoiser)


@pytest.mark.parametrize('name', ALL)
def test_autocast(name):
    pipe, denoiser, sample = load_tiny(name)

    def casting():
        with torch.autocast('cpu', torch.bfloat16): return sample()

    plain, fast, stats = check_four_runs(casting, pipe, denoiser)
    print(f'\n{name}: autocast {relative(plain, sample()):.3f} from float32, Spectrum {relative(fast, plain):.3f} '
          f'from autocast; history {[s.nbytes for s in stats]} bytes')


@pytest.mark.parametrize('name', ALL)
def test_bfloat16(name):
    pipe, denoiser, sample = load_tiny(name)
    pipe.to(torch.bfloat16)
    check_four_runs(sample, pipe, denoiser)


@pytest.mark.parametrize('name', ALL)
def test_inference_mode_and_back(name):
    pipe, denoiser, sample = load_tiny(name)

    def inferring():
        with torch.inference_mode(): return sample()

    check_four_runs(inferring, pipe, denoiser)
    with apply_spectrum(pipe, PAPER) as run:
        assert torch.equal(inferring(), sample())
        assert followed(run.stats)


@pytest.mark.parametrize('name, what', [(n, w) for n in ALL for w in ('tiling', 'slicing')])
def test_a_vaes_tiling_and_slicing(name, what):
    pipe, denoiser, sample = load_tiny(name, output_type='pt')
    getattr(pipe.vae, f'enable_{what}')()
    check_four_runs(lambda: torch.as_tensor(sample()), pipe, denoiser)


ATTENTION = [
    ('bare', ()),
    ('fused', ('fuse_qkv_projections',)),
    ('unfused', ('unfuse_qkv_projections',)),
    ('backend', ('set_attention_backend', '_native_math')),
    ('reset', ('reset_attention_backend',)),
]


def try_change(name, denoiser, what, *args):
    "Call a method of the denoiser; where diffusers refuses, say so"
    try: getattr(denoiser, what)(*args)
    except Exception as e: print(f'\n{name}: {what} refused: {type(e).__name__}: {str(e)[:120]}')


def sampled_between_attentions(name, config=None):
    "{change of the attention: the sample after it}, with one handle for all of them where there is a config"
    pipe, denoiser, sample = load_tiny(name)
    usual, _ = _AttentionBackendRegistry.get_active_backend()
    run, out = apply_spectrum(pipe, config) if config else None, {}
    for what, change in ATTENTION:
        if change: try_change(name, denoiser, *change)
        # diffusers' reset leaves the backend set for the whole process
        if what == 'reset': _AttentionBackendRegistry.set_active_backend(usual)
        out[what] = sample()
    if run:
        assert followed(run.stats, make_plan(config, N))
        assert len(run.stats) % len(ATTENTION) == 0
        run.remove()
    return out


@pytest.mark.parametrize('name', ALL)
def test_fused_projections_and_attention_backends_between_runs(name):
    plain, same, fast = (sampled_between_attentions(name, config) for config in (None, ONE, PAPER))
    print(f'\n{name}: from the bare run, without Spectrum',
          {what: round(relative(plain[what], plain['bare']), 6) for what in plain})

    differ = {what: relative(same[what], plain[what]) for what in plain if not torch.equal(same[what], plain[what])}
    assert not differ, differ
    if name == 'tiny-sd3':
        # without Spectrum: diffusers' fused SD3 is another model
        assert relative(plain.pop('fused'), plain['bare']) > .3
    assert all(0 < relative(fast[what], plain[what]) < NEAR for what in plain)


@pytest.mark.parametrize('when', ['before', 'between runs'])
def test_channels_last(when):
    pipe, denoiser, sample = load_tiny('tiny-sdxl')
    if when == 'before':
        denoiser.to(memory_format=torch.channels_last)
        return check_four_runs(sample, pipe, denoiser)
    with apply_spectrum(pipe, PAPER) as run:
        fast = sample()
        denoiser.to(memory_format=torch.channels_last)
        assert nearly_equal(sample(), fast)
        assert followed(run.stats)


# Quantised weights

@pytest.mark.parametrize('order', ['quantised first', 'spectrum first'])
@pytest.mark.parametrize('name', ALL)
def test_int8_weights(name, order):
    pipe, denoiser, sample = load_tiny(name)
    plain = sample()

    def change(): quantize_(denoiser, Int8WeightOnlyConfig())

    if order == 'spectrum first': return check_applied_first(sample, pipe, denoiser, change)
    change()
    quantised, _, _ = check_four_runs(sample, pipe, denoiser)
    assert 0 < relative(quantised, plain) < .2
