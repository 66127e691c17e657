"Programs of what users do, drawn at random: what they draw with Spectrum is what they draw without"
import copy
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from hypothesis import given, strategies as st

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.plan import make_plan
from spectrum_nb.settings import SpectrumConfig

from pipelines import fixed, quiet
from profiles import examples
from toys import N, Cancelled, Shell, Toy, state_of

pytestmark = pytest.mark.filterwarnings('ignore')

# Programs of what users do

class Adapted(Toy):
    """A toy with a condition, and with what peft leaves: `peft_config`, and a shift that an adapter adds to what its
    blocks make"""
    def forward(self, hidden_states, timestep, condition=0.):
        return super().forward(hidden_states + condition + (5. if self.has_adapter else 0.), timestep)

    @property
    def has_adapter(self): return 'peft_config' in vars(self)

    def toggle_adapter(self):
        if self.has_adapter: del self.peft_config
        else: self.peft_config = {'one': None}


class Line(diffusers.DiffusionPipeline):
    """A pipeline whose denoiser is given one sample throughout, so that its answers lie on a line:
    2·(x + condition + 3t)"""
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


class User:
    "Somebody with two denoisers, a pipeline around one of them, two threads besides the main one, and Spectrum"
    def __init__(self, bare, rises):
        self.bare, self.rises = bare, rises
        self.config = SpectrumConfig.paper(blend=0, warmup=2)
        self.toys, self.at = [Adapted(), Adapted()], 0
        self.pipe = quiet(Line(self.toys[0]))
        self.threads, self.thread = [ThreadPoolExecutor(1) for _ in range(2)], 0
        self.grad = False
        self.noise = fixed(6, 1, 4, 8, 8)
        self.before = self.left()
        self.handle = self.apply()

    def apply(self):
        if self.bare: return apply_spectrum(self.pipe.transformer, self.config, N)
        return apply_spectrum(self.pipe, self.config)

    def left(self):
        "What is left on the denoisers, but for the adapters"
        def without_adapter(attributes): return [a for a in attributes if a[0] != 'peft_config']

        return [[(without_adapter(attributes), *rest) for attributes, *rest in state_of(toy)] for toy in self.toys]

    def ask(self, run, i, k, t):
        "Call the denoiser at a step i of a run for a tile k, and compare its answer with the line"
        if i == run['cut']: raise Cancelled
        toy = self.toys[self.at]
        if i == run['adapter'] and not k: toy.toggle_adapter()
        seed = run['seed'] + 3*bool(run['begin'])                    # a picture from a picture begins with other noise
        x = (self.noise[seed] + k).requires_grad_(self.grad)
        prompt = seed if self.bare else run['prompt']                # a bare denoiser knows a run by its noise
        ran = toy.passes

        with torch.enable_grad() if self.grad else torch.no_grad(): got = self.pipe.transformer(x, t, prompt)

        want = 2*(x.detach() + prompt + (5 if toy.has_adapter else 0) + 3*t)
        assert torch.allclose(got.detach(), want, atol=2e-3), (i, k, t, (got - want).abs().max())
        if self.grad: self.check_gradient(got, x, toy.passes > ran)

    def check_gradient(self, got, x, is_pass):
        gradient = lambda: torch.autograd.grad(got.sum(), x)[0]
        if is_pass: assert torch.equal(gradient(), torch.full_like(x, 2.))
        else:
            with pytest.raises(RuntimeError, match='a gradient was asked of a forecast'): gradient()

    def draw(self, run):
        "A run of the pipeline, or of a loop of one's own"
        n, begin, tiles = run['n'], run['begin'], run['tiles']
        ask = lambda i, k, t: self.ask(run, i, k, t)
        if not self.bare: return self.pipe(n, min(begin, n - 1), tiles, run['copies'], ask)
        times = torch.linspace(1, 1/n, n)
        if self.rises: times = 1 - times                    # every run begins at the same end, or late
        for i, t in enumerate(times[begin:]):
            for k in range(tiles): ask(i, k, t)

    def run(self, run):
        "A run in the thread of the moment; in a pipeline its statistics are what the plan says"
        done, length = len(self.handle.stats), max(run['n'] - run['begin'], 1)
        try:
            if self.thread: self.threads[self.thread - 1].submit(self.draw, run).result()
            else: self.draw(run)
        except Cancelled: return
        if self.bare or run['adapter'] is not None: return
        stats = self.handle.stats[done:]
        planned = (length, make_plan(self.config, length).passes)
        assert [(s.n_steps, s.passes) for s in stats] == [planned]*run['tiles']
        assert not any(s.fallbacks for s in stats)

    def act(self, what, which):
        "All that is not a run"
        pipe = self.pipe
        if what == 'thread': self.thread = which
        elif what == 'wrap': pipe.transformer = Shell(pipe.transformer)
        elif what == 'unwrap': pipe.transformer = vars(pipe.transformer)['_modules'].get('inner', pipe.transformer)
        elif what == 'grad': self.grad = not self.grad
        elif what == 'adapter': self.toys[self.at].toggle_adapter()
        elif what == 'scheduler': pipe.scheduler = copy.deepcopy(pipe.scheduler)
        elif what == 'copy': self.copy_denoiser()
        elif what == 'remove': self.remove_and_apply()
        elif what == 'swap': self.swap()

    def copy_denoiser(self):
        hooked = self.toys[self.at] if self.bare else self.handle._hooked[0][0]   # a swap is followed at the next call
        with pytest.raises(RuntimeError, match='cannot be copied'): copy.deepcopy(hooked)

    def remove_and_apply(self):
        self.handle.remove()
        assert self.left() == self.before
        self.handle = self.apply()

    def swap(self):
        if self.bare: self.handle.remove()
        self.at = 1 - self.at
        self.pipe.transformer = self.toys[self.at]
        if self.bare: self.handle = self.apply()

    def stop(self):
        self.handle.remove()
        for pool in self.threads: pool.shutdown()


runs = st.fixed_dictionaries(dict(
    n=st.integers(1, 26), seed=st.integers(0, 2), prompt=st.integers(0, 2), cut=st.none() | st.integers(0, 25),
    tiles=st.sampled_from([1, 1, 1, 2, 3]), copies=st.booleans(), begin=st.sampled_from([0, 0, 0, 3]),
    adapter=st.none() | st.integers(1, 25)))
THINGS = 'wrap', 'unwrap', 'swap', 'grad', 'adapter', 'scheduler', 'copy', 'remove'
threads = st.tuples(st.just('thread'), st.integers(0, 2))
things = [st.tuples(st.just(what), st.just(0)) for what in THINGS]
acts = st.lists(st.one_of(runs, runs, runs, threads, *things), min_size=1, max_size=10)


@examples(600, 12_000)
@given(program=acts, bare=st.booleans(), rises=st.booleans())
def test_programs_of_what_users_do_draw_what_they_draw_without(program, bare, rises):
    user = User(bare, rises)
    try:
        for act in program:
            if isinstance(act, dict): user.run(act)
            else: user.act(*act)
        user.handle.remove()

        assert user.left() == user.before
        assert all(callable(toy.forward) for toy in user.toys)
        assert 'progress_bar' not in vars(user.pipe)
    finally: user.stop()
