"Spectrum with torch.compile: of the blocks, of the denoiser, before and after; nothing is compiled twice"
import pytest
import torch

from spectrum_nb.anatomy import blocks_of
from spectrum_nb.apply import apply_spectrum

from four_runs import ALL, ONE, PAPER, TWO, compiling, followed, load_tiny, nearly_equal

pytestmark = pytest.mark.filterwarnings('ignore')

# Compilation

def check_compiled(backend, sample, run, fast):
    "Two runs with the handle on: the second compiles nothing; what is computed is what the uncompiled one computed"
    first = sample()
    n, ran = backend.compiled, backend.ran
    assert n > 0
    assert nearly_equal(first, fast)
    assert torch.equal(sample(), first)
    print(f'\n{n} compilations, {ran} graphs run; second run: {backend.compiled - n} compilations')
    assert backend.compiled == n
    assert followed(run.stats)


def check_order(order, pipe, sample, fast, backend, compile):
    "Compile before or after the handle is put on, and look at two runs with it on"
    if order == 'compile first':
        compile(backend)
        sample()
    with apply_spectrum(pipe, PAPER) as run:
        if order == 'spectrum first': compile(backend)
        check_compiled(backend, sample, run, fast)


@pytest.mark.slow
@pytest.mark.parametrize('order', ['compile first', 'spectrum first'])
@pytest.mark.parametrize('name', ALL)
def test_compiled_blocks(name, order):
    pipe, denoiser, sample = load_tiny(name)
    plain = sample()
    with apply_spectrum(pipe, PAPER): fast = sample()

    def compile(backend):
        if denoiser._repeated_blocks: return denoiser.compile_repeated_blocks(backend=backend)
        for b in blocks_of(denoiser): b.compile(backend=backend)             # SD3 names none: diffusers refuses

    with compiling() as backend:
        check_order(order, pipe, sample, fast, backend, compile)
        n = backend.compiled
        assert nearly_equal(sample(), plain)
        assert backend.compiled == n


@pytest.mark.slow
@pytest.mark.parametrize('name, how, order', [       # every two of the choices once
    (TWO[0], 'torch.compile', 'compile first'),
    (TWO[0], 'module.compile', 'spectrum first'),
    (TWO[1], 'torch.compile', 'spectrum first'),
    (TWO[1], 'module.compile', 'compile first'),
])
def test_a_compiled_denoiser(name, how, order):
    pipe, denoiser, sample = load_tiny(name)
    plain = sample()
    with apply_spectrum(pipe, PAPER): fast = sample()
    attribute = 'unet' if name == 'tiny-sdxl' else 'transformer'

    def compile(backend):
        if how == 'module.compile': denoiser.compile(backend=backend)
        else: setattr(pipe, attribute, torch.compile(denoiser, backend=backend))

    with compiling() as backend:
        check_order(order, pipe, sample, fast, backend, compile)
        assert nearly_equal(sample(), plain)
        n = backend.compiled
        assert nearly_equal(sample(), plain)
        assert backend.compiled == n


@pytest.mark.slow
@pytest.mark.parametrize('name', TWO)
def test_a_compiled_denoiser_saves_the_blocks(name):
    "Graphs run at a forecast must be those of the embedding and the head: fewer operations than a pass"
    pipe, denoiser, sample = load_tiny(name)
    operations = []

    def backend(graph, inputs):
        n = sum(node.op.startswith('call') for node in graph.graph.nodes)

        def run(*args):
            operations.append(n)
            return graph(*args)

        return run

    def operations_of(config):
        "How many operations a second run takes"
        with apply_spectrum(pipe, config):
            sample()
            operations.clear()
            sample()
        return sum(operations)

    with compiling():
        denoiser.compile(backend=backend)
        every, few = operations_of(ONE), operations_of(PAPER)
    print(f'\n{name}: operations run {every} → {few}')
    assert few < .85*every
