"""The fast decoder against transformers' own `generate`: `python tests/benchmarks/captioning.py [THREADS] [REPEATS]`.

One base-size BLIP of fixed random weights, 4 pictures, 20 new tokens; ours and theirs in turn in one process, the median of the
repeats of each. Seconds are wall time of pixels to token ids. Token ids are compared on the bundled model and 200 pictures of noise.
Memory is the growth of the process's peak while it decodes, each side in a process of its own that has computed nothing before;
our copy of the linear layers is made beforehand and stays, so it is a line of its own. JSON lines."""
import subprocess, sys, warnings

import numpy as np, torch
from transformers import BlipConfig, BlipForConditionalGeneration

from common import in_turn, line, machine, race

from blipbooth.captioning import Captioner
from blipbooth.decoding import fast_generate, image_memory, packed, quiet_transformers, vision_features

B, NEW = 4, 20


def base_size(dtype=torch.float32):
    torch.manual_seed(0)
    config = BlipConfig(text_config=dict(num_attention_heads=12, is_decoder=True), vision_config=dict(image_size=384, initializer_range=.02))
    with quiet_transformers(): return BlipForConditionalGeneration(config).eval().to(dtype)


@torch.no_grad()
def ours(model, pixels, **kw):
    embeds = vision_features(model.vision_model, pixels.to(model.dtype))
    ids = torch.full((len(pixels), 1), model.config.text_config.bos_token_id)
    return fast_generate(model.text_decoder, embeds, ids, **kw)


@torch.no_grad()
def theirs(model, pixels, eos_token_id=None, pad_token_id=None, **kw): return model.generate(pixel_values=pixels, **kw)  # sets both ids itself


def options(model, beams):
    t = model.config.text_config
    return dict(num_beams=beams, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, eos_token_id=t.sep_token_id, pad_token_id=t.pad_token_id)


def speed(repeats):
    pixels, model, half = torch.randn(B, 3, 384, 384, generator=torch.Generator().manual_seed(1)), base_size(), base_size(torch.bfloat16)
    for beams, bar in (1, 1.25), (3, 2.5), (5, 3.5):
        kw = options(model, beams)
        race(f'beam {beams}, float32' if beams > 1 else 'greedy, float32', lambda: ours(model, pixels, **kw), lambda: theirs(model, pixels, **kw), repeats, bar=bar)
    race('beam 5, bfloat16 against float32', lambda: ours(half, pixels, **kw), lambda: theirs(model, pixels, **kw), max(1, repeats//2), bar=8)


def vision_share(repeats):
    model, pixels, m = base_size(), torch.randn(B, 3, 384, 384), torch.randn(2048, 2048)
    with torch.no_grad(): a, b = in_turn(lambda: vision_features(model.vision_model, pixels), lambda: m@m, 3*repeats)
    v, n = model.config.vision_config, (384//16)**2 + 1
    flops = B*v.num_hidden_layers*(2*n*v.hidden_size*(4*v.hidden_size + 2*v.intermediate_size) + 4*n*n*v.hidden_size)
    rate, best = flops/a/1e9, 2*2048**3/b/1e9
    line('vision encoder, share of the matrix-multiply rate', ours=round(rate, 1), peer=round(best, 1), ratio=round(rate/best, 3), unit='GFLOP/s', bar=.6)
    with torch.no_grad():
        embeds = vision_features(model.vision_model, pixels)
        c, _ = in_turn(lambda: image_memory(model.text_decoder, embeds), lambda: None, 3*repeats)
    line('of each decode: the vision encoder', ours=round(a, 3), unit='s')
    line("of each decode: the pictures' keys and values", ours=round(c, 3), unit='s')


def memory_rate(repeats): # what a step cannot be quicker than: the decoder's weights, read once
    weights = [torch.randn(3072, 768).view(torch.int64) for _ in range(52)]
    size = sum(w.numel()*8 for w in weights)
    a, _ = in_turn(lambda: [w.sum() for w in weights], lambda: None, 3*repeats)
    line(f'reading {size/1e6:.0f} MB, what a step of the decoder reads of weights', ours=round(size/a/1e9, 1), unit='GB/s')


def same_ids(n=200):
    cap, rng = Captioner.from_pretrained(device='cpu'), np.random.default_rng(0)
    size = cap.model.config.vision_config.image_size
    pixels = torch.tensor(rng.standard_normal((n, 3, size, size)), dtype=torch.float32)
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


def memory():
    run = lambda side: subprocess.run([sys.executable, __file__, 'peak', side], capture_output=True, text=True, check=True).stdout.split()[-2:]
    (a, kept), (b, _) = ([float(o) for o in run(side)] for side in ('ours', 'theirs'))
    line('memory of the decode, beam 5', ours=round(a), peer=round(b), ratio=round(a/b, 3), unit='MB', bar='<0.4')
    line('packed copy of the decoder, once', ours=round(kept), unit='MB')


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    if sys.argv[1:2] == ['peak']: peak(sys.argv[2])
    else:
        if sys.argv[1:]: torch.set_num_threads(int(sys.argv[1]))
        repeats = int(sys.argv[2]) if sys.argv[2:] else 5
        machine()
        same_ids(); speed(repeats); vision_share(repeats); memory_rate(repeats); memory()
