"The command as a user meets it: what it does with bad input, and that it goes on after kill -9."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from blipbooth.core import read_jsonl, subject_photos

env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PYTHONPATH')}


def blipbooth(*args, cwd):
    return subprocess.run([sys.executable, '-m', 'blipbooth.cli', *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)


def photos(folder, n):
    folder.mkdir()
    for f in sorted(subject_photos('fox').glob('*.png'))[:n]: (folder/f.name).write_bytes(f.read_bytes())
    return folder


def no_photo(d): return photos(d/'p', 0), 'fox', 'photo'
def one_photo(d): return photos(d/'p', 1), 'fox', '1 photo'
def no_folder(d): return d/'nowhere', 'fox', 'nowhere'
def bad_noun(d): return photos(d/'p', 3), 'quokka', 'pieces'


def text_file(d):
    p = photos(d/'p', 3)
    (p/'zz.jpg').write_text('this is no picture')
    return p, 'fox', 'zz.jpg'


def truncated(d):
    p = photos(d/'p', 3)
    Image.open(subject_photos('fox')/'0.png').save(p/'zz.jpg')
    (p/'zz.jpg').write_bytes((p/'zz.jpg').read_bytes()[:900])
    return p, 'fox', 'zz.jpg'


def one_pixel(d):
    p = photos(d/'p', 3)
    Image.new('RGB', (1, 1)).save(p/'zz.png')
    return p, 'fox', '1×1'


@pytest.mark.parametrize('make', [no_photo, one_photo, no_folder, bad_noun, text_file, truncated, one_pixel], ids=lambda f: f.__name__)
def test_bad_input_is_one_line_and_leaves_nothing(make, tmp_path, here):
    folder, noun, said = make(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    res = here('train', f'photos={folder}', f'class_noun={noun}', f'out={tmp_path/"run"}', cwd=tmp_path)
    assert res.returncode == 2
    assert said in res.stderr and len(res.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob('*')) == before


def test_what_the_estimate_refuses_leaves_nothing(tmp_path, here):
    "Muon takes matrices alone, and all of a UNet has more than those: found out where memory is estimated, when the run folder is there."
    res = here('train', f'photos={subject_photos("fox")}', 'class_noun=fox', 'optimizer=torch.optim.Muon', f'out={tmp_path/"run"}', cwd=tmp_path)
    assert res.returncode == 2 and 'only supports 2D' in res.stderr
    assert not (tmp_path/'run').exists()


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    for args in (['train', f'photos={subject_photos("fox")}', 'class_noun=fox', f'out={tmp_path/"file"/"run"}'], ['demo', '--out', tmp_path/'file'/'run']):
        res = blipbooth(*args, cwd=tmp_path)
        assert res.returncode == 2 and len(res.stderr.strip().splitlines()) == 1, res.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def train(out, *more): return ['train', f'photos={subject_photos("fox")}', 'class_noun=fox', f'out={out}', 'steps=12', 'checkpoint.every=3', 'prior.n=2', 'prior.threshold=0', *more]


@pytest.mark.parametrize('moment', ['loss', 'checkpoint'])
def test_killed_and_resumed_is_the_run_that_was_not(moment, tmp_path):
    "kill -9 in the middle of training, then the same command with --resume: bit-equal weights and the same log."
    whole, cut = tmp_path/'whole', tmp_path/'cut'
    assert blipbooth(*train(whole), cwd=tmp_path).returncode == 0
    p = subprocess.Popen([sys.executable, '-m', 'blipbooth.cli', *map(str, train(cut))], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    log, deadline = cut/'logs'/'loss.jsonl', time.time() + 300
    there = (lambda: len(read_jsonl(log)) >= 5) if moment == 'loss' else (lambda: (cut/'checkpoints'/'step-000006').exists())
    while not there() and time.time() < deadline: time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert len(read_jsonl(log)) < 12
    assert blipbooth('train', '--resume', cut, cwd=tmp_path).returncode == 0
    assert read_jsonl(log) == read_jsonl(whole/'logs'/'loss.jsonl')
    for part in ('unet', 'text_encoder'):
        a, b = (load_file(o/'checkpoints'/'step-000012'/f'{part}.safetensors') for o in (whole, cut))
        assert all((a[k] == b[k]).all() for k in a) and a.keys() == b.keys()


def test_demo_runs_through(tmp_path):
    "The whole session, shortened: every stage is real, only fewer steps and class images."
    res = blipbooth('demo', 'steps=6', 'prior.n=4', 'prior.threshold=0', cwd=tmp_path)
    assert res.returncode == 0, res.stderr
    run = tmp_path/'runs'/'demo'
    report = json.loads((run/'report.json').read_text())
    for metric in ('subject_fidelity', 'prompt_fidelity', 'pres', 'div'): assert {'before', 'after'} <= set(report[metric])
    assert {'caption', 'priors', 'train', 'evaluate', 'print'} <= set(report['seconds'])
    assert len(list((run/'samples').glob('*.png'))) == 8
    assert len(read_jsonl(run/'captions.jsonl')) == 4 and len(read_jsonl(run/'priors'/'manifest.jsonl')) == 4
    html = (run/'report.html').read_text()
    assert 'data:image/png;base64' in html and 'http://' not in html.replace('http://www.w3.org', '')
