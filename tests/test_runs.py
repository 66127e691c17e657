"`spectrum-nb run` as its users meet it: several processes, a killed one, Ctrl-C, and the folders it leaves"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name('spectrum-nb')
ONE_THREAD = os.environ | dict(OMP_NUM_THREADS='1')     # sums of one process and of two are then made in the same order
PROMPTS = [
    'a large red circle at the centre on a blue background', '# a comment', '', 'a/b: ../c',
    'a small green cross at the left on a white background', '🦊'
]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path/'prompts.txt').write_text('\n'.join(PROMPTS), encoding='utf-8')
    return tmp_path


def words(*extra): return [str(COMMAND), 'run', '--prompts', 'prompts.txt', '--steps', '9', '--seeds', '2', *extra]
def launched(n, *extra):
    return [
        str(Path(sys.executable).with_name('accelerate')), 'launch', '--cpu', '--num_processes',
        str(n), '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', *words(*extra)
    ]
def call(argv, cwd): return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300, env=ONE_THREAD)
def pictures(folder): return {p.name: p.read_bytes() for p in Path(folder).glob('*.png')}
def notes(folder):
    return {
        p.name: {k: v for k, v in json.loads(p.read_text()).items() if k != 'seconds'}
        for p in Path(folder).glob('*-s?.json')
    }


@pytest.mark.slow
def test_two_processes_make_what_one_makes(prompts):
    one = call(words('--name', 'one', '--baseline'), prompts)
    assert one.returncode == 0, one.stderr
    two = call(launched(2, '--name', 'two', '--baseline'), prompts)
    assert two.returncode == 0, two.stderr
    runs = prompts/'spectrum_runs'
    assert len(pictures(runs/'one')) == 8 and len(notes(runs/'one')) == 8
    for part in ('', 'full'):
        assert pictures(runs/'one'/part) == pictures(runs/'two'/part) and notes(runs/'one'/part).keys() == notes(
            runs/'two'/part).keys()
    # the summary is written once
    assert one.stdout.replace('/one', '/two').split('seconds')[0] == two.stdout.split('seconds')[0]
    assert (runs/'two'/'contact-sheet.jpg').stat().st_size > 10_000 and json.loads(
        (runs/'two'/'summary.json').read_text())['samples'] == 8
    compared = call([str(COMMAND), 'compare', '--help'], prompts)
    assert compared.returncode == 0
    compared = call([str(COMMAND), 'compare', 'spectrum_runs/one', 'spectrum_runs/two'], prompts)
    assert compared.returncode == 0 and json.loads(
        (prompts/'comparison/comparison.json').read_text())['relative_l2'] == 0, compared.stderr


@pytest.mark.slow
def test_what_a_killed_process_left_is_made_by_a_rerun(prompts):
    running = subprocess.Popen(launched(2, '--name', 'killed', '--steps', '60'), cwd=prompts, env=ONE_THREAD,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    folder = prompts/'spectrum_runs/killed'
    deadline = time.time() + 120
    while len(notes(folder)) < 2 and time.time() < deadline: time.sleep(.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert 2 <= len(notes(folder)) < 8
    again = call(words('--name', 'killed', '--steps', '60'), prompts)       # with another number of processes
    assert again.returncode == 0, again.stderr
    alone = call(words('--name', 'alone', '--steps', '60'), prompts)
    assert alone.returncode == 0 and pictures(folder) == pictures(prompts/'spectrum_runs/alone')
    assert not list(folder.glob('.part-*'))


@pytest.mark.slow
def test_ctrl_c_leaves_a_folder_that_can_be_resumed(prompts):
    # a shell's background jobs, and so their children, ignore Ctrl-C
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(words('--steps', '60'), cwd=prompts, env=ONE_THREAD, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=listens)
    folder = prompts/'spectrum_runs/run'
    deadline = time.time() + 120
    while len(notes(folder)) < 1 and time.time() < deadline: time.sleep(.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and 'interrupted' in err and 1 <= len(notes(folder)) < 8
    assert call(words('--steps', '60'), prompts).returncode == 0 and len(notes(folder)) == 8
    other = call(words('--steps', '61'), prompts)
    assert other.returncode == 2 and 'steps was 60, now 61' in other.stderr


@pytest.mark.parametrize('args, says', [
    ([], 'which prompts'),
    (['--prompts', 'nothing.txt'], 'nothing.txt'),
    (['--prompts', 'prompts.txt', '--limit', '0'], 'limit must be'),
    (['--prompts', 'prompts.txt', '--name', '../elsewhere'], 'one folder'),
    (['--prompts', 'prompts.txt', '--alpha', '-1'], 'alpha must be'),
])
def test_bad_input_is_answered_in_words(args, says, prompts, monkeypatch, capsys):
    from spectrum_nb.cli import main
    monkeypatch.chdir(prompts)
    assert main(['run', *args]) == 2 and says in capsys.readouterr().err
    assert sorted(p.name for p in prompts.iterdir()) == ['prompts.txt']
