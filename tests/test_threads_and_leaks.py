"Several threads on one denoiser or on one each, and what is left in memory when runs are over"
import contextlib
import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.handle import SpectrumHandle
from spectrum_nb.history import History
from spectrum_nb.hook import SpectrumHook
from spectrum_nb.pipeline_clock import PipelineClock
from spectrum_nb.plan import Plan
from spectrum_nb.report import RunStats
from spectrum_nb.run import Run
from spectrum_nb.samples import make_sample
from spectrum_nb.settings import SpectrumConfig

from profiles import NIGHTLY, examples
from toys import SITES, Bang, FaultyToy, fake_pipeline, in_thread, loop, resident, state_of

pytestmark = pytest.mark.filterwarnings('ignore')

# Threads

def draw_picture(pipe, seed, config, n_steps=10):
    call = dict(height=32, width=32, guidance_scale=2.5, max_sequence_length=16)
    return make_sample(pipe, 'a large red circle at the centre on a blue background', seed, n_steps, config, call)


def test_two_threads_with_a_pipeline_each_draw_what_one_draws(two_pipes):
    rounds, config = 12 if NIGHTLY else 3, SpectrumConfig.paper(alpha=2)
    alone, together, untouched = {}, {}, [state_of(p.transformer) for p in two_pipes]

    def work(k, into): into[k] = [draw_picture(two_pipes[k], seed, config) for seed in range(k, rounds, 2)]

    for k in range(2): work(k, alone)
    threads = [threading.Thread(target=work, args=(k, together)) for k in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()

    for k in range(2):
        for (picture, notes), (other, other_notes) in zip(alone[k], together[k], strict=True):
            assert np.array_equal(picture, other)
            assert notes['runs'] == other_notes['runs']
    assert untouched == [state_of(p.transformer) for p in two_pipes]


@examples(20, 300)
@given(at=st.integers(0, 19), where=st.sampled_from(SITES))
def test_a_second_thread_within_a_call_is_refused_and_harms_nothing(at, where):
    with apply_spectrum(toy := FaultyToy(), SpectrumConfig.paper(), 20) as run: want = loop(toy, range(20))
    toy, refused, toy.calls = FaultyToy(), [], 0

    def intrude(*_):
        if toy.calls != at: return
        toy.calls += 1
        refused.append(in_thread(lambda: toy(torch.zeros(2, 4), 0.)))

    got = []
    with apply_spectrum(toy, SpectrumConfig.paper(), 20) as other:
        watch = toy.site(where).register_forward_pre_hook(intrude)
        for i in range(20):
            toy.calls = i
            got.append(toy(torch.ones(2, 4), float(i)))
        watch.remove()

    assert all(isinstance(e, RuntimeError) and 'another thread' in str(e) for e in refused), refused
    assert torch.equal(torch.stack(got), torch.stack(want))
    assert other.stats == run.stats
    if where in ('embed', 'norm_out', 'proj_out'): assert len(refused) == 1


@examples(20, 300)
@given(at=st.integers(2, 19), threads=st.integers(1, 3), steps=st.integers(1, 5))
def test_another_run_of_another_thread_between_two_calls_harms_nothing(at, threads, steps):
    with apply_spectrum(toy := FaultyToy(), SpectrumConfig.paper(), 20) as run: want = loop(toy, range(20))
    few = min(steps, at)
    with apply_spectrum(toy := FaultyToy(), SpectrumConfig.paper(), 20) as other:
        got = loop(toy, range(at))
        others = [in_thread(lambda: toy(torch.zeros(2, 4), float(k))) for k in range(few)]
        got += loop(toy, range(at, 20))

    assert torch.equal(torch.stack(got), torch.stack(want))
    assert other.stats == run.stats
    # its first steps are passes
    assert [o.unique().tolist() for o in others[:5]] == [[6.*k] for k in range(few)]


@examples(20, 300)
@given(threads=st.lists(st.integers(0, 3), min_size=20, max_size=20))
def test_a_run_whose_steps_come_from_any_threads_is_the_same_run(threads):
    pools, out = [ThreadPoolExecutor(1) for _ in range(4)], {}
    for handed in (False, True):
        with apply_spectrum(toy := FaultyToy(), SpectrumConfig.paper(), 20) as run:
            call = lambda i: toy(torch.ones(2, 4), float(i))
            got = [pools[k].submit(call, i).result() if handed else call(i) for i, k in enumerate(threads)]
        out[handed] = torch.stack(got), run.stats
    for p in pools: p.shutdown()

    (got, stats), (want, want_stats) = out[True], out[False]
    assert torch.equal(got, want)
    assert stats == want_stats


def test_two_pipelines_in_turns_on_one_denoiser_mix_nothing():
    # each run drops what was kept of the other: nothing is saved, and nothing is wrong
    toy, config = FaultyToy(), SpectrumConfig.paper(blend=0)
    handle = apply_spectrum(toy, config, 20)
    pipes = [fake_pipeline() for _ in range(2)]
    clocks = [PipelineClock(p, toy) for p in pipes]
    for p in pipes: p.scheduler.start(20, 0, 1)

    def step(k, i):
        handle.hooks[0].clock = clocks[k]                      # what `calling_pipeline` finds out
        out = toy(torch.full((2,), float(k)), float(i))
        pipes[k].scheduler.step(i, 0)
        return out

    for i in range(20):
        for k, out in enumerate((step(0, i), in_thread(lambda: step(1, i)))):
            assert torch.allclose(out, torch.full((2,), 2*(k + 3.*i)))


def test_a_thread_that_was_refused_once_is_refused_again():
    toy, pipe = FaultyToy(), fake_pipeline()
    handle = apply_spectrum(toy, SpectrumConfig.paper(), 20)
    pipe.scheduler.start(20, 0, 1)
    handle.hooks[0].clock = PipelineClock(pipe, toy)
    toy(torch.ones(2), 0.)
    pipe.scheduler.step(0, 0)
    answers = []

    def intrude(*_): answers.extend(in_thread(lambda: toy(torch.ones(2), 1.)) for _ in range(3))

    watch = toy.embed.register_forward_hook(intrude)
    toy(torch.ones(2), 1.)
    watch.remove()

    contexts = list(handle.hooks[0].runs)
    assert len(answers) == 3 and all(isinstance(a, RuntimeError) for a in answers), answers
    assert contexts == ['']


# Leaks

def objects_of_ours():
    "How many objects of the engine there are"
    kinds = SpectrumHandle, SpectrumHook, Run, RunStats, History, Plan
    return sum(isinstance(o, kinds) for o in gc.get_objects())


def test_a_thousand_short_runs_leave_nothing():
    toy, config, watched = FaultyToy(), SpectrumConfig.paper(warmup=2), []
    untouched = state_of(toy)

    def short_run(i):
        "Whole or cut short, with a fault now and then at any site, of either feature"
        feature = 'output' if i % 5 == 4 else 'hidden'
        faulty, error = i % 4 == 0, KeyboardInterrupt if i % 8 == 0 else Bang
        with (contextlib.suppress(Bang, KeyboardInterrupt),
              apply_spectrum(toy, config, 6, feature=feature) as handle):
            if i % 50 == 0: watched.append(weakref.ref(handle))
            for k in range(6 if i % 3 else 5):
                if faulty and k == 4: toy.site(SITES[i//4 % 6]).fuse = error()
                toy(torch.ones(2, 64), float(k))
        for s in SITES: toy.site(s).fuse = None

    for i in range(200): short_run(i)
    gc.collect()
    counts, before, objects = objects_of_ours(), resident(), len(gc.get_objects())
    for i in range(1000): short_run(i)
    gc.collect()

    assert objects_of_ours() == counts
    assert state_of(toy) == untouched
    assert not any(handle() for handle in watched)
    assert resident() - before < 2_000_000
    assert len(gc.get_objects()) - objects < 200


def test_one_handle_for_many_runs_keeps_their_statistics_only():
    toy = FaultyToy()
    handle = apply_spectrum(toy, SpectrumConfig.paper(warmup=2), 8)

    def runs(n):
        "Of three runs one is cut short and reset"
        for i in range(n):
            for k in range(8 if i % 3 else 5): toy(torch.ones(2, 64), float(k))
            if i % 3 == 0: handle.reset()

    runs(201)
    handle.stats.clear()
    gc.collect()
    counts, before = objects_of_ours(), resident()
    runs(999 if NIGHTLY else 300)
    gc.collect()

    finished = 666 if NIGHTLY else 200
    assert objects_of_ours() - counts == len(handle.stats) == finished
    assert resident() - before < 4_000_000
    handle.stats.clear()
    gc.collect()
    assert objects_of_ours() == counts
    handle.remove()


@pytest.mark.parametrize('feature', ['hidden', 'output'])
def test_a_deep_copy_under_spectrum_is_a_copy_or_is_refused_in_words(feature):
    toy = FaultyToy()
    handle = apply_spectrum(toy, SpectrumConfig.paper(), 20, feature=feature)
    try: twin = copy.deepcopy(toy)
    except Exception as e:
        assert 'Spectrum' in str(e)
        return
    twin(torch.ones(2), 0.)
    assert (toy.passes, twin.passes) == (0, 1), 'the copy ran the blocks of the original'


def test_saved_under_spectrum_is_saved_as_without(two_pipes, tmp_path):
    pipe = two_pipes[0]
    keys = list(pipe.transformer.state_dict())

    def save(name):
        pipe.transformer.save_pretrained(tmp_path/name/'transformer')
        pipe.save_pretrained(tmp_path/name/'pipeline')

    save('plain')
    with apply_spectrum(pipe, SpectrumConfig.paper()):
        assert list(pipe.transformer.state_dict()) == keys
        save('applied')

    def saved(name):
        folder = tmp_path/name
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

    assert saved('plain') == saved('applied')
