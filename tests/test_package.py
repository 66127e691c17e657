"What a user gets: the command, its answers to bad input, the wheel and the sdist"
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from spectrum_nb.cli import main
from spectrum_nb.samples import load_sample
from spectrum_nb.settings import SpectrumConfig

root = Path(__file__).parents[1]


def spectrum_nb(*args, cwd):
    "Run the installed command"
    return subprocess.run([Path(sys.executable).with_name('spectrum-nb'), *map(str, args)], cwd=cwd,
                          capture_output=True, text=True, timeout=300)


def test_sample_writes_a_picture_and_its_statistics(tmp_path):
    done = spectrum_nb('sample', '--prompt', 'a large red circle at the centre on a blue background', '--alpha', 3,
                       '--out', 'sub/picture.png', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '10 passes of 50 steps' in done.stdout
    assert Image.open(tmp_path/'sub/picture.png').size == (32, 32)
    notes = json.loads((tmp_path/'sub/picture.json').read_text())
    assert notes['runs'][0]['passes'] == [0, 1, 2, 3, 4, 6, 11, 19, 30, 44]
    assert notes['config'] == SpectrumConfig.paper(alpha=3.).as_dict()
    assert sorted(p.name for p in (tmp_path/'sub').iterdir()) == ['picture.json', 'picture.png']


@pytest.mark.parametrize('model, contexts', [('tiny-hunyuan', ['cond']), ('tiny-wan', ['cond', 'uncond'])])
def test_sample_writes_a_clip_its_poster_and_its_statistics(model, contexts, tmp_path):
    done = spectrum_nb('sample', '--prompt', 'a red circle moving left to right on a blue background', '--model', model,
                       '--steps', 12, '--out', 'clip', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ['clip.json', 'clip.mp4', 'clip.png']
    assert [r['context'] for r in json.loads((tmp_path/'clip.json').read_text())['runs']] == contexts
    assert load_sample(tmp_path/'clip.mp4').shape == (9, 32, 32, 3)


def test_a_folder_samples_like_the_preset_it_was_copied_from(tmp_path):
    shutil.copytree(root/'spectrum_nb/weights/tiny-flux', tmp_path/'mine')
    for model in ('tiny-flux', './mine'):
        done = spectrum_nb('sample', '--prompt', 'a small green cross at the left on a white background',
                           '--model', model, '--guidance', 2.5, '--steps', 8, '--out', f'{Path(model).name}.png',
                           cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path/'mine.png').read_bytes() == (tmp_path/'tiny-flux.png').read_bytes()


@pytest.mark.parametrize('args, says', [
    (['sample'], 'say it with --prompt'),
    (['sample', '--prompt', 'x', '--model', 'tiny-flex'], 'neither a preset'),
    (['sample', '--prompt', 'x', '--model', './nowhere'], 'nor a folder'),
    (['sample', '--prompt', 'x', '--steps', '0'], 'steps must be an integer >= 1'),
    (['sample', '--prompt', 'x', '--alpha', '-1'], 'alpha must be'),
    (['sample', '--prompt', 'x', '--alpha', 'nan'], 'alpha must be'),
    (['sample', '--prompt', 'x', '--window', '0.5'], 'window must be'),
    (['sample', '--prompt', 'x', '--degree', '-1'], 'degree must be'),
    (['sample', '--prompt', 'x', '--degree', '2.5'], 'invalid int'),
    (['sample', '--prompt', 'x', '--forecaster', 'blend', '--lam', '-1'], 'lam must be'),
    (['sample', '--prompt', 'x', '--forecaster', 'blend', '--lam', '0', '--warmup', '3'], 'lam=0'),
    (['sample', '--prompt', 'x', '--blend', '1.5'], 'blend must be'),
    (['draw'], "no command 'draw'"),
    (['bench', '--what', 'nothing'], 'choose forecast, loop, cost, real_size, quality, calibrated'),
])
def test_bad_input_is_answered_in_words_and_writes_nothing(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try: status = main(args)
    except SystemExit as e: status = e.code     # argparse's own answer
    said = capsys.readouterr()
    assert status == 2
    assert says in said.err and 'Traceback' not in said.err
    assert not said.out
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'build', '--outdir', out, root], check=True, capture_output=True)
    return out


def test_wheel_and_sdist_carry_the_weights(built):
    needed = {
        'plan.py',
        'weights/tiny-flux/model_index.json',
        'weights/tiny-flux/transformer/diffusion_pytorch_model.safetensors',
        'weights/tiny-sd3/model_index.json',
        'weights/tiny-sd3/text_encoder_3/model.safetensors',
        'weights/tiny-sdxl/unet/diffusion_pytorch_model.safetensors',
        'weights/tiny-hunyuan/vae/diffusion_pytorch_model.safetensors',
        'weights/tiny-wan/transformer/diffusion_pytorch_model.safetensors',
    }
    wheel = zipfile.ZipFile(next(built.glob('*.whl'))).namelist()
    sdist = tarfile.open(next(built.glob('*.tar.gz'))).getnames()
    assert {f'spectrum_nb/{n}' for n in needed} <= set(wheel)
    assert all(any(s.endswith(f'/spectrum_nb/{n}') for s in sdist) for n in needed)
    # the wheel was built from this sdist: it has all that setup.py reads
    assert any(s.endswith('/settings.ini') for s in sdist)


def test_readme_is_short_and_shows_its_figure():
    text = (root/'README.md').read_text(encoding='utf-8')
    assert len(text.encode()) <= 4096
    pictures = re.findall(r'!\[[^\]]{20,}\]\(([^)]+)\)', text)
    assert pictures and all((root/picture).stat().st_size > 10_000 for picture in pictures)
    assert (root/'nbs/results/demo.png').stat().st_size > 10_000


def test_the_links_of_the_readme_lead_to_files():
    links = re.findall(r'\]\(([^):]+)\)', (root/'README.md').read_text(encoding='utf-8'))
    gone = [link for link in links if not (root/link.split('#')[0]).exists()]
    assert len(links) > 5 and not gone


def test_the_numbers_of_the_readme_are_the_saved_ones():
    done = subprocess.run([sys.executable, root/'.ci/readme.py', '--check'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_saved_table_names_the_command_that_makes_it():
    saved = {p.name: json.loads(p.read_text(encoding='utf-8')) for p in (root/'nbs/results').glob('*.json')}
    commands = {name: s['provenance']['command'] for name, s in saved.items() if 'command' in s.get('provenance', {})}
    pages = [re.fullmatch(r'python .ci/rerun.py --slow (nbs/\w+\.ipynb)', command) for command in commands.values()]
    others = [command for command, page in zip(commands.values(), pages) if page is None]
    assert len(commands) > 10
    assert all((root/page[1]).exists() for page in pages if page)
    assert not [command for command in others if not command.startswith('spectrum-nb bench --what ')]


def test_every_module_is_generated():
    files = [p for p in (root/'spectrum_nb').rglob('*.py') if p.name != '_modidx.py' and p.stat().st_size]
    by_hand = [str(p.relative_to(root)) for p in files if 'AUTOGENERATED' not in p.read_text(encoding='utf-8')]
    assert not by_hand


def test_shipped_configs_do_not_say_where_they_were_loaded_from():
    said = [p for p in (root/'spectrum_nb/weights').rglob('*.json') if '_name_or_path' in p.read_text(encoding='utf-8')]
    assert not said


def test_importing_the_package_does_not_load_what_draws():
    said = subprocess.run([sys.executable, '-c', 'import sys, spectrum_nb; print("matplotlib.pyplot" in sys.modules)'],
                          capture_output=True, text=True, cwd=root)
    assert said.stdout.strip() == 'False', said.stderr
