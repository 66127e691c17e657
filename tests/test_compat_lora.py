"Spectrum with low-rank adapters that are loaded, scaled, swapped, fused and unloaded between runs"
import pytest
import torch

from spectrum_nb.anatomy import blocks_of, count_calls
from spectrum_nb.apply import apply_spectrum
from spectrum_nb.plan import make_plan

from four_runs import ALL, N, NEAR, ONE, PAPER, TWO, check_four_runs, compiling, followed, load_tiny
from pipelines import random_lora, relative

pytestmark = pytest.mark.filterwarnings('ignore')

# LoRA

def prefix_of(name): return 'unet' if name == 'tiny-sdxl' else 'transformer'


def changes_of(pipe, one, two):
    "(name, what is done to the adapters) in turn; a sample follows each"
    def load_second():
        pipe.load_lora_weights(dict(two), adapter_name='two')
        pipe.set_adapters(['two'], [1.])

    return [
        ('bare', lambda: None),
        ('loaded', lambda: pipe.load_lora_weights(dict(one), adapter_name='one')),
        ('scaled', lambda: pipe.set_adapters(['one'], [.5])),
        ('second', load_second),
        ('both', lambda: pipe.set_adapters(['one', 'two'], [.3, .3])),
        ('off', pipe.disable_lora),
        ('on', pipe.enable_lora),
        ('fused', pipe.fuse_lora),
        ('unfused', pipe.unfuse_lora),
        ('unloaded', pipe.unload_lora_weights),
    ]


def sampled_between_changes(name, config=None):
    "{change: the sample after it}, with one handle for all of them where there is a config"
    pipe, denoiser, sample = load_tiny(name)
    one, two = (random_lora(denoiser, prefix_of(name), seed) for seed in (1, 2))
    run, out = apply_spectrum(pipe, config) if config else None, {}
    with count_calls(blocks_of(denoiser)) as counts:
        for what, change in changes_of(pipe, one, two):
            change()
            out[what] = sample()
    if not run: return out | dict(removed=out['unloaded'])

    plan = make_plan(config, N)
    assert followed(run.stats, plan)
    assert counts == [len(plan.passes)*len(run.stats)]*len(counts)
    run.remove()
    return out | dict(removed=sample())


@pytest.mark.parametrize('name', ALL)
def test_lora_between_runs_of_one_handle(name):
    plain, same, fast = (sampled_between_changes(name, config) for config in (None, ONE, PAPER))

    assert all(torch.equal(same[what], plain[what]) for what in plain)
    in_turn = ['bare', 'loaded', 'scaled', 'second', 'both', 'off']
    for a, b in zip(in_turn, in_turn[1:]): assert relative(plain[b], plain[a]) > .005, (a, b)
    near = {what: relative(fast[what], plain[what]) for what in plain if what != 'removed'}
    assert all(0 < error < NEAR for error in near.values()), near
    assert torch.equal(fast['removed'], plain['removed'])
    assert relative(fast['unloaded'], fast['bare']) < 1e-2


def test_hot_swap_keeps_what_is_compiled():
    pipe, denoiser, sample = load_tiny('tiny-flux')
    one, two = (random_lora(denoiser, 'transformer', seed) for seed in (1, 2))
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(dict(one), adapter_name='one')
    with compiling() as backend, apply_spectrum(pipe, PAPER) as run:
        denoiser.compile_repeated_blocks(backend=backend, fullgraph=True)
        first = sample()
        n = backend.compiled
        pipe.load_lora_weights(dict(two), adapter_name='one', hotswap=True)
        second = sample()

        assert followed(run.stats)
        assert relative(second, first) > .01
        assert backend.compiled == n > 0


@pytest.mark.parametrize('name', TWO)
def test_lora_scale_of_a_call(name):
    pipe, denoiser, sample = load_tiny(name)
    key = 'cross_attention_kwargs' if name == 'tiny-sdxl' else 'joint_attention_kwargs'
    pipe.load_lora_weights(random_lora(denoiser, prefix_of(name), 1))
    whole = sample()
    plain, _, _ = check_four_runs(lambda: sample(**{key: dict(scale=.3)}), pipe, denoiser)
    assert relative(plain, whole) > .01
