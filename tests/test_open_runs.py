"Whether a run is open shows after its first pass: what is measured, what is followed, and who is not asked"
import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from spectrum_nb.apply import apply_spectrum
from spectrum_nb.cli import main
from spectrum_nb.lab.captions import held_captions
from spectrum_nb.openness import FirstLook
from spectrum_nb.plan import make_plan, reuse_plan
from spectrum_nb.scheduler_facts import kept_of
from spectrum_nb.settings import SpectrumConfig
from spectrum_nb.shipped import calibration_file, shipped_calibrations

from pipelines import latents, picture, tiny_pipeline
from toys import Toy, loop

N, CONFIG = 20, SpectrumConfig(n_passes=8)
# with the empty prompt errors grow; the caption fixes the picture
OPEN, FIXED = '', 'a red circle'
# guidance that was distilled, in one batch, and by two calls, with a multistep sampler
MODELS = ('tiny-flux', 'tiny-sd3', 'tiny-wan')


def first_prediction(pipe, draw):
    "What the first step of a flow's sampler predicts of the clean sample, worked out from its velocity"
    seen, step = [], pipe.scheduler.step

    def watch(output, timestep, sample, *args, **kwargs):
        if not seen: seen.append(sample.float() - pipe.scheduler.sigmas[0]*output.float())
        return step(output, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = watch
    try: draw()
    finally: del pipe.scheduler.step
    return seen[0]


def levels_of(pipe): return tuple(pipe.scheduler.sigmas[:N + 1].tolist())


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('is_open', [True, False])
def test_the_first_prediction_decides_which_of_two_plans_is_followed(name, is_open):
    pipe, call = tiny_pipeline(name)
    prompt = OPEN if is_open else held_captions(call, 1)[0]
    with apply_spectrum(pipe, CONFIG) as run: got = latents(pipe, call, N, prompt=prompt)
    predicted = first_prediction(pipe, lambda: latents(pipe, call, N, prompt=prompt))
    energy = predicted.square().mean().item()

    config = CONFIG.when_open() if is_open else SpectrumConfig(n_passes=8, faint=0)
    plan = make_plan(config, N, levels_of(pipe))
    for stats in run.stats:
        assert stats.energy == pytest.approx(energy, rel=1e-3)
        assert stats.open == (energy < CONFIG.faint) == is_open
        assert (stats.passes, stats.fallbacks) == (plan.passes, {})
    with apply_spectrum(pipe, plan): want = latents(pipe, call, N, prompt=prompt)
    assert torch.equal(got, want)
    assert ('taken for open' in str(run.report())) == is_open


def test_a_batch_has_one_answer_the_geometric_mean_of_its_images():
    pipe, call = tiny_pipeline('tiny-flux')

    def energy_of(prompts):
        with apply_spectrum(pipe, CONFIG) as run:
            noise = [torch.Generator().manual_seed(3 + i) for i in range(len(prompts))]
            pipe(prompts, num_inference_steps=N, generator=noise, output_type='latent', **call)
        return run.stats[0].energy

    both = energy_of([OPEN, FIXED])
    with apply_spectrum(pipe, CONFIG) as run:
        latents(pipe, call, N, seed=3, prompt=OPEN)
        latents(pipe, call, N, seed=4, prompt=FIXED)
    assert both == pytest.approx(np.sqrt(np.prod([s.energy for s in run.stats])), rel=1e-4)


def test_a_run_that_begins_with_a_picture_is_not_asked():
    pipe, call = tiny_pipeline('tiny-flux')
    pipe = diffusers.FluxImg2ImgPipeline(**{k: v for k, v in pipe.components.items() if k in (
        'scheduler', 'vae', 'text_encoder', 'tokenizer', 'text_encoder_2', 'tokenizer_2', 'transformer')})
    pipe.set_progress_bar_config(disable=True)
    with apply_spectrum(pipe, CONFIG) as run:
        pipe(OPEN, image=picture(call['height']), strength=.5, num_inference_steps=2*N, output_type='latent', **call)
    assert (run.stats[0].energy, run.stats[0].open) == (None, False)


def test_neither_is_one_whose_sampler_tells_no_noise_levels():
    toy = Toy()
    with apply_spectrum(toy, CONFIG, n_steps=N) as run: loop(toy, range(N))
    assert (run.stats[0].energy, run.stats[0].passes) == (None, make_plan(CONFIG, N).passes)


def test_two_plans_of_ones_own_are_joined_and_a_threshold_of_zero_asks_nobody():
    pipe, call = tiny_pipeline('tiny-flux')
    late, early = reuse_plan([0, 9, 15], N), reuse_plan([0, 1, 2], N)
    taken = []
    for faint in (0, 1e6):
        with apply_spectrum(pipe, late.or_open(early, faint)) as run: latents(pipe, call, N, prompt=OPEN)
        taken.append(run.stats[0].passes)
    assert taken == [late.passes, early.passes]


def test_the_other_plan_finds_what_pass_0_left_even_if_the_first_plan_would_have_dropped_it():
    pipe, call = tiny_pipeline('tiny-flux')
    every, few = SpectrumConfig(speedup=1), reuse_plan([0, 5], N)
    with apply_spectrum(pipe, make_plan(every, N).or_open(few)) as run: latents(pipe, call, N, prompt=OPEN)
    assert (run.stats[0].passes, run.stats[0].fallbacks) == (few.passes, {})


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_sixteen_bits_do_not_make_a_faint_prediction_bright(dtype):
    pipe, call = tiny_pipeline('tiny-hunyuan')           # its first step takes off 0.3 % of the noise
    energies = []
    for kind in (torch.float32, dtype):
        pipe.to(dtype=kind)
        with apply_spectrum(pipe, CONFIG) as run:
            noise = torch.Generator().manual_seed(3)
            pipe(OPEN, num_inference_steps=50, generator=noise, output_type='latent', **call)
        energies.append(run.stats[0].energy)
    pipe.to(dtype=torch.float32)
    assert abs(energies[1] - energies[0]) < .4


def test_what_a_flow_sampler_keeps_of_noise_is_no_velocity():
    x0, noise = torch.randn(2, 3, 4, 64, generator=torch.Generator().manual_seed(0))
    scheduler = diffusers.DEISMultistepScheduler(use_flow_sigmas=True, prediction_type='flow_prediction', flow_shift=3.)
    scheduler.set_timesteps(N)
    x, look, levels = noise.clone(), FirstLook(), scheduler.sigmas.tolist()
    for i, t in enumerate(scheduler.timesteps[:2]):
        look.see(i, x, levels, True, kept_of(scheduler) if i else None)
        x = scheduler.step(noise - x0, t, x).prev_sample
    assert look.energy == pytest.approx(x0.square().flatten(1).mean(1).log().mean().exp().item(), rel=.02)


def test_both_calls_of_a_second_order_sampler_take_their_own_levels():
    pipe, call = tiny_pipeline('tiny-sd3')
    own, pipe.scheduler = pipe.scheduler, diffusers.FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    try:
        for prompt in (OPEN, held_captions(call, 1)[0]):
            with apply_spectrum(pipe, CONFIG) as run: latents(pipe, call, N, prompt=prompt)
            first, second = (s.energy for s in run.stats)
            assert second == pytest.approx(first, rel=.5)
    finally: pipe.scheduler = own


def test_an_open_run_that_begins_anew_goes_on_as_an_open_one():
    pipe, call = tiny_pipeline('tiny-flux')
    rests = []
    for config in (CONFIG, replace(CONFIG, faint=0)):
        with apply_spectrum(pipe, config) as handle:
            hook = handle.hooks[0]

            def forget(pipe, step, time, kwargs):
                if step == 5:
                    run, = hook.runs.values()
                    hook.book.begin_anew(run, 6, 6, 'a test')
                    rests.append(run.plan.passes)
                return kwargs

            pipe(OPEN, num_inference_steps=N, generator=torch.Generator().manual_seed(3), output_type='latent',
                 callback_on_step_end=forget, **call)
        assert handle.stats[0].open == bool(config.faint)
    assert rests[0] == CONFIG.when_open().share((N - 6)/N).passes(N - 6, levels_of(pipe)[6:]) != rests[1]


def test_a_file_of_prompts_is_drawn_by_two_calibrations_each_prompt_by_its_own(tmp_path, capsys):
    (tmp_path/'prompts.txt').write_text('a bird\na dove\n')
    plan = ','.join(str(calibration_file('tiny-emoji', opened=second)) for second in (False, True))
    words = ['run', '--model', 'tiny-emoji', '--prompts', str(tmp_path/'prompts.txt'), '--passes', '10', '--out',
             str(tmp_path), '--plan']
    assert main([*words, plan]) == 0

    notes = [json.loads(f.read_text()) for f in (tmp_path/'run').glob('*-s0.json')]
    passes = {note['prompt']: note['passes']['cond'] for note in notes}
    fixed, opened = (calibration.plan(10).passes for calibration in shipped_calibrations('tiny-emoji'))
    assert passes == {'a bird': list(opened), 'a dove': list(fixed)}

    assert main([*words, plan, '--faint', '1']) == 2             # other settings: another folder
    capsys.readouterr()
    assert main([*words, f'{plan},{plan}']) == 2
    assert 'is neither' in capsys.readouterr().err
