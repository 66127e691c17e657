"Gradients through a denoiser under Spectrum: right at a pass, refused at a forecast, free where none are asked"
import pytest
import torch

from spectrum_nb.apply import apply_spectrum

from pipelines import random_denoiser
from toys import N, PAPER, PASSES

pytestmark = pytest.mark.filterwarnings('ignore')

# Gradients

def answers_of(model, call, **more):
    "What a random FLUX denoiser answers at the N steps of a run"
    return [model(**call | more | dict(timestep=torch.tensor([1 - i/N])))[0] for i in range(N)]


@pytest.mark.parametrize('feature', ['hidden', 'output'])
@pytest.mark.parametrize('of', ['sample', 'weights'])
def test_a_gradient_through_a_forecast_is_refused_when_it_is_asked_for(feature, of):
    model, call = random_denoiser('FluxTransformer2DModel')
    model.requires_grad_(of == 'weights')
    x = call['hidden_states'].clone().requires_grad_(of == 'sample')
    with apply_spectrum(model, PAPER, N, feature=feature) as run: outs = answers_of(model, call, hidden_states=x)
    at_a_pass, at_a_forecast = outs[PASSES[-1]], outs[PASSES[-1] - 1]

    assert all(out.requires_grad for out in outs)
    assert [s.passes for s in run.stats] == [PASSES]
    at_a_pass.sum().backward()
    with pytest.raises(RuntimeError, match='a gradient was asked of a forecast'): at_a_forecast.sum().backward()


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_asked(mode, monkeypatch):
    monkeypatch.setattr('spectrum_nb.execute.with_gradient', None)
    model, call = random_denoiser('FluxTransformer2DModel')
    with mode(), apply_spectrum(model, PAPER, N): outs = answers_of(model, call)
    assert not any(out.requires_grad for out in outs)


def test_somebody_who_records_gradients_and_asks_for_none_is_not_disturbed():
    model, call = random_denoiser('FluxTransformer2DModel')
    with torch.no_grad(), apply_spectrum(model, PAPER, N): want = answers_of(model, call)
    with apply_spectrum(model, PAPER, N): got = answers_of(model, call)
    assert all(torch.equal(a.detach(), b) for a, b in zip(got, want))
