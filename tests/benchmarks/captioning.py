"""The fast decoder against transformers' own `generate`: `python tests/benchmarks/captioning.py [THREADS] [REPEATS]`.

One base-size BLIP of fixed random weights, 20 new tokens; ours and theirs in turn in one process, the median of the repeats of each:
4 pictures in float32 on a CPU, 64 in float16 and bfloat16 where there is a GPU. Seconds are wall time of pixels to token ids.
Token ids are compared in float32 on the bundled model and 200 pictures of noise.
Memory on a CPU is the growth of the process's peak while it decodes, each side in a process of its own that has computed nothing
before; our copy of the linear layers is made beforehand and stays, so it is a line of its own. On a GPU it is what torch allocated.
JSON lines. A row that fails says so, the others go on, and the exit status is 1. BLIPBOOTH_GRAPHS=0 records no steps on a GPU."""
import copy, functools, subprocess, sys, warnings

import numpy as np, torch
from transformers import BlipConfig, BlipForConditionalGeneration

from common import GPU, in_turn, line, machine, race, seconds

from blipbooth.captioning import Captioner
from blipbooth.decoding import fast_generate, image_memory, packed, quiet_transformers, vision_features

B, NEW, DEVICE = 64 if GPU else 4, 20, 'cuda' if GPU else 'cpu'
BARS = {1: 1.25, 3: 2.5, 5: 3.5}


@functools.cache
def base_size(dtype=torch.float32):
    if dtype != torch.float32: return copy.deepcopy(base_size()).to(dtype)
    torch.manual_seed(0)
    config = BlipConfig(text_config=dict(num_attention_heads=12, is_decoder=True), vision_config=dict(image_size=384, initializer_range=.02))
    with quiet_transformers(): return BlipForConditionalGeneration(config).eval().to(DEVICE)


def noise(n, size=384): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@torch.no_grad()
def ours(model, pixels, **kw):
    embeds = vision_features(packed(model.vision_model), pixels.to(model.dtype))
    ids = torch.full((len(pixels), 1), model.config.text_config.bos_token_id, device=DEVICE)
    return fast_generate(model.text_decoder, embeds, ids, **kw)


@torch.no_grad()
def theirs(model, pixels, eos_token_id=None, pad_token_id=None, **kw): # sets both ids itself
    return model.generate(pixel_values=pixels.to(model.dtype), **kw)


def options(model, beams):
    t = model.config.text_config
    return dict(num_beams=beams, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, eos_token_id=t.sep_token_id, pad_token_id=t.pad_token_id)


def name_of(dtype): return str(dtype)[6:]


def speed(repeats, beams, dtype, peer=None): # peer: the number format of transformers' side
    a, b, pixels = base_size(dtype), base_size(peer or dtype), noise(B)
    kw = options(a, beams)
    what = (f'beam {beams}' if beams > 1 else 'greedy') + f', {name_of(dtype)}' + (f' against {name_of(peer)}' if peer else '')
    race(what, lambda: ours(a, pixels, **kw), lambda: theirs(b, pixels, **kw), repeats, bar=8 if peer else BARS[beams], batch=B)


def recorded(repeats, dtype): # what a recorded step is worth
    model, pixels = base_size(dtype), noise(B)
    kw = options(model, 5)
    race(f'beam 5, {name_of(dtype)}, steps recorded against called', lambda: ours(model, pixels, fixed=True, **kw), lambda: ours(model, pixels, fixed=False, **kw), repeats, batch=B)


@torch.no_grad()
def vision_share(repeats, dtype):
    model, pixels, side = base_size(dtype), noise(B).to(dtype), 8192 if GPU else 2048
    m = torch.randn(side, side, device=DEVICE, dtype=dtype)
    a, b = in_turn(lambda: vision_features(packed(model.vision_model), pixels), lambda: m@m, 3*repeats)
    v, n = model.config.vision_config, (384//16)**2 + 1
    flops = B*v.num_hidden_layers*(2*n*v.hidden_size*(4*v.hidden_size + 2*v.intermediate_size) + 4*n*n*v.hidden_size)
    rate, best = flops/a/1e9, 2*side**3/b/1e9
    line(f'vision encoder, share of the matrix-multiply rate, {name_of(dtype)}', ours=round(rate, 1), peer=round(best, 1), ratio=round(rate/best, 3), unit='GFLOP/s', bar=.6)
    embeds = vision_features(packed(model.vision_model), pixels)
    c, _ = in_turn(lambda: image_memory(model.text_decoder, embeds), lambda: None, 3*repeats)
    line(f'of each decode, {name_of(dtype)}: the vision encoder', ours=round(a, 4), unit='s')
    line(f"of each decode, {name_of(dtype)}: the pictures' keys and values", ours=round(c, 4), unit='s')


def memory_rate(repeats): # what a step cannot be quicker than: the decoder's weights, read once
    weights = [torch.randn(3072, 768, device=DEVICE).view(torch.int64) for _ in range(52)]
    size = sum(w.numel()*8 for w in weights)
    a, _ = in_turn(lambda: [w.sum() for w in weights], lambda: None, 3*repeats)
    line(f'reading {size/1e6:.0f} MB, what a step of the decoder reads of weights', ours=round(size/a/1e9, 1), unit='GB/s')


def same_ids(n=200):
    cap, rng = Captioner.from_pretrained(device=DEVICE), np.random.default_rng(0)
    size = cap.model.config.vision_config.image_size
    pixels = torch.tensor(rng.standard_normal((n, 3, size, size)), dtype=torch.float32).to(DEVICE)
    t = cap.text_config
    for name, kw in {'greedy': dict(num_beams=1), 'beam 3': dict(num_beams=3), 'beam 5': dict(num_beams=5), 'beam 3, 8 to 12 tokens': dict(num_beams=3, min_new_tokens=8, max_new_tokens=12)}.items():
        kw = {'max_new_tokens': NEW, 'eos_token_id': t.sep_token_id, 'pad_token_id': t.pad_token_id, **kw}
        with quiet_transformers(): a, b = (f(cap.model, pixels, **kw).tolist() for f in (ours, theirs))
        start = len(b[0]) - len(a[0])                          # their rows may hold one more start token
        equal = sum(x == y[start:] for x, y in zip(a, b))
        line(f'same token ids, {name}', ours=equal, peer=n, ratio=equal/n, unit='pictures', bar=1)


def peak(side): # MB by which the peak grew while decoding
    status = lambda key: next(int(o.split()[1])/1024 for o in open('/proc/self/status') if o.startswith(key))
    model, embeds = base_size(), torch.randn(B, 577, 768)      # no encoder has run: its freed memory would be used again
    kw = options(model, 5)
    first = status('VmRSS')
    if side == 'ours':
        with torch.no_grad(): packed(model.text_decoder)
    kept = status('VmRSS') - first
    ids = torch.full((B, 1), model.config.text_config.bos_token_id)
    open('/proc/self/clear_refs', 'w').write('5')              # the peak starts again here
    before = status('VmRSS')
    with torch.no_grad(), quiet_transformers():
        if side == 'ours': fast_generate(model.text_decoder, embeds, ids, **kw)
        else: model.text_decoder.generate(input_ids=ids, encoder_hidden_states=embeds, encoder_attention_mask=torch.ones(embeds.shape[:2]), **kw)
    print(status('VmHWM') - before, kept)


def gpu_memory(dtype): # MB that torch allocated while decoding, beyond what was there
    model, embeds = base_size(dtype), torch.randn(B, 577, 768, device=DEVICE, dtype=dtype)
    ids, seen = torch.full((B, 1), model.config.text_config.bos_token_id, device=DEVICE), torch.ones(embeds.shape[:2], dtype=torch.long, device=DEVICE)
    sides = (lambda **kw: fast_generate(model.text_decoder, embeds, ids, **kw),
             lambda **kw: model.text_decoder.generate(input_ids=ids.clone(), encoder_hidden_states=embeds, encoder_attention_mask=seen, **kw))
    res = []
    for f in sides:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad(), quiet_transformers(): f(**options(model, 5))
        res.append((torch.cuda.max_memory_allocated() - before)/2**20)
    line(f'memory of the decode, beam 5, {name_of(dtype)}', ours=round(res[0]), peer=round(res[1]), ratio=round(res[0]/res[1], 3), unit='MB', bar='<0.4', batch=B)


def memory():
    run = lambda side: subprocess.run([sys.executable, __file__, 'peak', side], capture_output=True, text=True, check=True).stdout.split()[-2:]
    (a, kept), (b, _) = ([float(o) for o in run(side)] for side in ('ours', 'theirs'))
    line('memory of the decode, beam 5', ours=round(a), peer=round(b), ratio=round(a/b, 3), unit='MB', bar='<0.4')
    line('packed copy of the decoder, once', ours=round(kept), unit='MB')


def rows(repeats):
    "What is measured here, one after the other."
    wide, half, part = torch.float32, torch.bfloat16, functools.partial
    yield same_ids
    for dtype in (torch.float16, half) if GPU else (wide,):
        for beams in BARS: yield part(speed, repeats, beams, dtype)
    yield part(speed, max(1, repeats//2), 5, half, wide)
    for dtype in (torch.float16, half, wide) if GPU else (wide,): yield part(vision_share, repeats, dtype)
    yield part(memory_rate, repeats)
    if not GPU: yield memory
    for dtype in (torch.float16, half) if GPU else ():
        yield part(recorded, repeats, dtype)
        yield part(gpu_memory, dtype)


def attempt(row):
    "Measure one row; false if that failed, which is a row of its own."
    try: row(); return True
    except Exception as e:
        why = str(e).strip().splitlines() or ['']
        line(f"{getattr(row, 'func', row).__name__}{tuple(map(str, getattr(row, 'args', ())))}", error=f'{type(e).__name__}: {why[0]}')
        return False


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    if sys.argv[1:2] == ['peak']: peak(sys.argv[2])
    else:
        if sys.argv[1:]: torch.set_num_threads(int(sys.argv[1]))
        machine()
        fine = []
        took = seconds(lambda: fine.extend(map(attempt, rows(int(sys.argv[2]) if sys.argv[2:] else 5))))
        line('the whole benchmark', ours=round(took), unit='s')
        sys.exit(not all(fine))
