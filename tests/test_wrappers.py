"Denoisers within wrappers: shells, peft, FSDP, shallow copies; followed to what they wrap, or refused in words"
import copy

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.pipeline_clock import unwrapped

from pipelines import latents, random_denoiser, relative, tiny_pipeline
from toys import N, PAPER, PASSES, Cancelled, Shell, Toy, answers_right, loop, state_of

pytestmark = pytest.mark.filterwarnings('ignore')

# Wrappers

@pytest.mark.parametrize('depth', [1, 3])
@pytest.mark.parametrize('registry', [False, True])
def test_a_shell_that_hands_attributes_on_works_and_is_left_as_it_was(depth, registry):
    toy = shell = Toy()
    for _ in range(depth): shell = Shell(shell)
    if registry:
        with shell.cache_context('before'): shell(torch.ones(2, 4), 0.)
    before, plain = state_of(shell), loop(shell, range(3))

    with pytest.raises(Cancelled), apply_spectrum(shell, PAPER, N) as run:
        assert answers_right(loop(shell), range(N))
        assert [s.passes for s in run.stats] == [PASSES]
        raise Cancelled

    assert state_of(shell) == before
    assert callable(toy.forward)
    assert all(torch.equal(a, b) for a, b in zip(loop(shell, range(3)), plain))


@pytest.mark.parametrize('name, key', [
    ('tiny-sdxl', 'unet'),
    ('tiny-flux', 'transformer'),
    ('tiny-wan', 'transformer'),
])
@pytest.mark.parametrize('order', ['wrapped first', 'Spectrum first'])
def test_a_pipeline_whose_denoiser_peft_wrapped(name, key, order):
    pipe, call = tiny_pipeline(name)
    inner = getattr(pipe, key)

    def wrap():
        adapter = LoraConfig(r=2, target_modules=['to_q', 'to_v'], init_lora_weights=False)
        setattr(pipe, key, get_peft_model(inner, adapter))

    torch.manual_seed(0)
    if order == 'wrapped first': wrap()
    run = apply_spectrum(pipe, PAPER)
    if order == 'Spectrum first': wrap()
    fast = latents(pipe, call)
    assert run.stats
    assert all(s.passes == PASSES and not s.fallbacks for s in run.stats)

    run.remove()
    plain = latents(pipe, call)
    assert callable(inner.forward)
    assert not torch.equal(fast, plain)
    assert torch.equal(latents(pipe, call), plain)

    # peft adapts in place: the same model without its wrapper
    wrapper = getattr(pipe, key)
    setattr(pipe, key, inner)
    with apply_spectrum(pipe, PAPER): assert torch.equal(latents(pipe, call), fast)
    setattr(pipe, key, wrapper)
    assert not any('forward' in vars(m) for m in wrapper.modules())
    assert 'progress_bar' not in vars(pipe)


def test_fsdp_1_in_one_process(tmp_path):
    if not dist.is_initialized():
        dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model, call = random_denoiser('FluxTransformer2DModel')
        plain = model(**call)[0].detach()
        sharded = FullyShardedDataParallel(model, device_id=torch.device('cpu'))
        with torch.no_grad(), apply_spectrum(sharded, PAPER, N) as run:
            for i in range(N): out = sharded(**call | dict(timestep=torch.tensor([.5 - i/1e4])))[0]
        assert [s.passes for s in run.stats] == [PASSES]
        assert relative(out, plain) < .05
    finally: dist.destroy_process_group()


def test_a_shell_that_computes_by_itself_is_refused():
    class Own(Shell):
        def forward(self, x, t):
            for b in self.blocks: x = b(x, t)
            return 2*self.norm_out(x)

    shell = Own(Toy())
    before = state_of(shell)
    with apply_spectrum(shell, PAPER, N):
        with pytest.raises(RuntimeError, match='Own does not call the denoiser that it wraps'): loop(shell)
    assert state_of(shell) == before


def test_a_shallow_copy_has_hooks_of_its_own_or_is_refused():
    toy = Toy()
    with toy.cache_context('before'): toy(torch.ones(2, 4), 0.)
    twin = copy.copy(toy)
    before = state_of(toy), state_of(twin)

    with apply_spectrum(twin, PAPER, N) as run:
        assert answers_right(loop(twin), range(N))
        assert len(run.stats) == 1
        assert answers_right(loop(toy), range(N))
        assert len(run.stats) == 1
        assert callable(toy.forward)
    assert (state_of(toy), state_of(twin)) == before

    with apply_spectrum(toy, PAPER, N):
        with pytest.raises(RuntimeError): apply_spectrum(copy.copy(toy), PAPER, N)


def test_a_wrapper_with_two_modules_is_followed_to_the_one_it_hands_on_to():
    class Average(Shell):
        use_average = False

        def __init__(self, inner):
            super().__init__(inner)
            self.average = copy.deepcopy(inner)

        def forward(self, *args): return self.average(*args) if self.use_average else self.inner(*args)

    shell = Average(Toy())
    assert unwrapped(shell) is shell.inner
    with apply_spectrum(shell, PAPER, N) as run: assert answers_right(loop(shell), range(N))
    assert len(run.stats) == 1
