"""The sampling loop against diffusers' pipeline: `python tests/benchmarks/sampling.py [REPEATS] [bundled|sd15 ...] [--only speed batches equal]`.

Two models: the bundled one, and a random one of Stable Diffusion 1.5's shape (timed on a GPU with 64 × 64 latents in float16; on a CPU, where it
takes ten minutes, with 32 × 32 in float32, fewer steps and settings). Ours and theirs in turn in one process, the median of the repeats of each;
seconds are wall time. Pictures are compared in float32, on a GPU without TF32. JSON lines; a row that fails says why, the rest goes on, and the
exit status is 1."""
import argparse, copy, os, sys, traceback
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import diffusers, numpy as np, torch
from PIL import Image

from common import GPU, line, machine, race

from blipbooth.core import generator, randn, subject_photos
from blipbooth.images import load_images
from blipbooth.matching import Matcher
from blipbooth.sampling import ask, decode, encode_prompts, load_pipeline, make_scheduler, sample, schedulers, tune, _hushed

FOX = 'a fox on a purple background'
failed = []


def tried(f, name, *args, **kwargs): # a row of the table, or a line that says why there is none
    try: return f(name, *args, **kwargs)
    except Exception as e:
        traceback.print_exc()
        failed.append(name)
        line(name, error=f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}', **({'model': kwargs['model']} if 'model' in kwargs else {}))
        if GPU: torch.cuda.empty_cache()


@contextmanager
def exact(): # convolutions round to TF32 on a GPU unless told otherwise
    was = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    try: yield
    finally: torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = was


def sd15(side): # the shape of Stable Diffusion 1.5, random weights; the tokenizer is the bundled one, so prompts are short
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    tokenizer = load_pipeline(device='cpu').tokenizer
    tokenizer.model_max_length = 77
    with torch.device('cuda') if GPU else nullcontext(): # made where they are used: a billion random numbers take a CPU long
        text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77))
        unet = diffusers.UNet2DConditionModel(sample_size=side, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280))
        vae = diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=8*side, norm_num_groups=32,
            down_block_types=['DownEncoderBlock2D']*4, up_block_types=['UpDecoderBlock2D']*4, scaling_factor=0.18215)
    scheduler = diffusers.PNDMScheduler(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    scheduler.register_to_config(clip_sample=False) # as Stable Diffusion's own settings say; schedulers of other kinds take it over
    pipe = diffusers.StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    for o in (text, unet, vae): o.eval().requires_grad_(False)
    return pipe.to('cuda', torch.float16) if GPU else pipe


def peer(pipe, name='StableDiffusionPipeline', scheduler=None): # diffusers' pipeline of the same parts
    with _hushed(): kind = getattr(diffusers, name)
    other = kind(**{**pipe.components, 'scheduler': make_scheduler(pipe, scheduler)}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def noises(pipe, n, seed=0): # the noise that `sample` starts from
    side = pipe.unet.config.sample_size
    return torch.stack([randn((4, side, side), 'sample', seed, i) for i in range(n)]).to(pipe.device, pipe.unet.dtype)


def theirs(pipe, n=1, steps=4, guidance=5., negative=None, scheduler=None, seed=0, photo=None, mask=None, strength=0.6, prompt=FOX):
    "diffusers' pipelines, from the noise that `sample` uses."
    name = 'StableDiffusionPipeline' if photo is None else 'StableDiffusionImg2ImgPipeline' if mask is None else 'StableDiffusionInpaintPipeline'
    other, x, later = peer(pipe, name, scheduler), noises(pipe, n, seed), [generator('sample steps', seed, i) for i in range(n)]
    kw = dict(num_inference_steps=steps, num_images_per_prompt=n, guidance_scale=guidance, negative_prompt=negative)
    if photo is None: return other(prompt, latents=x, generator=later, **kw).images
    if mask is not None: kw.update(mask_image=mask, height=photo.height, width=photo.width)
    takes = 'generator' in other.scheduler.step.__code__.co_varnames
    with patch(f'{type(other).__module__}.randn_tensor', lambda *a, **k: x), patch.object(other, 'prepare_extra_step_kwargs', lambda *a: dict(generator=later) if takes else {}):
        return other(prompt, image=[photo]*n, strength=strength, generator=[generator('sample init', seed, i) for i in range(n)], **kw).images


def apart(a, b): return max(int(np.abs(np.asarray(i, int) - np.asarray(j, int)).max()) for i, j in zip(a, b, strict=True))


def equal(title, pipe, model='bundled', n=2, steps=5, only=None):
    side = pipe.unet.config.sample_size*pipe.vae_scale_factor
    photo = load_images(subject_photos('fox'))[0].image.resize((side, side))
    mask = np.zeros((side, side, 3), np.uint8)
    mask[:side//2] = 255
    ways = {**{f'guidance {g}': dict(guidance=g) for g in (1, 5, 12)}, 'negative': dict(guidance=5., negative='a pizza'),
            'image-to-image': dict(guidance=5., photo=photo, strength=0.6),
            'inpainting': dict(guidance=5., photo=photo, mask=Image.fromarray(mask).convert('L'), strength=1.)}
    def differ(name, photo=None, **kw):
        kw.update(n=n, steps=steps, scheduler=name)
        return apart(sample(pipe, FOX, **kw, **(dict(init=photo) if photo else {})), theirs(pipe, photo=photo, **kw))
    one = lambda title, name, kw: differ(name, **kw)
    with exact(): worst = {name: {k: tried(one, f'{title}: {name}, {k}', name, kw) for k, kw in ways.items() if not only or k in only} for name in schedulers()}
    known = [v for o in worst.values() for v in o.values() if v is not None]
    line(title, ours=max(known), unit='of 255', bar='<=1', settings=len(known), model=model, each=worst)


def same_for_every_batch(title, pipe, model, n=8, steps=10):
    latents = {b: sample(pipe, FOX, n=n, steps=steps, batch=b, return_latents=True) for b in (1, 3, 8)}
    prints = {b: np.stack([np.asarray(o) for o in decode(pipe, x)]) for b, x in latents.items()}
    line(f'{title}: latents', ours=max(float((latents[b] - latents[8]).abs().max()) for b in (1, 3)), unit='max difference', bar='<=0.0001', model=model)
    line(f'{title}: pixels', ours=round(min(float((prints[b] == prints[8]).mean()) for b in (1, 3)), 5), unit='share equal', bar=0.999, model=model)


def memory(title, ours, theirs, model): # after the races, so that both are warm
    peaks = []
    for f in (ours, theirs):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        f()
        peaks.append(round(torch.cuda.max_memory_allocated()/2**20))
    line(title, ours=peaks[0], peer=peaks[1], ratio=round(peaks[0]/peaks[1], 3), unit='MiB', model=model)


def speed(pipe, model, repeats, steps=20):
    b, other = 4, peer(pipe)
    x, t = noises(pipe, b), torch.tensor(500, device=pipe.device)
    c, u = encode_prompts(pipe, [FOX]*b), encode_prompts(pipe, ['']*b)
    guided = lambda b: (lambda: ask(pipe, x[:b], t, [u[:b], c[:b]]), lambda: [ask(pipe, x[:b], t, [o[:b]]) for o in (u, c)], 5*repeats)
    tried(race, 'batched guidance against two forwards, batch 1', *guided(1), bar=1.5 if GPU else None, model=model)
    tried(race, f'batched guidance against two forwards, batch {b}', *guided(b), model=model)

    ours, pipeline = lambda pipe=pipe: sample(pipe, FOX, n=8, steps=steps), lambda: other(FOX, latents=noises(pipe, 8), num_inference_steps=steps, num_images_per_prompt=8, guidance_scale=7.5).images
    tried(race, 'loop against pipeline, n=8', ours, pipeline, repeats, bar=1.1, model=model)
    if GPU:
        tune(pipe, graph=False)
        tried(race, 'loop without a CUDA graph against pipeline, n=8', ours, pipeline, repeats, model=model)
        tune(pipe)
        fast = tune(copy.deepcopy(pipe), channels_last=True) # the memory order that GPUs convolve fastest in
        tried(race, 'loop with channels last against pipeline, n=8', lambda: ours(fast), pipeline, repeats, bar=1.1, model=model)
        del fast
        tried(memory, 'peak memory of loop and pipeline, n=8', ours, pipeline, model=model)
    tried(race, 'interval (0.2, 0.5) against the whole way, n=8', lambda: sample(pipe, FOX, n=8, steps=30, interval=(0.2, 0.5)), lambda: sample(pipe, FOX, n=8, steps=30), repeats, bar=1.3, model=model)
    if model == 'sd15': return
    tried(race, 'loop against one image at a time, n=8', ours, lambda: [sample(pipe, FOX, index=i, steps=steps) for i in range(8)], repeats, model=model)
    tried(prompt_fidelity, 'prompt fidelity, interval (0.2, 0.5) against the whole way', pipe)


def prompt_fidelity(title, pipe, n=2, steps=30): # the other half of the interval's bar: the matcher's similarity of print and prompt, with and without
    prompts = [f'a {o} on a {c} background' for o in ('fox', 'pizza', 'robot', 'owl') for c in ('purple', 'green', 'red', 'yellow')]
    matcher, out = Matcher.from_pretrained(), {}
    for name, interval in dict(whole=None, interval=(0.2, 0.5)).items():
        images = sample(pipe, prompts, n=n, steps=steps, interval=interval)
        sims = matcher.similarity(images, prompts).cpu().reshape(len(prompts), n, -1)
        out[name] = round(float(torch.stack([sims[i, :, i].mean() for i in range(len(prompts))]).mean()), 4)
    line(title, ours=out['interval'], peer=out['whole'], ratio=round(out['interval']/out['whole'], 4), unit='cosine', images=n*len(prompts), bar=0.99)


def bundled_model(repeats, only):
    pipe = load_pipeline()
    if 'speed' in only: speed(pipe, 'bundled', repeats)
    if 'batches' in only:
        with exact(): tried(same_for_every_batch, 'image i for batches of 1, 3 and 8', pipe, model='bundled')
        if GPU: tried(same_for_every_batch, 'image i for batches of 1, 3 and 8, with TF32 as torch has it', pipe, model='bundled')
    if 'equal' in only: tried(equal, 'max pixel difference from diffusers', pipe, model='bundled')


def sd15_shape(repeats, only):
    pipe, few = sd15(64 if GPU else 32), ('guidance 5', 'image-to-image', 'inpainting') if GPU else ('guidance 5', 'image-to-image')
    if 'speed' in only:
        if GPU: speed(pipe, 'sd15', max(2, repeats - 1))
        else: tried(race, 'loop against pipeline, SD-1.5 shape, n=2, 256 pixels', lambda: sample(pipe, FOX, n=2, steps=5), lambda: theirs(pipe, n=2, steps=5, guidance=7.5), repeats, bar=1.1, model='sd15')
    pipe.to(torch.float32)
    pipe.unet.register_to_config(sample_size=32)
    if 'batches' in only and GPU:
        with exact(): tried(same_for_every_batch, 'image i for batches of 1, 3 and 8, SD-1.5 shape', pipe, model='sd15', steps=5)
    if 'equal' in only: tried(equal, 'max pixel difference from diffusers, SD-1.5 shape', pipe, model='sd15', n=1, steps=3 if GPU else 2, only=few)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('repeats', nargs='?', type=int, default=3)
    ap.add_argument('models', nargs='*', default=['bundled', 'sd15'])
    ap.add_argument('--only', nargs='+', choices=('speed', 'batches', 'equal'), default=('speed', 'batches', 'equal'))
    a = ap.parse_args()
    os.environ.setdefault('BLIPBOOTH_QUIET', '1')
    machine()
    torch.set_grad_enabled(False)
    for name, f in dict(bundled=bundled_model, sd15=sd15_shape).items():
        if name in a.models: tried(lambda name: f(a.repeats, a.only), f'the whole of {name}')
        if GPU: torch.cuda.empty_cache()
    if failed: sys.exit(1)


if __name__ == '__main__': main()
