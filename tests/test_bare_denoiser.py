"A denoiser without a pipeline, whose steps are told by the times of its calls: cancelled runs, repeated times, turns"
import numpy as np
import pytest
import torch

from spectrum_nb.apply import apply_spectrum

from toys import N, PAPER, PASSES, Toy, answers_right, loop

pytestmark = pytest.mark.filterwarnings('ignore')

# A bare denoiser

def assert_right(toy, k, t):
    "A call of branch k, which has a sample of its own, is answered rightly"
    x = 10.*k
    assert answers_right([toy(torch.full((2, 4), x), float(t))], [t], x)


@pytest.mark.parametrize('at', range(1, N))
@pytest.mark.parametrize('down', [True, False])
def test_a_cancelled_run_leaves_no_trace_in_the_next(at, down):
    times = [1000 - 10*i for i in range(N)] if down else [.05*i for i in range(N)]
    with apply_spectrum(toy := Toy(), PAPER, N) as run:
        loop(toy, times[:at], torch.full((2, 4), 50.))
        next_runs = loop(toy, times), loop(toy, times)

    assert all(answers_right(got, times) for got in next_runs)
    assert [s.passes for s in run.stats][-1] == PASSES
    assert at == 1 or not run.stats[-2].fallbacks


def test_runs_of_other_lengths_and_samplers_in_turn_need_no_reset():
    long, short, twice = [*range(1000, 0, -50)], [*range(600, 0, -50)], [*range(1000, 0, -25)]
    with apply_spectrum(toy := Toy(), PAPER, N) as run:
        for times in (long, short, twice, long, [*np.linspace(80, .1, N)], long):
            assert answers_right(loop(toy, times), times), times
    assert [s.n_steps for s in run.stats] == [N]*5
    assert run.stats[-1].passes == PASSES


@pytest.mark.parametrize('calls', [2, 5])
def test_a_repeated_time_is_a_second_call_of_the_step(calls):
    with apply_spectrum(toy := Toy(), PAPER, N) as run:
        for t in range(N):
            for k in range(calls): assert_right(toy, k, t)

    contexts = ['', *(f'#{k + 1}' for k in range(1, calls))]
    assert [(s.context, s.passes) for s in run.stats] == [(context, PASSES) for context in contexts]
    assert toy.passes == calls*len(PASSES)


def test_a_time_that_never_moves_is_said():
    said = "70 calls carried the same time .'timestep'."
    with pytest.warns(UserWarning, match=said), apply_spectrum(toy := Toy(), PAPER, N):
        for _ in range(80): assert answers_right([toy(torch.ones(2, 4), 1.)], [1.])


def test_guidance_that_begins_late_has_a_history_of_its_own():
    with apply_spectrum(toy := Toy(), PAPER, N):
        for t in range(N):
            for k in range(2 if t > 7 else 1): assert_right(toy, k, t)


def test_two_runs_in_turn_in_one_thread_do_not_mix():
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with apply_spectrum(toy := Toy(), PAPER, N):
        seen = {0: 0, 1: 0}
        for k in [0]*6 + [1]*3 + [0]*4 + [1]*8 + [0]*10 + [1]*9:
            t = seen[k]
            seen[k] += 1
            assert torch.allclose(toy(x[k], float(t)), 2*(x[k] + 3*t), atol=1e-3), (k, t)


def test_times_of_frames_of_their_own_are_one_time():
    with apply_spectrum(toy := Toy(), PAPER, N) as run:
        for i in range(N):
            times_of_frames = torch.tensor([[1000. - 60*i + 100*frame for frame in range(4)]])
            toy(torch.ones(1, 4), torch.clamp(times_of_frames, 0, 1000))
    assert [s.n_steps for s in run.stats] == [N]
