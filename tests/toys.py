"Denoisers whose answer can be computed in the head, and what may go wrong around them: faults, wrappers, schedulers"
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from spectrum_nb.anatomy import CountingBlock, ToyDenoiser
from spectrum_nb.plan import make_plan
from spectrum_nb.settings import SpectrumConfig

torch.set_num_threads(1)
N = 20
PAPER = SpectrumConfig.paper(blend=0)
PASSES = make_plan(PAPER, N).passes


class Cancelled(Exception): "Somebody presses the button"


class Bang(Exception): "A fuse has blown"


class Toy(ToyDenoiser, CacheMixin): "A denoiser whose answer is 2·(x + 3t), with contexts"


class Fuse(nn.Identity):
    "A layer that hands on what it is given, or raises its fuse where one is set"
    fuse = None
    written_by_tests = ('runs', 'fuse', 'calls')

    def forward(self, x):
        if self.fuse: raise self.fuse
        return x


class FusedBlock(CountingBlock):
    "A block of the toy that raises its fuse, where one is set, after it ran"
    fuse = None
    written_by_tests = ('runs', 'fuse', 'calls')

    def forward(self, x, t):
        x = super().forward(x, t)
        if self.fuse: raise self.fuse
        return x


class FaultyToy(Toy):
    "The toy with a fuse everywhere; `wide` gives its head float32, as Wan does"
    written_by_tests = ('runs', 'fuse', 'calls')

    def __init__(self, wide=False):
        super().__init__()
        self.wide = wide
        self.blocks = nn.ModuleList(FusedBlock() for _ in range(3))
        self.embed, self.norm_out, self.proj_out = Fuse(), Fuse(), Fuse()

    def forward(self, hidden_states, timestep, copies=1):
        h = self.embed(hidden_states)
        for block in self.blocks: h = block(h, timestep)
        h = torch.cat([h]*copies) if copies > 1 else h
        return 2*self.proj_out(self.norm_out(h.float() if self.wide else h))

    def site(self, name):
        "The layer at one of the `SITES`"
        return self.blocks[int(name[-1])] if name.startswith('block') else getattr(self, name)


SITES = ('embed', 'block0', 'block1', 'block2', 'norm_out', 'proj_out')


class Shell(nn.Module):
    "Hands calls and unknown attributes on to what it wraps"
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs): return self.inner(*args, **kwargs)

    def __getattr__(self, name):
        try: return super().__getattr__(name)
        except AttributeError: return getattr(super().__getattr__('inner'), name)


class FakeScheduler:
    "Tells the step by `step_index`, by `counter`, or not at all"
    config = {}

    def __init__(self, kind): self.kind = kind

    def start(self, total, begin, order, shift=0):
        self.timesteps = torch.arange(total, 0, -1, dtype=torch.float64)/4 + shift
        self.order = order
        if self.kind == 'index': self.step_index, self.begin_index = None, begin or None
        if self.kind == 'counter': self.counter = 0

    def step(self, i, begin):
        if self.kind == 'index': self.step_index = begin + i + 1
        if self.kind == 'counter': self.counter = i + 1


def fake_pipeline(n_steps=20):
    "What a clock needs of a pipeline: a scheduler that tells its step, and the number of steps"
    return SimpleNamespace(scheduler=FakeScheduler('index'), config={}, num_timesteps=n_steps)


def state_of(module):
    "All that removal must leave as it was: dictionaries with order and identities, hooks; not what the tests write"
    def state(m):
        written = getattr(type(m), 'written_by_tests', ('runs',))
        attributes = [(k, id(v)) for k, v in vars(m).items() if k not in written]
        children = [(k, id(v)) for k, v in m._modules.items()]
        return attributes, children, len(m._forward_hooks), len(m._forward_pre_hooks)

    return [state(m) for m in module.modules()]


def loop(denoiser, times=range(N), x=torch.ones(2, 4)):
    "What a denoiser answers at these times, one after another"
    return [denoiser(x, float(t)) for t in times]


def answers_right(got, times, x=1.):
    "Whether the toy answered 2·(x + 3t) at each of these times"
    def is_right(answer, t): return torch.allclose(answer, torch.full_like(answer, 2*(x + 3.*t)), rtol=1e-4, atol=1e-4)

    return all(is_right(answer, t) for answer, t in zip(got, times, strict=True))


def in_thread(f):
    "What a function returns, or the exception that it raises, in a thread of its own"
    box = []

    def work():
        try: box.append(f())
        except BaseException as e: box.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return box[0]


def resident():
    "Bytes of memory that this process holds"
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages*os.sysconf('SC_PAGE_SIZE')
