"Training as it is lived through: killed at any moment, on two processes, from a notebook, on a full disk."
import json, os, random, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load_file

from blipbooth.callbacks import track_report
from blipbooth.core import read_jsonl, subject_photos

env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', ACCELERATE_USE_CPU='true')
KILLS = int(os.environ.get('BLIPBOOTH_KILLS', '4'))  # the bar is 20: BLIPBOOTH_KILLS=20 pytest tests/test_training.py


def said(out, *more): return ['train', f'photos={subject_photos("fox")}', 'class_noun=fox', f'out={out}', 'prior.n=4', 'prior.threshold=0', *more]
def start(args, cwd, launch=(), **kw): return subprocess.Popen([sys.executable, '-m', *launch, 'blipbooth.cli', *map(str, args)], cwd=cwd, env=env, stdout=subprocess.DEVNULL, **kw)


def run(args, cwd, launch=()):
    p = start(args, cwd, launch, stderr=subprocess.PIPE, text=True)
    err = p.communicate(timeout=900)[1]
    assert p.returncode == 0, err


def weights(run, step): return {f.stem: load_file(f) for f in sorted((run/'checkpoints'/f'step-{step:06d}').glob('*.safetensors')) if f.stem != 'optimizer'}
def losses(run): return read_jsonl(run/'logs'/'loss.jsonl')


def furthest(a, b):
    "The largest difference between two sets of weights, as a share of the larger one's size."
    assert a.keys() == b.keys() and all(a[k].keys() == b[k].keys() for k in a)
    return max((a[k][n] - b[k][n]).norm().item()/max(b[k][n].norm().item(), 1e-12) for k in a for n in a[k])


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An uninterrupted run that saves after every other step, so that a kill often falls into a save."
    out = tmp_path_factory.mktemp('whole')/'run'
    run(said(out, *OFTEN), out.parent)
    yield out
    shutil.rmtree(out)


LAST = max(30, 3*KILLS)  # a kill falls only after a new step, so there must be steps enough for all of them
OFTEN = f'steps={LAST}', 'checkpoint.every=2', 'checkpoint.keep=2', 'ema=0.9', 'schedule=cosine'


def test_killed_at_random_moments(whole, tmp_path):
    "kill -9 at random moments of the training, each time resumed: the end is that of the run nobody touched."
    out, rng, kills = tmp_path/'run', random.Random(0), 0
    begun = start(said(out, *OFTEN), tmp_path, stderr=subprocess.DEVNULL)
    while True:
        seen, deadline = len(losses(out)), time.time() + 600
        while begun.poll() is None and len(losses(out)) <= seen and time.time() < deadline: time.sleep(.005)
        if kills < KILLS and begun.poll() is None:
            time.sleep(rng.uniform(0, .4))               # in a step, in a save, or between
            begun.send_signal(signal.SIGKILL)
            kills += 1
        if begun.wait() == 0: break
        begun = start(['train', '--resume', out], tmp_path, stderr=subprocess.DEVNULL)
    assert kills == KILLS
    assert losses(out) == losses(whole)
    assert furthest(weights(out, LAST), weights(whole, LAST)) == 0


def test_sigterm_saves_and_the_same_command_goes_on(whole, tmp_path):
    out = tmp_path/'run'
    p = start(said(out, *OFTEN), tmp_path, stderr=subprocess.PIPE, text=True)
    while len(losses(out)) < 5 and p.poll() is None: time.sleep(.01)
    p.send_signal(signal.SIGTERM)
    err = p.communicate()[1]
    assert p.returncode == 130 and 'stopped by SIGTERM' in err and 'Traceback' not in err
    n = len(losses(out))
    assert (out/'checkpoints'/f'step-{n:06d}').exists()
    run(['train', '--resume', out], tmp_path)
    assert losses(out) == losses(whole) and furthest(weights(out, LAST), weights(whole, LAST)) == 0


STEPS = 'steps=4', 'checkpoint.every=4', 'optimizer=torch.optim.SGD', 'lr=0.01', 'clip=0.1'


@pytest.fixture(scope='module')
def four(tmp_path_factory):
    out = tmp_path_factory.mktemp('four')/'run'
    run(said(out, *STEPS, 'batch_size=4'), out.parent)
    yield out
    shutil.rmtree(out)


def alike(a, b, tol=1e-5):
    "Whether two runs of four steps logged the same losses and ended with the same weights."
    return furthest(weights(a, 4), weights(b, 4)) < tol and losses(a) == [pytest.approx(y, rel=tol, abs=tol/10) for y in losses(b)]


def test_accumulated(four, tmp_path):
    run(said(tmp_path/'run', *STEPS, 'batch_size=1', 'accumulate=4'), tmp_path)
    assert alike(tmp_path/'run', four)


LAUNCH = 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--main_process_port', '0', '-m'  # with ACCELERATE_USE_CPU: two CPU processes


def test_two_processes(four, tmp_path):
    "accelerate launch on two real processes, two photos each."
    run(said(tmp_path/'run', *STEPS, 'batch_size=2'), tmp_path, LAUNCH)
    assert alike(tmp_path/'run', four)


def test_two_processes_with_buckets(tmp_path):
    "Photos of several shapes: the processes differ in how many forwards they take, and the step is still that of one process."
    (tmp_path/'shapes').mkdir()
    for i, size in enumerate([(64, 64), (96, 48), (48, 96), (64, 64)]): Image.open(subject_photos('fox')/f'{i}.png').convert('RGB').resize(size).save(tmp_path/'shapes'/f'{i}.png')
    keys = *STEPS, f'photos={tmp_path/"shapes"}', 'prior.weight=0', 'captions=template', 'data.buckets=true'
    run([*said(tmp_path/'one'), *keys, 'batch_size=4'], tmp_path)
    run([*said(tmp_path/'two'), *keys, 'batch_size=2'], tmp_path, LAUNCH)
    assert alike(tmp_path/'two', tmp_path/'one')


NOTEBOOK = '''
from accelerate import notebook_launcher
from blipbooth.all import *

def train():
    Booth({photos!r}, class_noun='fox', out={out!r}, config=DreamBoothConfig.load(None, {keys})).train()

if __name__ == '__main__': notebook_launcher(train, num_processes=2, use_port='{port}')
'''


def test_two_processes_of_a_notebook(four, tmp_path):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    (tmp_path/'cell.py').write_text(NOTEBOOK.format(port=port, photos=str(subject_photos('fox')), out=str(tmp_path/'run'), keys=', '.join(map(repr, [*STEPS, 'batch_size=2', 'prior.n=4', 'prior.threshold=0']))))
    res = subprocess.run([sys.executable, 'cell.py'], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert res.returncode == 0, res.stderr
    assert alike(tmp_path/'run', four)


ENDS = '''
import sys, torch
from accelerate import notebook_launcher
from blipbooth.learner import Callback, CancelFit, Learner

class Data:
    def batch(self, start, size): return dict(x=torch.arange(start, start + size).float()[:, None])

class Ends(Callback):
    def enough(self):
        if self.learn.accelerator.is_main_process and self.learn.step == 2: raise CancelFit('two is enough')

def train():
    for moment in 'before_step', 'after_loss', 'after_step':
        end, net = Ends(), torch.nn.Linear(1, 1)
        setattr(end, moment, end.enough)
        l = Learner(net, Data(), lambda net, b: dict(loss=net(b['x']).square().mean()), torch.optim.SGD(net.parameters(), .1), 5, cbs=[end]).fit()
        assert (l.step, l.cancelled) == (2, 'two is enough' if l.accelerator.is_main_process else 'ended by another process'), (moment, l.step, l.cancelled)

if __name__ == '__main__': notebook_launcher(train, num_processes=2, use_port='{port}')
'''


def test_one_process_ends_both(tmp_path):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    (tmp_path/'cell.py').write_text(ENDS.replace('{port}', str(port)))
    res = subprocess.run([sys.executable, 'cell.py'], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert res.returncode == 0, res.stderr


def test_caches_change_nothing(four, tmp_path):
    for cache in ('off', 'disk'):
        run(said(tmp_path/cache, *STEPS, 'batch_size=4', f'data.cache={cache}'), tmp_path)
        assert alike(tmp_path/cache, four)


CUT = '''
from blipbooth.all import *
import os, signal

class Kill(Callback):
    "The notebook's kernel dies."
    order = 99
    def after_step(self):
        if self.learn.step == 3: os.kill(os.getpid(), signal.SIGKILL)

photos = [p.image for p in load_images({photos!r})]
Booth(photos, class_noun='fox', out={out!r}, config=DreamBoothConfig.load(None, {keys})).train(cbs=[Kill()])
'''


def test_killed_in_a_notebook_goes_on_in_a_terminal(four, tmp_path):
    keys = ', '.join(map(repr, ['prior.n=4', 'prior.threshold=0', *STEPS, 'checkpoint.every=2', 'batch_size=4']))
    code = CUT.format(photos=str(subject_photos('fox')), out=str(tmp_path/'run'), keys=keys)
    assert subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True).returncode == -signal.SIGKILL
    run(['train', '--resume', tmp_path/'run'], tmp_path)
    assert losses(tmp_path/'run') == losses(four) and furthest(weights(tmp_path/'run', 4), weights(four, 4)) == 0


def test_tensorboard(tmp_path):
    "Hyper-parameters, losses, prints and the report, as TensorBoard's own reader finds them."
    from tensorboard.backend.event_processing import event_accumulator as board
    run(said(tmp_path/'run', 'steps=3', 'trackers=[tensorboard]', 'prints.every=3', 'prints.steps=2', 'prior.n=2'), tmp_path)
    report = SimpleNamespace(metrics=dict(subject_fidelity=dict(before=.5, after=.75)), seconds=dict(train=2.), pictures={'photos': [Image.new('RGB', (8, 6))]})
    track_report(['tensorboard'], tmp_path/'run'/'logs', report)
    read = board.EventAccumulator(str(tmp_path/'run'/'logs'/'blipbooth')).Reload()
    assert [(e.step, e.value) for e in read.Scalars('loss')] == [(r['step'], pytest.approx(r['loss'], rel=1e-6)) for r in losses(tmp_path/'run')]
    assert [(e.step, e.value) for e in read.Scalars('report/subject_fidelity/after')] == [(3, .75)]
    assert [(i.step, i.width, i.height) for i in read.Images('prints/1')] == [(3, 64, 64)] and [(i.width, i.height) for i in read.Images('report/photos/0')] == [(8, 6)]
    hparams, = (tmp_path/'run'/'logs').rglob('hparams.yml')
    assert 'class_noun: fox' in hparams.read_text() and 'train.unet: full' in hparams.read_text()


def test_two_runs_in_one_folder(tmp_path):
    out = tmp_path/'run'
    first = start(said(out, 'steps=500', 'checkpoint.every=1'), tmp_path, stderr=subprocess.DEVNULL)
    try:
        while not list((out/'checkpoints').glob('step-*')) and first.poll() is None: time.sleep(.05)
        second = start(['train', '--resume', out], tmp_path, stderr=subprocess.PIPE, text=True)
        err = second.communicate()[1]
        assert second.returncode == 2 and 'another run is at work' in err and len(err.strip().splitlines()) == 1
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


@pytest.mark.parametrize('key, words', [('batch_size=9', 'batch_size=9 is more than the 4 photos'), ('resolution=50', 'not a multiple of'), ('lr=1', 'destroy'), ('token=fox', 'both'),
                                        ('token=qzxvk', 'pieces'), ('trackers=[tensorbord]', 'tensorboard'), ('steps=many', 'not a whole number'), ('min_photos=5', '4 photos'), ('optimizer=torch.optim.Nope', 'no optimizer'), ('trian.unet=off', 'train.unet'), ('loss.t_min=2000', "beyond the schedule's 1000"), ('data.masks=alpha', 'no alpha channel')])
def test_bad_configuration(key, words, tmp_path, here):
    res = here(*said(tmp_path/'run'), key, cwd=tmp_path)
    assert res.returncode == 2 and words in res.stderr and len(res.stderr.strip().splitlines()) == 1, res.stderr
    assert not list(tmp_path.iterdir())


def test_one_photo_is_allowed_where_it_is_asked_for_and_warned_of(tmp_path):
    (tmp_path/'one').mkdir()
    (tmp_path/'one'/'0.png').write_bytes((subject_photos('fox')/'0.png').read_bytes())
    p = start([*said(tmp_path/'run', 'steps=1', 'prior.n=1', 'min_photos=1'), f'photos={tmp_path/"one"}'], tmp_path, stderr=subprocess.PIPE, text=True)
    err = p.communicate()[1]
    assert p.returncode == 0 and err.count('one photo of the subject') == 1, err
    assert (tmp_path/'run'/'checkpoints'/'step-000001').exists()


def test_sdxl_is_not_sd(tmp_path, here):
    (tmp_path/'xl').mkdir()
    (tmp_path/'xl'/'model_index.json').write_text(json.dumps({'_class_name': 'StableDiffusionXLPipeline'}))
    res = here(*said(tmp_path/'run'), f'model={tmp_path/"xl"}', cwd=tmp_path)
    assert res.returncode == 2 and 'StableDiffusionXLPipeline' in res.stderr
    assert not (tmp_path/'run').exists()
