"""What holds a model in place, on held-out subjects: `python tests/benchmarks/priors.py [SUBJECT …] [key=value …]`.

Six trainings a subject, alike but for the class half: none, class images as they come, the same filtered by the matcher and without near-duplicates
("filter"), the filter with class images in the photos' places ("places"), class images drawn while it trains, and the frozen model's own
answers. One JSON line a training: subject fidelity ("ours"; "peer" is the untouched model's), prompt fidelity, PRES and DIV after training,
the share of class images that was rejected, and the seconds of making the class images and of training. At the end, the means of each kind."""
import json, sys, tempfile, time
from pathlib import Path

from blipbooth.booth import Booth
from blipbooth.core import subject_photos
from blipbooth.dreambooth import DreamBoothConfig
from blipbooth.priors import class_prompts, make_priors, on_the_fly, prior_prediction
from blipbooth.sampling import load_pipeline

THRESHOLD, DEDUPE = .5, .995


def class_half(kind, booth): # (class images or None, callbacks)
    cfg, noun, captions = booth.cfg, booth.cfg.class_noun, [c.text for c in booth.captions]
    if kind == 'drawn while it trains': return None, [on_the_fly(load_pipeline(), noun, every=max(1, cfg.steps//cfg.prior.n), seed=cfg.seed)]
    if kind == 'prior prediction': return None, [prior_prediction(load_pipeline(), noun, seed=cfg.seed)]
    choose = dict(matcher=booth.matcher, threshold=THRESHOLD, dedupe=DEDUPE, tries=8) if kind in ('filter', 'places') else {}
    prompts = class_prompts(noun, captions if kind == 'places' else ())
    return make_priors(booth.pipe, noun, cfg.prior.n, booth.out/'priors', cfg.seed, prompts, **choose), []


KINDS = 'none', 'as they come', 'filter', 'places', 'drawn while it trains', 'prior prediction'


def session(kind, subject, out, overrides):
    free = ['prior.weight=0'] if kind == 'none' else []
    booth = Booth(subject_photos(subject), class_noun=subject, out=out, config=DreamBoothConfig.load(None, *overrides, *free))
    booth.caption()
    start = time.perf_counter()
    booth.priors, cbs = class_half(kind, booth) if kind != 'none' else (None, [])
    made = time.perf_counter() - start
    booth.train(cbs=cbs)
    m = booth.evaluate().metrics
    f = m['subject_fidelity']
    return dict(kind=kind, subject=subject, ours=f['after'], peer=f['before'], ratio=f['after']/f['before'], unit='cosine', prompt=m['prompt_fidelity']['after'],
                pres=m['pres']['after'], div=m['div']['after'], rejected=booth.priors.rejection_rate if booth.priors else None,
                seconds_priors=round(made, 1), seconds_train=booth.seconds['train'])


def main(args):
    overrides = [a for a in args if '=' in a]
    names = [a for a in args if '=' not in a] or sorted(p.name for p in subject_photos('fox').parent.iterdir() if p.is_dir())
    lines = []
    for name in names:
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as d: lines.append(dict(name=f'{name}, {kind}', **session(kind, name, Path(d), overrides)))
            print(json.dumps(lines[-1]), flush=True)
    for kind in KINDS:
        of = [r for r in lines if r['kind'] == kind]
        mean = {k: round(sum(r[k] for r in of)/len(of), 4) for k in ('ours', 'peer', 'ratio', 'prompt', 'pres', 'div', 'seconds_priors', 'seconds_train')}
        print(json.dumps(dict(name=f'mean, {kind}', unit='cosine', subjects=len(of), **mean)), flush=True)


if __name__ == '__main__': main(sys.argv[1:])
