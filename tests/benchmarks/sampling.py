"""The sampling loop against diffusers' pipeline: `python tests/benchmarks/sampling.py [REPEATS] [bundled|sd15 ...]`.

Two models: the bundled one, and a random one of Stable Diffusion 1.5's shape (on a GPU 64 × 64 latents in float16; on a CPU, where it takes
six minutes, 32 × 32 in float32, fewer steps and settings). Ours and theirs in turn
in one process, the median of the repeats of each; seconds are wall time. Pictures are compared in float32. JSON lines."""
import copy, sys
from unittest.mock import patch

import diffusers, numpy as np, torch
from PIL import Image

from common import GPU, line, machine, race

from blipbooth.core import generator, randn, subject_photos
from blipbooth.images import load_images
from blipbooth.matching import Matcher
from blipbooth.sampling import ask, decode, encode_prompts, load_pipeline, make_scheduler, sample, schedulers, tune, _hushed

FOX = 'a fox on a purple background'


def sd15(side): # the shape of Stable Diffusion 1.5, random weights; the tokenizer is the bundled one, so prompts are short
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    small = load_pipeline(device='cpu')
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77))
    unet = diffusers.UNet2DConditionModel(sample_size=side, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280))
    vae = diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=8*side, norm_num_groups=32,
        down_block_types=['DownEncoderBlock2D']*4, up_block_types=['UpDecoderBlock2D']*4, scaling_factor=0.18215)
    scheduler = diffusers.PNDMScheduler(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    small.tokenizer.model_max_length = 77
    pipe = diffusers.StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=small.tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return pipe.to('cuda', torch.float16) if GPU else pipe


def theirs(pipe, n=1, steps=4, guidance=5., negative=None, scheduler=None, seed=0, photo=None, mask=None, strength=0.6, prompt=FOX):
    "diffusers' pipelines, from the noise that `sample` uses."
    name = 'StableDiffusionPipeline' if photo is None else 'StableDiffusionImg2ImgPipeline' if mask is None else 'StableDiffusionInpaintPipeline'
    with _hushed(): kind = getattr(diffusers, name)
    other = kind(**{**pipe.components, 'scheduler': make_scheduler(pipe, scheduler)}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size
    x = torch.stack([randn((4, side, side), 'sample', seed, i) for i in range(n)]).to(pipe.device, pipe.unet.dtype)
    later = [generator('sample steps', seed, i) for i in range(n)]
    kw = dict(num_inference_steps=steps, num_images_per_prompt=n, guidance_scale=guidance, negative_prompt=negative)
    if photo is None: return other(prompt, latents=x, generator=later, **kw).images
    if mask is not None: kw.update(mask_image=mask, height=photo.height, width=photo.width)
    takes = 'generator' in other.scheduler.step.__code__.co_varnames
    with patch(f'{kind.__module__}.randn_tensor', lambda *a, **k: x), patch.object(other, 'prepare_extra_step_kwargs', lambda *a: dict(generator=later) if takes else {}):
        return other(prompt, image=[photo]*n, strength=strength, generator=[generator('sample init', seed, i) for i in range(n)], **kw).images


def apart(a, b): return max(int(np.abs(np.asarray(i, int) - np.asarray(j, int)).max()) for i, j in zip(a, b, strict=True))


def equal(pipe, model='bundled', n=2, steps=5, only=None):
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
    worst = {name: {k: differ(name, **kw) for k, kw in ways.items() if not only or k in only} for name in schedulers()}
    line('max pixel difference from diffusers' + (', SD-1.5 shape' if model == 'sd15' else ''), ours=max(v for o in worst.values() for v in o.values()), unit='of 255', bar='<=1', settings=sum(map(len, worst.values())), model=model, each=worst)


def same_for_every_batch(pipe, n=8, steps=10):
    latents = {b: sample(pipe, FOX, n=n, steps=steps, batch=b, return_latents=True).float().cpu() for b in (1, 3, 8)}
    with torch.no_grad(): prints = {b: np.stack([np.asarray(o) for o in decode(pipe, x)]) for b, x in latents.items()}
    line('image i for batches of 1, 3 and 8: latents', ours=max(float((latents[b] - latents[8]).abs().max()) for b in (1, 3)), unit='max difference', bar='<=0.0001')
    line('image i for batches of 1, 3 and 8: pixels', ours=round(min(float((prints[b] == prints[8]).mean()) for b in (1, 3)), 5), unit='share equal', bar=0.999)


@torch.no_grad()
def speed(pipe, model, repeats):
    b, side = (4, pipe.unet.config.sample_size)
    x = torch.stack([randn((4, side, side), 'speed', i) for i in range(b)]).to(pipe.device, pipe.unet.dtype)
    c, u = encode_prompts(pipe, [FOX]*b), encode_prompts(pipe, ['']*b)
    race('batched guidance against two forwards, batch 1', lambda: ask(pipe, x[:1], 500, [u[:1], c[:1]]), lambda: [ask(pipe, x[:1], 500, [o[:1]]) for o in (u, c)], 5*repeats, bar=1.5 if GPU else None, model=model)
    race(f'batched guidance against two forwards, batch {b}', lambda: ask(pipe, x, 500, [u, c]), lambda: [ask(pipe, x, 500, [o]) for o in (u, c)], 5*repeats, model=model)
    race('loop against pipeline, n=8', lambda: sample(pipe, FOX, n=8, steps=20), lambda: theirs(pipe, n=8, steps=20, guidance=7.5), repeats, bar=1.1, model=model)
    if GPU: # the memory order that GPUs convolve fastest in
        fast = tune(copy.deepcopy(pipe), channels_last=True)
        race('loop with channels last against pipeline, n=8', lambda: sample(fast, FOX, n=8, steps=20), lambda: theirs(pipe, n=8, steps=20, guidance=7.5), repeats, model=model)
        del fast
    race('loop against one image at a time, n=8', lambda: sample(pipe, FOX, n=8, steps=20), lambda: [sample(pipe, FOX, index=i, steps=20) for i in range(8)], repeats, model=model)
    race('interval (0.2, 0.6) against the whole way, n=8', lambda: sample(pipe, FOX, n=8, steps=30, interval=(0.2, 0.6)), lambda: sample(pipe, FOX, n=8, steps=30), repeats, bar=1.3, model=model)
    if model == 'bundled': prompt_fidelity(pipe)


def prompt_fidelity(pipe, n=2, steps=30): # the other half of the interval's bar: the matcher's similarity of print and prompt, with and without
    prompts = [f'a {o} on a {c} background' for o in ('fox', 'pizza', 'robot', 'owl') for c in ('purple', 'green', 'red', 'yellow')]
    matcher, out = Matcher.from_pretrained(), {}
    for name, interval in dict(whole=None, interval=(0.2, 0.6)).items():
        images = sample(pipe, prompts, n=n, steps=steps, interval=interval)
        sims = matcher.similarity(images, prompts).cpu().reshape(len(prompts), n, -1)
        out[name] = round(float(torch.stack([sims[i, :, i].mean() for i in range(len(prompts))]).mean()), 4)
    line('prompt fidelity, interval (0.2, 0.6) against the whole way', ours=out['interval'], peer=out['whole'], ratio=round(out['interval']/out['whole'], 4), unit='cosine', images=n*len(prompts), bar=0.99)


def main(repeats=3, models=('bundled', 'sd15')):
    machine()
    torch.set_grad_enabled(False)
    if 'bundled' in models:
        pipe = load_pipeline()
        speed(pipe, 'bundled', repeats)
        same_for_every_batch(pipe)
        equal(pipe)
    if 'sd15' in models:
        pipe = sd15(64 if GPU else 32)
        if GPU: speed(pipe, 'sd15', repeats)
        else: race('loop against pipeline, SD-1.5 shape, n=2, 256 pixels', lambda: sample(pipe, FOX, n=2, steps=5), lambda: theirs(pipe, n=2, steps=5, guidance=7.5), repeats, model='sd15')
        equal(pipe.to(torch.float32), 'sd15', **({} if GPU else dict(n=1, steps=2, only=('guidance 5', 'image-to-image'))))
        if GPU: same_for_every_batch(pipe)


if __name__ == '__main__': main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, tuple(sys.argv[2:]) or ('bundled', 'sd15'))
