"""What holds a model in place, on held-out subjects: `python tests/benchmarks/priors.py [SUBJECT …] [kind=KIND …] [into=FILE] [key=value …]`.

Trainings that are alike but for the class half: class images as they come ("all"), those that a session keeps of them by default ("filtered": of each
two that show the class, by the matcher, the one less like those before it), the frozen model's own answers ("prediction"), and, where they are asked
for, no class half ("none") or class images drawn while it trains ("drawn"). One JSON line a training: subject fidelity ("ours"; "peer" is the untouched model's),
prompt fidelity, PRES and DIV afterwards, the share of the tries that was refused, and the seconds of training. At the end, the means of each kind.

With `into=FILE` the lines are kept there, and a second call goes on behind them."""
import json, sys, tempfile
from pathlib import Path

from common import machine

from blipbooth.booth import Booth
from blipbooth.core import append_jsonl, read_jsonl, subject_photos
from blipbooth.dreambooth import DreamBoothConfig
from blipbooth.evaluation import measure
from blipbooth.priors import Priors, article, on_the_fly, prior_prediction
from blipbooth.sampling import load_pipeline

KINDS = 'all', 'filtered', 'prediction'
LOOK = dict(steps=20, n_class=32)
NUMBERS = 'ours', 'peer', 'prompt', 'pres', 'div'


def class_images(booth): # what a session draws by itself: all of the drawings, and those that are kept of them
    kept, c = booth.make_priors(), booth.cfg.prior
    return dict(all=Priors(kept.folder, [{**r, 'kept': True, 'why': None} for r in kept.records[:c.candidates*c.n]]), filtered=kept)


def look(booth, pipe, name): # the four numbers of one model
    prints, drawn = booth.prints_of(pipe, name, **LOOK)
    return measure(booth.matcher, booth.captioner, booth.photos, prints, [f'{article(booth.cfg.class_noun)} {p}' for p in booth.places()], drawn)


def opened(subject, out, overrides):
    booth = Booth(subject_photos(subject), class_noun=subject, out=out, config=DreamBoothConfig.load(None, *overrides))
    booth.caption()
    return booth


def trained(subject, kind, out, images, overrides): # the numbers afterwards
    booth = opened(subject, out, overrides + (['prior.weight=0'] if kind == 'none' else []))
    booth.priors, c, cbs = images.get(kind), booth.cfg, []
    if kind == 'drawn': cbs = [on_the_fly(load_pipeline(), subject, every=max(1, c.steps//c.prior.n), seed=c.seed)]
    if kind == 'prediction': cbs = [prior_prediction(load_pipeline(), subject, seed=c.seed)]
    booth.train(cbs=cbs)
    return look(booth, booth.model, booth.subject), booth.seconds['train']


def session(subject, kinds, overrides, keep):
    with tempfile.TemporaryDirectory() as d:
        booth = opened(subject, Path(d)/'untouched', overrides)
        before = look(booth, booth.pipe, subject)
        images = class_images(booth) if {'all', 'filtered'} & set(kinds) else {}
        for kind in kinds:
            after, seconds = trained(subject, kind, Path(d)/kind, images, overrides)
            ours, peer = after['subject_fidelity'], before['subject_fidelity']
            keep(dict(name=f'{subject}, {kind}', ours=ours, peer=peer, ratio=ours/peer, unit='cosine', prompt=after['prompt_fidelity'], pres=after['pres'], div=after['div'],
                      before={k: before[k] for k in ('prompt_fidelity', 'pres', 'div')}, **dict(refused=images[kind].rejection_rate) if kind == 'filtered' else {}, seconds=seconds))


def means(lines): # only of subjects that every kind has trained on
    by = {}
    for r in lines: by.setdefault(r['name'].split(', ')[-1], {})[r['name'].split(', ')[0]] = r
    common = set.intersection(*map(set, by.values()))
    for kind, rows in by.items():
        mean = {k: sum(rows[s][k] for s in common)/len(common) for k in NUMBERS}
        yield dict(name=f'mean of {len(common)}, {kind}', **{k: round(v, 4) for k, v in mean.items()}, ratio=round(mean['ours']/mean['peer'], 3), unit='cosine')


def main(args):
    said = lambda key: [a.split('=', 1)[1] for a in args if a.startswith(f'{key}=')]
    overrides = [a for a in args if '=' in a and a.split('=')[0] not in ('kind', 'into')]
    names = [a for a in args if '=' not in a] or sorted(p.name for p in subject_photos('fox').parent.iterdir() if p.is_dir())
    kinds, into = said('kind') or KINDS, said('into')
    lines = [r for r in read_jsonl(into[0]) if 'machine' not in r and not r['name'].startswith('mean')] if into else []
    def keep(r):
        lines.append(r)
        print(json.dumps(r), flush=True)
        if into: append_jsonl(into[0], r)
    if not lines: machine()
    for name in names:
        todo = [k for k in kinds if f'{name}, {k}' not in [r['name'] for r in lines]]
        if todo: session(name, todo, overrides, keep)
    for r in means(lines): print(json.dumps(r), flush=True)


if __name__ == '__main__': main(sys.argv[1:])
