"Others who change the same denoiser: controls, attention maps, hooks, replaced forwards, whole graphs"
import warnings

import pytest
import torch

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.settings import SpectrumConfig

from pipelines import flux_call, random_denoiser, relative
from toys import N, PAPER, PASSES, Toy, answers_right, loop

pytestmark = pytest.mark.filterwarnings('ignore')

# Others at work on the same denoiser

def test_the_controls_of_hunyuandit_are_left_out_at_forecasts():
    model, call = random_denoiser('HunyuanDiT2DModel')
    shape = (1, 16, model.config.hidden_size)

    def step(**more):
        controls = [torch.full(shape, .01) for _ in range(model.config.num_layers//2 - 1)]
        return model(**call | more, controlnet_block_samples=controls)[0]

    with torch.no_grad():
        plain = step()
        with apply_spectrum(model, PAPER, N) as run:
            outs = [step(timestep=torch.tensor([5. - i*1e-5])) for i in range(N)]
    assert [s.passes for s in run.stats] == [PASSES]
    assert all(relative(o, plain) < 1e-3 for o in outs)


def test_a_pipeline_that_reads_attention_maps_is_refused_by_name():
    class CrossAttnStoreProcessor:
        def __init__(self): self.attention_probs = None
        def __call__(self, attn, hidden_states, **kwargs): return hidden_states

    model, call = random_denoiser('UNet2DConditionModel')
    next(m for m in model.modules() if hasattr(m, 'set_processor')).processor = CrossAttnStoreProcessor()

    def run():
        for i in range(N): model(**call | dict(timestep=torch.tensor(900 - i)))

    with torch.no_grad(), apply_spectrum(model, PAPER, N):
        with pytest.raises(RuntimeError, match='CrossAttnStoreProcessor keeps attention maps'): run()
    with torch.no_grad(), apply_spectrum(model, SpectrumConfig(speedup=1), N): run()


def test_hooks_on_blocks_are_said():
    toy = Toy()
    toy.blocks[1].register_forward_hook(lambda *_: None)
    with apply_spectrum(toy, PAPER, N), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        loop(toy)
    assert len(said) == 1
    assert 'forward hooks on the blocks' in str(said[0].message)


def accelerated(self, *args, **kwargs): return type(self).before(self, *args, **kwargs)


ACCELERATED = f'{__name__}.accelerated'


class Patched(Toy):
    "A denoiser of one's own whose forward is another function: it may be meant so"
    before = Toy.forward
    forward = accelerated


def test_a_forward_that_somebody_replaced_is_refused_or_said():
    model, call = random_denoiser('FluxTransformer2DModel')
    cls = type(model)
    own = cls.forward

    def assert_refused_or_said(words):
        with pytest.raises(RuntimeError, match=words): apply_spectrum(model, PAPER, N)
        with pytest.warns(UserWarning, match=words): apply_spectrum(model, PAPER, N, feature='output').remove()

    try:
        cls.forward = accelerated
        assert_refused_or_said(ACCELERATED)
    finally: cls.forward = own

    model.forward = lambda *args, **kwargs: own(model, *args, **kwargs)
    assert_refused_or_said('is not its class')
    del model.forward

    with pytest.warns(UserWarning, match=ACCELERATED), apply_spectrum(toy := Patched(), PAPER, N):
        assert answers_right(loop(toy), range(N))

    model._is_cached = True
    with pytest.raises(RuntimeError, match='cache-dit'): apply_spectrum(model, PAPER, N)


def test_own_classes_and_known_wrappers_are_not_said():
    names = 'FluxTransformer2DModel', 'UNet2DConditionModel', 'WanTransformer3DModel', 'SD3Transformer2DModel'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        apply_spectrum(Toy(), PAPER, N).remove()
        for name in names:
            model, _ = random_denoiser(name)
            apply_spectrum(model, PAPER, N).remove()


def test_a_whole_graph_names_the_call_that_works(flux):
    pipe, _ = flux
    torch._dynamo.reset()
    with torch.no_grad(), apply_spectrum(pipe.transformer, PAPER, N):
        compiled = torch.compile(pipe.transformer, fullgraph=True, backend='eager')
        with pytest.raises(Exception, match='compile_repeated_blocks'):
            compiled(**flux_call(pipe.transformer), timestep=torch.ones(1))
    torch._dynamo.reset()
