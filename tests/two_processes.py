"""What each of two processes does, for test_compat_processes.py: `python two_processes.py folder rank kind…`

Every kind is a way of sharing the work or the weights; a process saves what it sampled, or the error that it met."""
import datetime
import sys
import traceback

import diffusers
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from spectrum_nb.anatomy import blocks_of
from spectrum_nb.apply import apply_spectrum
from spectrum_nb.lab.captions import held_captions
from spectrum_nb.lab.flux import flux_embeds, flux_velocity
from spectrum_nb.settings import SpectrumConfig

from four_runs import N, ONE, PAPER, load_tiny
from pipelines import random_lora

KINDS = 'ddp', 'ddp wrapper', 'fsdp', 'fsdp prefetch', 'fsdp lora', 'ulysses', 'ulysses after', 'ulysses wan'
REFUSED = {'ring': 'does not support return_lse', 'tensor parallel': "not supported on device type 'cpu'"}


def call_of_rank(rank): return dict(prompt=held_captions(dict(height=32), 2)[rank:rank + 1])


def own_loop(pipe, call, steps=N):
    "A loop of one's own over a FLUX denoiser"
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    embeds = flux_embeds(pipe, call['prompt'])
    with torch.no_grad():
        for i in range(steps):
            x = x - flux_velocity(pipe, x, torch.tensor([1 - i/steps]), embeds, torch.tensor([2.5]))/steps
    return x


def passes_of(run): return [s.passes for s in run.stats if not s.fallbacks]


def sampled_with_replicas(kind, rank):
    "[latents, passes] twice: the denoiser is copied to each process, the wrapper put into the pipeline meanwhile"
    pipe, denoiser, _ = load_tiny('tiny-flux')
    replica, out = DistributedDataParallel(denoiser), []
    for config in (ONE, PAPER):
        target = replica if kind == 'ddp wrapper' else replica.module
        with apply_spectrum(target, config, n_steps=N) as run:
            pipe.transformer = replica
            out.append(own_loop(pipe, call_of_rank(rank)))
        out.append(passes_of(run))
    return out


def shard(denoiser, prefetch=False):
    "Share the weights among the two processes, block by block"
    mesh, blocks = init_device_mesh('cpu', (2,)), blocks_of(denoiser)
    for b in blocks: fully_shard(b, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)
    if not prefetch: return
    denoiser.set_modules_to_forward_prefetch(blocks[:1])
    for a, b in zip(blocks, blocks[1:]): a.set_modules_to_forward_prefetch([b])


def share_the_sequence(denoiser, kind):
    "diffusers' context or tensor parallelism over the two processes"
    torch.accelerator.device_count = lambda: 1                  # diffusers asks for an accelerator's number
    if 'tensor' in kind: return denoiser.enable_parallelism(config=diffusers.TensorParallelConfig(tp_degree=2))
    degree = 'ring_degree' if kind == 'ring' else 'ulysses_degree'
    denoiser.enable_parallelism(config=diffusers.ContextParallelConfig(**{degree: 2}))


def sampled_in_parallel(kind, rank):
    "[latents, passes] of every step a pass, then of the default, for one of two processes"
    if kind.startswith('ddp'): return sampled_with_replicas(kind, rank)
    pipe, denoiser, sample = load_tiny('tiny-wan' if kind.endswith('wan') else 'tiny-flux')
    sharded, after = 'fsdp' in kind, kind.endswith('after')
    call = call_of_rank(rank) if sharded else {}

    def parallel():
        if sharded: shard(denoiser, 'prefetch' in kind)
        else: share_the_sequence(denoiser, kind)

    if 'lora' in kind: pipe.load_lora_weights(random_lora(denoiser, 'transformer', 1))
    if not after:
        parallel()
        sample(**call)                                                             # without Spectrum it runs
    out = []
    for config in (ONE, PAPER):
        with apply_spectrum(pipe, config) as run:
            if after and config is ONE: parallel()
            out.append(sample(**call))
        out.append(passes_of(run))
    return out


def gathered(value):
    "What both processes have"
    values = [None]*2
    dist.all_gather_object(values, value)
    return values


def disagreeing(rank):
    "Sharded weights, another caption in each process, and a tolerance between the errors that the two measure"
    pipe, denoiser, sample = load_tiny('tiny-flux')
    with apply_spectrum(pipe, PAPER) as run: sample(**call_of_rank(rank))
    mine, other = gathered(run.stats[0].errors)
    at = next(i for i in mine if mine[i] != other[i])
    tolerance = (mine[at] + other[at])/2

    shard(denoiser)
    with apply_spectrum(pipe, SpectrumConfig.paper(tolerance=tolerance)) as run: sample(**call_of_rank(rank))
    return gathered(run.stats[0].passes)


def worker(folder, rank, kinds):
    "Do all kinds in one of two processes, and save what comes of each"
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=20))
    for kind in kinds:
        try: out = disagreeing(rank) if kind == 'tolerance' else sampled_in_parallel(kind, rank)
        except BaseException as e: out = f'{type(e).__name__}: {e}\n{traceback.format_exc()}'
        torch.save(out, f'{folder}/{kind} {rank}.pt')
    dist.destroy_process_group()


if __name__ == '__main__': worker(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
