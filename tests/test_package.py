"The package as others get it: what import loads, what the notebooks export, what the wheel holds."
import json, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

cfg = get_config()
notebooks = sorted(nbglob(cfg.nbs_path, as_path=True))
models = cfg.lib_path/'models'


def run(*args, cwd=None):
    "Run a command as a user would, from a folder that is not the project's."
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PYTHONPATH')}
    return subprocess.run([str(o) for o in args], cwd=cwd, env=env, capture_output=True, text=True)


def python(*args, cwd=None):
    res = run(sys.executable, *args, cwd=cwd)
    assert res.returncode == 0, res.stdout + res.stderr
    return res


def loaded(importtime): return {line.rsplit('|', 1)[-1].strip() for line in importtime.splitlines()}


@pytest.fixture
def copy(project, tmp_path):
    "The project's sources in a folder of their own."
    files = [*project.glob('*.ini'), *project.glob('*.py'), *project.glob('*.md'), *project.glob('*.in'), project/'LICENSE']
    for o in files: shutil.copy(o, tmp_path)
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_*.yml', 'nbdev.yml')
    for o in cfg.lib_path, cfg.nbs_path: shutil.copytree(o, tmp_path/o.name, ignore=ignore)
    return tmp_path


def texts(folder, pattern): return {o.relative_to(folder).as_posix(): o.read_text() for o in folder.rglob(pattern)}


def test_import_loads_nothing_heavy(tmp_path):
    names = loaded(python('-X', 'importtime', '-c', 'import blipbooth, blipbooth.core', cwd=tmp_path).stderr)
    assert 'blipbooth.core' in names
    assert not names & {'torch', 'transformers', 'diffusers', 'numpy', 'matplotlib'}


def test_help_loads_no_torch(tmp_path):
    command = Path(sys.executable).with_name('blipbooth')
    res = python('-X', 'importtime', command, '--help', cwd=tmp_path)
    assert 'caption' in res.stdout
    assert not loaded(res.stderr) & {'torch', 'transformers', 'diffusers'}


def test_all_passes_on_every_name(tmp_path):
    code = 'from blipbooth.all import *; print(load_images, Photo, BoothError, sep="\\n")'
    assert 'blipbooth.core.BoothError' in python('-c', code, cwd=tmp_path).stdout


def test_notebooks_and_modules_are_in_sync(copy):
    before = texts(copy/'blipbooth', '*.py'), texts(copy/'nbs', '*.ipynb')
    for o in ('blipbooth/core.py', 'blipbooth/_modidx.py'): (copy/o).unlink()
    for command in 'nbdev_export', 'nbdev_clean':
        res = run(Path(sys.executable).with_name(command), cwd=copy)
        assert res.returncode == 0, res.stderr
    after = texts(copy/'blipbooth', '*.py'), texts(copy/'nbs', '*.ipynb')
    for a, b in zip(before, after):
        assert a.keys() == b.keys()
        assert not [o for o in a if a[o] != b[o]], 'run nbdev_export and nbdev_clean'


def test_readme_is_the_rendered_index(project): python(project/'.ci'/'readme.py', '--check')


def visible(nb):
    "A notebook's text and its outputs, without pictures."
    for cell in nb['cells']:
        yield ''.join(cell['source'])
        for out in cell.get('outputs', []):
            data = {k: v for k, v in out.get('data', {}).items() if not k.startswith('image/')}
            yield json.dumps({**out, 'data': data})


@pytest.mark.parametrize('path', notebooks, ids=lambda o: o.stem)
def test_notebook_is_fit_to_be_read(path):
    text = '\n'.join(visible(json.loads(path.read_text())))
    machine = re.search(r'(?<![\w.:/-])/(root|home|work|tmp|Users|mnt|opt|workspace|content)/\w+', text)
    assert not machine, f'{path.name} holds a path of one machine: {machine[0]}'
    assert '"output_type": "error"' not in text
    assert not re.search(r'\d+%\|', text), f'{path.name} holds a progress bar'
    assert path.stat().st_size < 1_000_000


def test_models_are_small_and_safe():
    files = [o for o in models.rglob('*') if o.is_file()]
    assert {o.name for o in models.iterdir()} >= {'captioner', 'matcher', 'diffusion'}
    assert sum(o.stat().st_size for o in files) < 60e6
    assert not [o.name for o in files if o.suffix in ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle')]


def test_sdist_and_wheel_hold_everything(copy, tmp_path):
    for o in copy.rglob('*.safetensors'): o.write_bytes(b'')  # packing the weights takes long and shows nothing
    python('-m', 'build', '--no-isolation', copy, cwd=tmp_path)  # the wheel is built from the sdist
    wheel = zipfile.ZipFile(next((copy/'dist').glob('*.whl')))
    held = set(wheel.namelist())
    files = [o for o in (copy/'blipbooth').rglob('*') if o.is_file() and '__pycache__' not in o.parts]
    assert not {o.relative_to(copy).as_posix() for o in files} - held
    points = wheel.read(next(o for o in held if o.endswith('entry_points.txt'))).decode()
    assert 'blipbooth = blipbooth.cli:main' in points and 'blipbooth = blipbooth._modidx:d' in points
    assert any(o.endswith('LICENSE') for o in held)


def test_constraints_pin_every_package(project):
    lines = [o for o in (project/'constraints.txt').read_text().splitlines() if o and o[0] != '#']
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+', o) for o in lines)
    names = {re.sub(r'[-_.]+', '-', o.split('==')[0]).lower() for o in lines}
    wanted = {re.split(r'[<>=]', o)[0].lower() for o in (cfg.requirements + ' ' + cfg.dev_requirements).split()}
    assert not wanted - names
    assert not {o for o in names if o.startswith('nvidia') or o == 'torchvision'}
