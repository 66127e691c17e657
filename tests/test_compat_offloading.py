"Spectrum with weights kept elsewhere: offloading by pipelines, by accelerate and by groups, onto the CPU itself"
from contextlib import contextmanager, nullcontext

import accelerate
import pytest
import torch
from diffusers.hooks import group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn

from spectrum_nb.anatomy import blocks_of, count_calls, find_anatomy
from spectrum_nb.apply import apply_spectrum

from four_runs import N, NEAR, PAPER, PLAN, TWO, check_applied_first, check_four_runs, denoiser_of, followed, load_tiny
from pipelines import random_lora, relative

pytestmark = pytest.mark.filterwarnings('ignore')

# Offloading

def tensors_of(modules): return {t for m in modules for t in (*m.parameters(), *m.buffers())}


@contextmanager
def fetched():
    "Count what accelerate's and diffusers' hooks bring in before a module runs: [modules or groups, bytes]"
    total, set_tensor, onload = [0, 0], accelerate.hooks.set_module_tensor_to_device, ModuleGroup.onload_

    def fetch(module, name, device, value=None, **more):
        if value is not None:
            total[0] += 1
            total[1] += value.nbytes
        return set_tensor(module, name, device, value=value, **more)

    def bring(self):
        out = onload(self)
        tensors = [t for m in self.modules for t in (*m.parameters(), *m.buffers())] + [*self.parameters, *self.buffers]
        total[0] += 1
        total[1] += sum(t.nbytes for t in tensors)
        return out

    accelerate.hooks.set_module_tensor_to_device, ModuleGroup.onload_ = fetch, bring
    try: yield total
    finally: accelerate.hooks.set_module_tensor_to_device, ModuleGroup.onload_ = set_tensor, onload


def offload_pipeline(pipe, what):
    """enable_model_cpu_offload or enable_sequential_cpu_offload onto the CPU itself; accelerate cannot offload
    transformers' text encoders so, they stay"""
    pipe._exclude_from_cpu_offload = [n for n, m in pipe.components.items()
                                      if isinstance(m, nn.Module) and m is not denoiser_of(pipe)]
    getattr(pipe, f'enable_{what}_cpu_offload')(device='cpu')


def offload_group(denoiser, level='block_level', folder=None):
    "diffusers' group offloading onto the CPU itself, a block a group, by way of a folder where there is one"
    cpu = torch.device('cpu')
    a_block = dict(num_blocks_per_group=1 if level == 'block_level' else None)
    denoiser.enable_group_offload(cpu, cpu, level, **a_block, offload_to_disk_path=folder)


def share_fetched(name, what, sample, target):
    "Fetched bytes with Spectrum, as a share of those without"
    with fetched() as without: sample()
    with apply_spectrum(target, PAPER), fetched() as with_: sample()
    print(f'\n{name} {what}: fetched without Spectrum {without[0]} × , {without[1]/2**20:.1f} MiB; '
          f'with {with_[0]} × , {with_[1]/2**20:.1f} MiB ({with_[1]/max(without[1], 1):.0%}); '
          f'passes {len(PLAN.passes)} of {N}')
    return with_[1]/without[1]


def check_offloaded(sample, pipe, denoiser, plain):
    "The four runs of a denoiser whose weights are elsewhere; without Spectrum it samples what it sampled before"
    sampled, _, _ = check_four_runs(sample, pipe, denoiser)
    assert torch.equal(sampled, plain)


@pytest.mark.parametrize('order', ['offload first', 'spectrum first'])
@pytest.mark.parametrize('name', TWO)
def test_a_pipelines_offloading(name, order):
    pipe, denoiser, sample = load_tiny(name)
    plain = sample()

    def change(): offload_pipeline(pipe, 'model')

    if order == 'spectrum first': return check_applied_first(sample, pipe, denoiser, change, plain)
    change()
    check_offloaded(sample, pipe, denoiser, plain)


def test_offloading_without_an_accelerator_is_refused_by_diffusers():
    pipe, _, _ = load_tiny('tiny-flux')
    for enable in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(RuntimeError, match='requires accelerator'): enable()


def test_sequential_offloading_onto_the_cpu_is_refused_by_accelerate():
    """It puts plain tensors in place of parameters; without Spectrum, too. accelerate.cpu_offload, which it calls, is
    tested below"""
    pipe, denoiser, sample = load_tiny('tiny-flux')
    offload_pipeline(pipe, 'sequential')
    with pytest.raises(TypeError, match='requires_grad'): sample()


def dispatched(denoiser):
    "{part: device} with every second block on disk, all else on the CPU"
    body, blocks = find_anatomy(denoiser).body, []
    for name in body:
        part = denoiser.get_submodule(name)
        blocks += [f'{name}.{i}' for i in range(len(part))] if isinstance(part, nn.ModuleList) else [name]
    others = {name: 'cpu' for name, _ in denoiser.named_children() if name not in body}
    return others | {block: 'disk' if i % 2 else 'cpu' for i, block in enumerate(blocks)}


@pytest.mark.parametrize('order', ['offload first', 'spectrum first'])
@pytest.mark.parametrize('what', ['cpu_offload', 'cpu_offload_with_hook', 'dispatch', 'disk_offload'])
@pytest.mark.parametrize('name', TWO)
def test_accelerates_offloading(name, what, order, tmp_path):
    pipe, denoiser, sample = load_tiny(name)
    plain = sample()

    def change():
        if what == 'cpu_offload': accelerate.cpu_offload(denoiser, 'cpu', offload_buffers=True)
        if what == 'cpu_offload_with_hook': accelerate.cpu_offload_with_hook(denoiser, 'cpu')
        if what == 'disk_offload': accelerate.disk_offload(denoiser, tmp_path, 'cpu', offload_buffers=True)
        if what == 'dispatch':
            accelerate.dispatch_model(denoiser, dispatched(denoiser), main_device='cpu', offload_dir=tmp_path)

    if order == 'offload first':
        change()
        check_offloaded(sample, pipe, denoiser, plain)
        if what != 'cpu_offload_with_hook': assert share_fetched(name, what, sample, pipe) < .8
    else:
        check_applied_first(sample, pipe, denoiser, change, plain)
        accelerate.hooks.remove_hook_from_module(denoiser, recurse=True)
        assert torch.equal(sample(), plain)


@pytest.mark.parametrize('order', ['offload first', 'spectrum first'])
@pytest.mark.parametrize('level', ['block_level', 'leaf_level'])
@pytest.mark.parametrize('place', ['cpu', 'disk'])
@pytest.mark.parametrize('name', TWO)
def test_group_offloading(name, place, level, order, tmp_path):
    pipe, denoiser, sample = load_tiny(name)
    plain = sample()

    def change(): offload_group(denoiser, level, str(tmp_path) if place == 'disk' else None)

    if order == 'spectrum first': return check_applied_first(sample, pipe, denoiser, change, plain)
    change()
    check_offloaded(sample, pipe, denoiser, plain)
    assert share_fetched(name, f'{place} {level}', sample, pipe) < .9


class QuietStream:
    "A stream that does nothing"
    def synchronize(self): pass


class QuietBackend:
    "What diffusers asks of a device with streams"
    Stream = QuietStream
    def __init__(self, device): pass
    def stream(self, stream): return nullcontext()
    def current_stream(self): return QuietStream()


@contextmanager
def pretended_streams():
    "diffusers' group offloading with streams on a CPU: the same hooks, streams that do nothing"
    @contextmanager
    def unpinned(self): yield self.cpu_param_dict

    def offload(module, level):
        cpu, kind = torch.device('cpu'), group_offloading.GroupOffloadingType(level)
        config = group_offloading.GroupOffloadingConfig(cpu, cpu, kind, True, False, True, 1, None, QuietStream())
        group_offloading._apply_group_offloading(module, config)

    kept = group_offloading.TorchDeviceBackend, ModuleGroup._pinned_memory_tensors
    group_offloading.TorchDeviceBackend, ModuleGroup._pinned_memory_tensors = QuietBackend, unpinned
    try: yield offload
    finally: group_offloading.TorchDeviceBackend, ModuleGroup._pinned_memory_tensors = kept


@pytest.mark.parametrize('order', ['offload first', 'spectrum first'])
@pytest.mark.parametrize('level', ['block_level', 'leaf_level'])
@pytest.mark.parametrize('name', TWO)
def test_group_offloading_with_streams(name, level, order):
    pipe, denoiser, sample = load_tiny(name)
    plain = sample()
    with pretended_streams() as offload:
        if order == 'spectrum first':
            return check_applied_first(sample, pipe, denoiser, lambda: offload(denoiser, level), plain)
        offload(denoiser, level)
        with apply_spectrum(pipe, PAPER) as run, count_calls(blocks_of(denoiser)) as counts:
            fast, again = sample(), sample()

        assert followed(run.stats)
        assert counts == [2*len(PLAN.passes)]*len(counts)
        assert torch.equal(fast, again)
        assert 0 < relative(fast, plain) < NEAR
        check_offloaded(sample, pipe, denoiser, plain)


@pytest.mark.parametrize('what, order', [
    ('model', 'offload first'),
    ('model', 'spectrum first'),
    ('group', 'offload first'),
    ('group', 'spectrum first'),
])
def test_lora_on_an_offloaded_denoiser(what, order, monkeypatch):
    # diffusers enables offloading again without saying where
    monkeypatch.setattr('diffusers.pipelines.pipeline_utils.get_device', lambda: 'cpu:0')
    pipe, denoiser, sample = load_tiny('tiny-flux')
    weights = random_lora(denoiser, 'transformer', 1)

    def offload():
        if what == 'group': offload_group(denoiser)
        else: offload_pipeline(pipe, what)

    if order == 'offload first': offload()
    with apply_spectrum(pipe, PAPER) as run:
        if order == 'spectrum first': offload()
        bare = sample()
        pipe.load_lora_weights(dict(weights))
        with count_calls(blocks_of(denoiser)) as counts: fast = sample()
        assert len(run.stats) == 2
        assert followed(run.stats)
        assert counts == [len(PLAN.passes)]*len(counts)
        pipe.unload_lora_weights()
        assert torch.equal(sample(), bare)
        assert len(run.stats) == 3

    pipe.load_lora_weights(dict(weights))
    plain = sample()
    assert relative(plain, bare) > .01
    assert 0 < relative(fast, plain) < NEAR
