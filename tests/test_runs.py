"`spectrum-nb run` as its users meet it: several processes, a killed one, Ctrl-C, and the folders it leaves"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spectrum_nb.cli import main

COMMAND = Path(sys.executable).with_name('spectrum-nb')
ONE_THREAD = os.environ | dict(OMP_NUM_THREADS='1')     # sums of one process and of two are then made in the same order
PROMPTS = [
    'a large red circle at the centre on a blue background',
    '# a comment',
    '',
    'a/b: ../c',
    'a small green cross at the left on a white background',
    '🦊',
]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path/'prompts.txt').write_text('\n'.join(PROMPTS), encoding='utf-8')
    return tmp_path


def words(*extra):
    "The command line of a run of the four prompts, twice each"
    return [str(COMMAND), 'run', '--prompts', 'prompts.txt', '--steps', '9', '--seeds', '2', *extra]


def launched(n, *extra):
    "The same, by so many processes"
    accelerate = str(Path(sys.executable).with_name('accelerate'))
    settings = f'--cpu --num_processes {n} --num_machines 1 --mixed_precision no --dynamo_backend no'
    return [accelerate, 'launch', *settings.split(), *words(*extra)]


def call(argv, cwd): return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300, env=ONE_THREAD)


def pictures(folder): return {p.name: p.read_bytes() for p in Path(folder).glob('*.png')}


def notes(folder):
    "{file: the note of a sample}, but for the seconds that it took"
    def note(file): return {k: v for k, v in json.loads(file.read_text()).items() if k != 'seconds'}

    return {file.name: note(file) for file in Path(folder).glob('*-s?.json')}


def wait_for_notes(folder, n):
    "Until so many samples are finished, two minutes at most"
    deadline = time.time() + 120
    while len(notes(folder)) < n and time.time() < deadline: time.sleep(.05)


@pytest.mark.slow
def test_two_processes_make_what_one_makes(prompts):
    one = call(words('--name', 'one', '--baseline'), prompts)
    assert one.returncode == 0, one.stderr
    two = call(launched(2, '--name', 'two', '--baseline'), prompts)
    assert two.returncode == 0, two.stderr

    by_one, by_two = prompts/'spectrum_runs/one', prompts/'spectrum_runs/two'
    assert len(pictures(by_one)) == len(notes(by_one)) == 8
    for part in ('', 'full'):
        assert pictures(by_one/part) == pictures(by_two/part)
        assert notes(by_one/part).keys() == notes(by_two/part).keys()
    # the summary is written once
    assert one.stdout.replace('/one', '/two').split('seconds')[0] == two.stdout.split('seconds')[0]
    assert (by_two/'contact-sheet.jpg').stat().st_size > 10_000
    assert json.loads((by_two/'summary.json').read_text())['samples'] == 8

    asked = call([str(COMMAND), 'compare', '--help'], prompts)
    assert asked.returncode == 0
    compared = call([str(COMMAND), 'compare', 'spectrum_runs/one', 'spectrum_runs/two'], prompts)
    assert compared.returncode == 0, compared.stderr
    assert json.loads((prompts/'comparison/comparison.json').read_text())['relative_l2'] == 0


@pytest.mark.slow
def test_what_a_killed_process_left_is_made_by_a_rerun(prompts):
    running = subprocess.Popen(launched(2, '--name', 'killed', '--steps', '60'), cwd=prompts, env=ONE_THREAD,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    folder = prompts/'spectrum_runs/killed'
    wait_for_notes(folder, 2)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert 2 <= len(notes(folder)) < 8

    again = call(words('--name', 'killed', '--steps', '60'), prompts)       # with another number of processes
    assert again.returncode == 0, again.stderr
    alone = call(words('--name', 'alone', '--steps', '60'), prompts)
    assert alone.returncode == 0
    assert pictures(folder) == pictures(prompts/'spectrum_runs/alone')
    assert not list(folder.glob('.part-*'))


@pytest.mark.slow
def test_ctrl_c_leaves_a_folder_that_can_be_resumed(prompts):
    # a shell's background jobs, and so their children, ignore Ctrl-C
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(words('--steps', '60'), cwd=prompts, env=ONE_THREAD, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=listens)
    folder = prompts/'spectrum_runs/run'
    wait_for_notes(folder, 1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert 'interrupted' in err
    assert 1 <= len(notes(folder)) < 8

    again = call(words('--steps', '60'), prompts)
    assert again.returncode == 0
    assert len(notes(folder)) == 8
    other = call(words('--steps', '61'), prompts)
    assert other.returncode == 2
    assert 'steps was 60, now 61' in other.stderr


@pytest.mark.parametrize('args, says', [
    ([], 'which prompts'),
    (['--prompts', 'nothing.txt'], 'nothing.txt'),
    (['--prompts', 'prompts.txt', '--limit', '0'], 'limit must be'),
    (['--prompts', 'prompts.txt', '--name', '../elsewhere'], 'one folder'),
    (['--prompts', 'prompts.txt', '--alpha', '-1'], 'alpha must be'),
])
def test_bad_input_is_answered_in_words(args, says, prompts, monkeypatch, capsys):
    monkeypatch.chdir(prompts)
    assert main(['run', *args]) == 2
    assert says in capsys.readouterr().err
    assert sorted(p.name for p in prompts.iterdir()) == ['prompts.txt']
