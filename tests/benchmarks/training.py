"""Training: ours, and a plain loop that encodes images and text at every step as the common scripts do, in turn in one process.

    python tests/benchmarks/training.py [--threads 2] [--repeats 5] [--width 320] [--pixels 256] [--precision bf16] [--only memory ways speed floor pause] [--way LoRA] [--compile]

Width 320 is Stable Diffusion 1.5's own; without one, for each way to train the widest of which two fit into memory; width 0 is the bundled model at its own 64 pixels (for memory and ways). Random weights: speed does not depend on them.
On a GPU: width 320, 512 pixels, bf16, twenty repeats, and all but the ways, in about 100 seconds; with --compile our side is compiled. A row that fails says so, the others go on, and the exit status is 1.
"""
import argparse, dataclasses, gc, json, os, statistics, subprocess, sys, tempfile, time, traceback, warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from peft.tuners.lora import Linear as LoraLinear
from transformers import CLIPTextConfig, CLIPTextModel

from common import GPU, in_turn, line, machine, seconds

from blipbooth.all import *
from blipbooth.dreambooth import _LEAN, _halved

PLAINLY = {**{v: k for k, v in _LEAN.items()}, FusedLora: LoraLinear}  # our layers, and those of the libraries that they stand for
WIDTHS = 320, 192, 128, 64, 32  # of the UNet's first level


def shaped(width, device):
    "Stable Diffusion 1.5's layers; at a smaller width all of its parts are narrower by the same factor."
    torch.manual_seed(0)
    tok, s = load_pipeline(device='cpu').tokenizer, width/320
    hidden, vae = max(64, int(768*s)//64*64), [max(32, int(c*s)//32*32) for c in (128, 256, 512, 512)]
    tok.model_max_length = 77
    sched = DDPMScheduler(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012, clip_sample=False)
    with torch.device(device):
        text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=hidden, intermediate_size=4*hidden, num_hidden_layers=12, num_attention_heads=hidden//64, max_position_embeddings=77,
                                            bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))
        unet = UNet2DConditionModel(sample_size=64, block_out_channels=(width, 2*width, 4*width, 4*width), cross_attention_dim=hidden, attention_head_dim=8)
        auto = AutoencoderKL(block_out_channels=vae, layers_per_block=2, sample_size=512, scaling_factor=.18215, down_block_types=['DownEncoderBlock2D']*4, up_block_types=['UpDecoderBlock2D']*4)
    return StableDiffusionPipeline(auto.eval(), text.eval(), tok, unet.eval(), sched, None, None, requires_safety_checker=False).to(device)


def fits(held=16):
    "The widest model of which two fit, with so many bytes held for each parameter: 16 with gradients and moments, 5 with an adapter's."
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else next(int(o.split()[1])*1024 for o in open('/proc/meminfo') if o.startswith('MemAvailable'))
    return next((w for w in WIDTHS if 2*1.4*held*860e6*(w/320)**2 < .8*free), WIDTHS[-1])


class Few:
    "Class images that are there."
    def __init__(self, photos): self.images, self.prompts, self.kept = list(photos), ['a fox']*len(photos), [dict(hash=p.hash) for p in photos]
    def __len__(self): return len(self.images)


def concept():
    photos = load_images(subject_photos('fox'))
    return Concept(photos, 'sks', 'fox', priors=Few(photos))


def config(o, *said, pixels=None):
    return DreamBoothConfig.load(None, 'class_noun=fox', 'batch_size=2', f'resolution={pixels or o.pixels}', 'lr=1e-5', 'steps=1000000', f'mixed_precision={o.precision}', f'compile={o.compile}', *said)


def half(cfg): return dict(bf16=torch.bfloat16, fp16=torch.float16).get(cfg.mixed_precision)
def autocast(pipe, cfg): return torch.autocast(pipe.device.type, half(cfg)) if half(cfg) else nullcontext()


class Ours:
    "A step of our learner."
    def __init__(self, pipe, cfg, out=None):
        self.learn = build_learner(pipe, concept(), cfg, out)
        self.learn.net, self.learn.opt = self.learn.accelerator.prepare(self.learn.model, self.learn.opt)
        self.learn.params = [p for p in self.learn.model.parameters() if p.requires_grad]
        self.learn('restore'); self.learn('before_fit')
        self.learn.model.train()

    def close(self):
        self.learn('cleanup'); self.learn.accelerator.free_memory(); self.learn.__dict__.clear()

    def step(self):
        self.learn('before_step'); self.learn.one_step()
        self.learn.step += 1
        self.learn('after_step')


class Plain:
    "A step as the common scripts take it: pixels and captions are encoded every time; in mixed precision whatever is frozen is in half."
    def __init__(self, pipe, cfg):
        self.pipe, self.cfg, self.c, self.k = pipe, cfg, concept(), 0
        self.net = choose_parts(pipe, cfg)
        for m in self.net.modules(): m.__class__ = PLAINLY.get(type(m), type(m))
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        for p in [*self.net.parameters(), *pipe.vae.parameters()]:
            if half(cfg) and not p.requires_grad: p.data = p.data.to(half(cfg))
        self.params = [p for p in self.net.parameters() if p.requires_grad]
        self.opt, self.device = torch.optim.AdamW(parameter_groups(self.net, cfg, pipe)), pipe.device
        self.net.train()

    def batch(self):
        n, photos = self.cfg.batch_size, self.c.photos
        pick = [(self.k + i) % len(photos) for i in range(n)]
        self.k += n
        pixels = to_tensor([photos[i] for i in pick] + [self.c.priors.images[i] for i in pick], self.cfg.resolution, 'center-crop')
        ids = self.pipe.tokenizer([self.c.captions[i] for i in pick] + ['a fox']*n, padding='max_length', truncation=True, max_length=self.pipe.tokenizer.model_max_length, return_tensors='pt').input_ids
        return pixels.to(self.device, self.pipe.vae.dtype), ids.to(self.device)

    def step(self):
        pixels, ids = self.batch()
        latents = self.pipe.vae.encode(pixels).latent_dist.sample()*self.pipe.vae.config.scaling_factor
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),), device=self.device)
        with autocast(self.pipe, self.cfg):
            pred = self.pipe.unet(self.pipe.scheduler.add_noise(latents, noise, t), t, self.pipe.text_encoder(ids)[0]).sample.float()
        (a, b), (c, d) = pred.chunk(2), noise.float().chunk(2)
        loss = F.mse_loss(a, c) + F.mse_loss(b, d)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.)
        self.opt.step(); self.opt.zero_grad(set_to_none=True)
        loss.item()


class Floor:
    "UNet forward, backward and optimizer alone, on inputs that are there."
    def __init__(self, pipe, cfg):
        self.pipe, self.cfg, self.net = pipe, cfg, choose_parts(pipe, cfg)
        self.opt, n = make_optimizer(cfg, parameter_groups(self.net, cfg, pipe)), 2*cfg.batch_size
        self.x = torch.randn(n, 4, cfg.resolution//pipe.vae_scale_factor, cfg.resolution//pipe.vae_scale_factor, device=pipe.device)
        self.t = torch.randint(0, 1000, (n,), device=pipe.device)
        with torch.no_grad(): self.context = pipe.text_encoder(torch.zeros(n, pipe.tokenizer.model_max_length, dtype=torch.long, device=pipe.device))[0]
        for h in _halved(pipe, cfg): h.drop()
        self.net.train()

    def step(self):
        with autocast(self.pipe, self.cfg): pred = self.pipe.unet(self.x, self.t, self.context).sample.float()
        F.mse_loss(pred, self.x).backward()
        self.opt.step(); self.opt.zero_grad(set_to_none=True)


WAYS = {'full UNet': ['train.text_encoder=off'], 'LoRA on the UNet': ['train.unet=lora', 'train.text_encoder=off']}


def width_of(o, name): return o.width if o.width >= 0 else fits(5 if 'LoRA' in name else 16)


def free():
    gc.collect()
    if GPU: torch.cuda.empty_cache()


failed = []


def row(f, name, *args, **kw):
    "One row of the table; where it fails, a line says so."
    try: line(name, **f(*args, **kw))
    except Exception as e:
        failed.append(name)
        traceback.print_exc()
        line(name, error=f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}')
    free()


def against(pipe, other, cfg, repeats, bar, digits=3, less=False):
    "Seconds of a step of ours and of the other side, and their ratio."
    def one(*sides):
        made = [side(pipe(), dataclasses.replace(cfg, compile=side is Ours and cfg.compile)) for side in sides]
        for m in made*3*GPU: m.step()  # kernels are chosen and memory is taken in the first steps
        times = in_turn(*(m.step for m in made), repeats)
        for m in made: getattr(m, 'close', m.__dict__.clear)()
        free()
        return times
    a, b = one(Ours, other)
    if not GPU:  # what is made first in a process lies better in memory, so each side is made first once; the means of the two medians
        c, d = one(other, Ours)
        a, b = (a + d)/2, (b + c)/2
    return dict(ours=round(a, 5), peer=round(b, 5), ratio=round(a/b if less else b/a, digits), unit='s', bar=bar)


def shape(width, o): return f"width {width}, {o.pixels} pixels{'' if o.precision == 'no' else ', ' + o.precision}{', compiled' if o.compile else ''}"


def speed(o):
    for (name, said), bar in zip(WAYS.items(), (1.35, 1.5)):
        if o.way and o.way not in name: continue
        width = width_of(o, name)
        row(against, f'{name}, a step, {shape(width, o)}', lambda: shaped(width, o.device), Plain, config(o, *said), o.repeats, bar)
    if o.way and o.way not in 'bundled': return
    row(against, f"bundled model, UNet and text encoder, a step{', compiled' if o.compile else ''}", lambda: load_pipeline(device=o.device), Plain, config(o, pixels=64), 3*o.repeats, 1.3)


def floor(o):
    for name, said in WAYS.items():
        if o.way and o.way not in name: continue
        width = width_of(o, name)
        row(against, f'{name}, a step against the floor, {shape(width, o)}', lambda: shaped(width, o.device), Floor, config(o, *said, 'clip=0'), o.repeats, '<1.08', 4, True)


def pauses(o, width):
    "Seconds of saving a checkpoint, and of writing its bytes once."
    side, ours, once = Ours(shaped(width, o.device), config(o, *WAYS['full UNet'])), [], []
    side.step()
    with tempfile.TemporaryDirectory() as d:
        for i in range(2 if GPU else o.repeats):
            t = time.perf_counter(); save_checkpoint(side.learn, Path(d)/'step'); ours.append(time.perf_counter() - t)
            data = b''.join(f.read_bytes() for f in (Path(d)/'step').iterdir())
            t = time.perf_counter(); atomic_write(Path(d)/'once', data); once.append(time.perf_counter() - t)
    side.close()
    a, b = statistics.median(ours), statistics.median(once)
    return dict(mb=len(data)//10**6, ours=round(a, 4), peer=round(b, 4), ratio=round(a/b, 3), unit='s', bar='<1.5')


def pause(o): row(pauses, "a checkpoint's pause against writing its bytes once", o, min(width_of(o, 'full'), 128))


def status(key): return next(int(x.split()[1])/1024 for x in open('/proc/self/status') if x.startswith(key))


def peak(o, which, said, width):
    "MB at the peak of some steps, from before the model was made, and the seconds of the last step; on a CPU of this process, which should have done nothing else."
    pipe_of = (lambda: load_pipeline(device=o.device)) if width == 0 else lambda: shaped(width, o.device)
    cfg = config(o, *said)
    first = Ours(load_pipeline(device=o.device), config(o, *said, pixels=64))  # what libraries hold once they have trained is not the model's
    first.step(); first.close()
    del first
    free()
    if GPU: torch.cuda.reset_peak_memory_stats()
    else: Path('/proc/self/clear_refs').write_text('5')
    before = status('VmRSS')
    side = (Ours if which == 'ours' else Plain)(pipe_of(), cfg)
    for _ in range(3): seconds_of_it = seconds(side.step)
    return dict(mb=torch.cuda.max_memory_allocated()/2**20 if GPU else status('VmHWM') - before, s=seconds_of_it)


def measured(o, which, said, width):
    if GPU: free(); return peak(o, which, said, width)
    # what is freed goes back at once: the peak is of what is in use (the C library would keep some 30 MB of small blocks for later)
    live = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '131072', 'MALLOC_ARENA_MAX': '1'}
    args = [sys.executable, __file__, '--peak', which, '--width', str(width), '--pixels', str(o.pixels), '--precision', o.precision, '--threads', str(o.threads), *['--compile']*o.compile, '--said', *said]
    res = subprocess.run(args, capture_output=True, text=True, env=live)
    if res.returncode: raise RuntimeError((res.stderr.strip().splitlines() or ['it was killed'])[-1])
    return json.loads(res.stdout.splitlines()[-1])


def two_peaks(o, said, width):
    a, b = (measured(o, which, said, width)['mb'] for which in ('ours', 'plain'))
    return dict(ours=round(a), peer=round(b), ratio=round(a/b, 3), unit='MB', bar='<0.75', **({'limit': '<8192'} if GPU else {}))


def memory(o):
    width = width_of(o, 'LoRA')
    row(two_peaks, f'LoRA on the UNet, peak memory, {shape(width, o)}', o, WAYS['LoRA on the UNet'], width)


def ways(o):
    "Every combination of what trains, and what activations computed twice save: what the estimate says, what is measured."
    every = [(unet, text, token) for unet in ('full', 'lora', 'off') for text in ('full', 'lora', 'off') for token in ('true', 'false')]
    every = [w for w in every if w != ('off', 'off', 'false') and w[1:] != ('full', 'true')]
    rows = {f'UNet {u}, text encoder {t}, token {k}': [f'train.unet={u}', f'train.text_encoder={t}', f'train.token={k}'] for u, t, k in every}
    rows = {**rows, **{f'{name}, gradient checkpointing': [*said, 'gradient_checkpointing=true'] for name, said in list(rows.items()) if 'text encoder off, token false' in name}}
    whole, width = [], width_of(o, 'full')
    def one(said):
        m = measured(o, 'ours', said, width)
        pipe = load_pipeline(device='cpu') if width == 0 else shaped(width, 'cpu')
        e = estimate(pipe, config(o, *said)).peak/2**20
        whole.append(m['mb'])
        return dict(ours=round(m['mb']), peer=round(whole[0]), ratio=round(m['mb']/whole[0], 3), unit='MB', estimate=round(e), seconds=round(m['s'], 3))
    for name, said in rows.items(): row(one, name, said)


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    os.environ.setdefault('BLIPBOOTH_QUIET', '1')
    p = argparse.ArgumentParser()
    for k, v in dict(threads=0, repeats=0, width=-1, pixels=0).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--precision', choices=['no', 'bf16', 'fp16'], default='bf16' if GPU else 'no')
    p.add_argument('--only', nargs='+', default=['memory', 'speed', 'floor', 'pause'] + ['ways']*(not GPU))
    p.add_argument('--compile', action='store_true', help='compile our side')
    p.add_argument('--way', help='for speed and floor: full, LoRA or bundled alone')
    p.add_argument('--peak', choices=['ours', 'plain'])
    p.add_argument('--said', nargs='*', default=[])
    o = p.parse_args()
    o.device, o.repeats = 'cuda' if GPU else 'cpu', o.repeats or (20 if GPU else 5)
    if GPU and o.width < 0: o.width = 320
    if o.threads: torch.set_num_threads(o.threads)
    o.pixels = o.pixels or (64 if o.width == 0 else 512 if GPU else 256)
    if o.peak: print(json.dumps(peak(o, o.peak, o.said, o.width)))
    else:
        machine()
        for f in o.only: globals()[f](o)
        sys.exit(bool(failed))
