"""The demo on every held-out subject, with and without prior preservation: `python tests/benchmarks/subjects.py [SUBJECT …] [key=value …]`.

One JSON line a subject: "ours" is the subject fidelity after training, "peer" that of the untouched model asked for the class; prompt
fidelity before and after; PRES and DIV of class images before, after, and after training without the prior loss (DreamBooth, Table 3)."""
import json, sys, tempfile, time
from pathlib import Path

from blipbooth.booth import Booth
from blipbooth.core import subject_photos
from blipbooth.dreambooth import DreamBoothConfig


def session(subject, out, *overrides):
    booth = Booth(subject_photos(subject), class_noun=subject, out=out, config=DreamBoothConfig.load(None, *overrides))
    booth.caption()
    if booth.cfg.prior.weight: booth.make_priors()
    booth.train()
    return booth.evaluate().metrics, sum(booth.seconds.values())


def main(args):
    overrides = [a for a in args if '=' in a]
    names = [a for a in args if '=' not in a] or sorted(p.name for p in subject_photos('fox').parent.iterdir() if p.is_dir())
    lines = []
    for name in names:
        with tempfile.TemporaryDirectory() as d:
            m, s = session(name, Path(d)/'prior', *overrides)
            free, _ = session(name, Path(d)/'free', 'prior.weight=0', *overrides)
        f, p = m['subject_fidelity'], m['prompt_fidelity']
        lines.append(dict(name=f'subject {name}', ours=f['after'], peer=f['before'], ratio=f['after']/f['before'], unit='cosine', prompt=p, pres=m['pres'], div=m['div'],
                          without_prior=dict(subject_fidelity=free['subject_fidelity']['after'], prompt_fidelity=free['prompt_fidelity']['after'], pres=free['pres']['after'], div=free['div']['after']), seconds=round(s, 1)))
        print(json.dumps(lines[-1]), flush=True)
    mean = lambda g: sum(map(g, lines))/len(lines)
    print(json.dumps(dict(name='all subjects', ours=mean(lambda r: r['ours']), peer=mean(lambda r: r['peer']), ratio=mean(lambda r: r['ratio']), unit='cosine',
                          better=sum(r['ours'] > r['peer'] for r in lines), n=len(lines), prompt_before=mean(lambda r: r['prompt']['before']), prompt_after=mean(lambda r: r['prompt']['after']),
                          pres=mean(lambda r: r['pres']['after']), pres_without_prior=mean(lambda r: r['without_prior']['pres']))))


if __name__ == '__main__': main(sys.argv[1:])
