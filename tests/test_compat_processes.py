"Spectrum in two processes that share the work or the weights: each samples what one process alone samples"
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectrum_nb.apply import apply_spectrum

from four_runs import N, ONE, PAPER, PLAN, load_tiny, nearly_equal
from pipelines import random_lora, relative
from two_processes import KINDS, REFUSED, call_of_rank, own_loop

pytestmark = pytest.mark.filterwarnings('ignore')
WORKER = Path(__file__).with_name('two_processes.py')

# Processes

def in_two_processes(folder, kinds, seconds=240):
    "What both processes of each kind returned: {kind: [of rank 0, of rank 1]}"
    env = os.environ | dict(OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo')
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    processes = [subprocess.Popen([sys.executable, WORKER, folder, str(rank), *kinds], env=env, **output)
                 for rank in (0, 1)]
    try: said = [p.communicate(timeout=seconds)[0] for p in processes]
    except subprocess.TimeoutExpired: said = ['timed out']*2
    finally:
        for p in processes: p.kill()

    def read(file): return torch.load(file, weights_only=False) if file.exists() else f'nothing came back: {said}'

    return {kind: [read(Path(folder)/f'{kind} {rank}.pt') for rank in (0, 1)] for kind in kinds}


@pytest.fixture(scope='module')
def together(tmp_path_factory): return in_two_processes(str(tmp_path_factory.mktemp('two')), [*KINDS, *REFUSED])


def sampled_alone(kind, rank):
    "What one process alone returns for the kind"
    replicated = kind.startswith('ddp')
    pipe, denoiser, sample = load_tiny('tiny-wan' if kind.endswith('wan') else 'tiny-flux')
    if 'lora' in kind: pipe.load_lora_weights(random_lora(denoiser, 'transformer', 1))
    call = call_of_rank(rank) if replicated or 'fsdp' in kind else {}
    out = []
    for config in (ONE, PAPER):
        run = apply_spectrum(denoiser, config, n_steps=N) if replicated else apply_spectrum(pipe, config)
        with run: out.append(own_loop(pipe, call) if replicated else sample(**call))
        out.append([s.passes for s in run.stats])
    return out


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_two_processes(kind, together):
    for rank, out in enumerate(together[kind]):
        assert not isinstance(out, str), out
        every, passes_every, fast, passes = out
        every_alone, passes_every_alone, fast_alone, passes_alone = sampled_alone(kind, rank)

        assert passes_every == passes_every_alone
        assert passes == passes_alone == [PLAN.passes]*len(passes)
        assert nearly_equal(every, every_alone)
        assert nearly_equal(fast, fast_alone)
        assert relative(fast, every) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('kind', REFUSED)
def test_what_diffusers_refuses_on_two_cpu_processes(kind, together):
    for out in together[kind]: assert isinstance(out, str) and REFUSED[kind] in out, out


@pytest.mark.slow
def test_processes_that_share_weights_agree_on_passes(tmp_path):
    outs = in_two_processes(str(tmp_path), ['tolerance'], 90)['tolerance']
    assert not any(isinstance(out, str) for out in outs), outs[0]
    first, second = outs[0]
    assert first == second
