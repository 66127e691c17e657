"""The four runs that test a feature of diffusers: without Spectrum, with every step a pass, by a plan, after removal

The pipelines are the tiny ones; all sample the same two captions from the same noise, in 14 steps."""
from contextlib import contextmanager

import numpy as np
import torch

from spectrum_nb.anatomy import blocks_of, count_calls
from spectrum_nb.apply import apply_spectrum, find_denoisers
from spectrum_nb.hook import SpectrumHook
from spectrum_nb.lab.captions import held_captions
from spectrum_nb.plan import make_plan
from spectrum_nb.presets import call_defaults, load_pipeline
from spectrum_nb.settings import SpectrumConfig

from pipelines import quiet, relative

N = 14
ONE, PAPER = SpectrumConfig(speedup=1), SpectrumConfig.paper()
PLAN = make_plan(PAPER, N)
# relative distance of latents from the run without Spectrum; see test_the_threshold_would_catch_a_broken_history
NEAR = .2
ALL = ('tiny-flux', 'tiny-sd3', 'tiny-sdxl', 'tiny-hunyuan', 'tiny-wan')
TWO = ('tiny-flux', 'tiny-sdxl')


def denoiser_of(pipe): return next(iter(find_denoisers(pipe).values()))


def captions(pipe, name, n=2): return held_captions(call_defaults(pipe, name), n)


def sampler(pipe, name, **more):
    "A function that samples latents of two captions, the same ones each time"
    call = dict(prompt=captions(pipe, name), num_inference_steps=N, output_type='latent', return_dict=False)
    call |= call_defaults(pipe, name) | more

    def sample(**changes):
        torch.manual_seed(0)        # SD3's ControlNet encodes its picture with noise of no generator
        return pipe(**(call | dict(generator=torch.Generator().manual_seed(3)) | changes))[0]

    return sample


def load_tiny(name, **more):
    "(pipeline, its denoiser, its sampler)"
    pipe = quiet(load_pipeline(name, 'cpu'))
    return pipe, denoiser_of(pipe), sampler(pipe, name, **more)


def traces(denoiser):
    "What a hook could leave behind: modules, their attributes, their hooks, who answers `forward`"
    hooks = lambda m: tuple(m._diffusers_hook._hook_order) if '_diffusers_hook' in vars(m) else ()
    return {
        n: (id(m), sorted(vars(m)), hooks(m), len(m._forward_pre_hooks), len(m._forward_hooks), list(m._modules))
        for n, m in denoiser.named_modules()
    }


def followed(stats, plan=PLAN):
    "Whether every context of the finished runs did what the plan says, and nothing else"
    def by_plan(s):
        return s.passes == plan.passes and not s.fallbacks and all(np.isfinite(e) for e in s.errors.values())

    return bool(stats) and all(by_plan(s) for s in stats)


def nearly_equal(x, y): return relative(x, y) < 1e-4


def check_four_runs(sample, target, denoiser):
    "The four runs: without, with every step a pass, with the paper's plan, after removal. (without, with, stats)"
    blocks = blocks_of(denoiser)
    plain = sample()
    before = traces(denoiser)

    with apply_spectrum(target, ONE) as run:
        assert torch.equal(sample(), plain)
        assert followed(run.stats, make_plan(ONE, N))
    assert traces(denoiser) == before

    with apply_spectrum(target, PAPER) as run, count_calls(blocks) as counts: fast = sample()
    assert followed(run.stats), run.stats
    assert counts == [len(PLAN.passes)*len(run.stats)]*len(blocks)
    assert torch.isfinite(fast).all()
    assert 0 < relative(fast, plain) < NEAR, relative(fast, plain)
    assert traces(denoiser) == before

    assert torch.equal(sample(), plain)
    return plain, fast, run.stats


def check_applied_first(sample, target, denoiser, change, plain=None):
    "Spectrum first, `change` second: the four runs, while and after; `plain` is what the changed pipeline samples"
    run = apply_spectrum(target, PAPER)
    change()
    with count_calls(blocks_of(denoiser)) as counts: fast = sample()
    assert followed(run.stats), run.stats
    assert counts == [len(PLAN.passes)*len(run.stats)]*len(counts)

    with count_calls(blocks_of(denoiser)) as counts: again = sample()
    assert torch.equal(again, fast)
    assert counts == [len(PLAN.passes)*len(run.stats)//2]*len(counts)

    run.remove()
    left = [hook for _, _, hooks, *_ in traces(denoiser).values() for hook in hooks]
    assert SpectrumHook.NAME not in left
    after = sample()
    if plain is not None: assert torch.equal(after, plain)
    assert 0 < relative(fast, after) < NEAR
    return fast


class CountingBackend:
    "A backend of torch.compile that runs the graph as it is, and counts compilations and calls"
    def __init__(self): self.compiled, self.ran = 0, 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def run(*args):
            self.ran += 1
            return graph(*args)

        return run


@contextmanager
def compiling():
    "A counting backend, with nothing compiled before or after"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try: yield CountingBackend()
    finally: torch._dynamo.reset()
