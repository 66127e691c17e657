"Folders of models that are damaged, foreign or hostile: refused in one line, and nothing in them is executed"
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import spectrum_nb

from commands import assert_refused, run_command

pytestmark = pytest.mark.filterwarnings('ignore')
WEIGHTS = Path(spectrum_nb.__file__).parent/'weights'

# Files of models

@pytest.fixture
def model(tmp_path):
    shutil.copytree(WEIGHTS/'tiny-flux', tmp_path/'mine')
    return tmp_path


def sample_with(folder, *more):
    "One step with the model of the folder, as `x.png`"
    words = '--prompt', 'a red circle', '--model', './mine', '--steps', '1', '--out', 'x.png'
    return run_command(folder, 'sample', *words, *more)


def truncated(p): p.write_bytes(p.read_bytes()[:-100])
def emptied(p): p.write_bytes(b'')
def foreign(p): p.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n')
def long_header(p): p.write_bytes((2**60).to_bytes(8, 'little') + p.read_bytes()[8:])
def gone(p): p.unlink()
def not_utf8(p): p.write_bytes(b'{"model": "\xff"}')


TRANSFORMER = 'transformer/diffusion_pytorch_model.safetensors'
TEXT = 'text_encoder/model.safetensors'
INDEX = 'model_index.json'
CONFIGS = INDEX, 'transformer/config.json', 'scheduler/scheduler_config.json', 'tokenizer/tokenizer.json'
HARMED = [(file, harm) for file in (TRANSFORMER, TEXT) for harm in (truncated, emptied, foreign, long_header, gone)]
HARMED += [(file, harm) for file in CONFIGS for harm in (truncated, emptied, not_utf8)]


@pytest.mark.parametrize('file, harm', HARMED)
def test_a_damaged_model_is_refused(file, harm, model):
    harm(model/'mine'/file)
    assert_refused(sample_with(model), 'mine')


class Evil:
    "Makes a folder when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return (os.mkdir, (self.path,))


@pytest.mark.parametrize('part, name', [
    ('transformer', 'diffusion_pytorch_model'),
    ('text_encoder', 'pytorch_model'),
    ('vae', 'diffusion_pytorch_model'),
])
@pytest.mark.parametrize('zipped', [False, True])
def test_a_pickle_is_never_executed(part, name, zipped, model):
    folder, owned = model/'mine'/part, model/'mine'/'owned'
    next(folder.glob('*.safetensors')).unlink()
    evil = Evil(str(owned))
    if zipped: torch.save(evil, folder/f'{name}.bin')
    else: (folder/f'{name}.bin').write_bytes(pickle.dumps(evil))

    status, err, new = sample_with(model)

    assert status == 2 and not new and not owned.exists()
    pickle.loads(pickle.dumps(evil))
    assert owned.exists()                      # it would have


@pytest.mark.parametrize('part, name', [('transformer', 'diffusion_pytorch_model'), ('text_encoder', 'pytorch_model')])
def test_weights_in_a_pickle_are_refused(part, name, model):
    from safetensors.torch import load_file
    file = next((model/'mine'/part).glob('*.safetensors'))
    torch.save(load_file(file), file.with_name(f'{name}.bin'))
    file.unlink()
    assert sample_with(model)[0] == 2


def test_code_in_a_model_folder_is_not_run(model):
    owned = model/'mine/owned'
    (model/'mine/evil.py').write_text(f'import os; os.mkdir({str(owned)!r})\nclass Evil: pass\n')
    index = json.loads((model/'mine'/INDEX).read_text())
    for changed in (index | dict(_class_name=['evil', 'Evil']), index | dict(transformer=['evil', 'Evil'])):
        (model/'mine'/INDEX).write_text(json.dumps(changed))
        status, err, new = sample_with(model)
        assert status == 2 and not owned.exists()


@pytest.mark.parametrize('notes', [b'[]', b'"tiny-flux"', b'', b'{"model": ', b'{"model": "\xff"}', b'{"model": []}'])
def test_a_damaged_training_json_is_refused(notes, model):
    (model/'mine/training.json').write_bytes(notes)
    assert_refused(sample_with(model), 'training.json')


@pytest.mark.parametrize('notes', [b'{}', b'{"model": null}', b'{"model": 7}', b'{"model": "tiny-unknown"}'])
def test_a_foreign_training_json_is_passed_over(notes, model):
    (model/'mine/training.json').write_bytes(notes)
    status, err, new = sample_with(model)
    assert status == 0 and {p.name for p in new} == {'x.png', 'x.json'}, err
