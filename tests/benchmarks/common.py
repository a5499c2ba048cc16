"""What the benchmarks share: two things timed in turn in one process, results as JSON lines."""
import json, platform, re, statistics, time
from pathlib import Path

import torch

GPU = torch.cuda.is_available()


def line(name, **more):
    "Print one result."
    print(json.dumps(dict(name=name, **more)), flush=True)


def machine():
    "Print what the results were measured on."
    cpu = re.search('model name\\s*: (.*)', Path('/proc/cpuinfo').read_text()) if Path('/proc/cpuinfo').exists() else None
    bf16 = ', AMX' if 'amx_bf16' in (Path('/proc/cpuinfo').read_text() if cpu else '') else ''
    where = torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} threads of {cpu[1] if cpu else platform.processor()}{bf16}"
    print(json.dumps(dict(machine=f'{where}; torch {torch.__version__}, Python {platform.python_version()}')), flush=True)


def seconds(f):
    "How long a call takes."
    if GPU: torch.cuda.synchronize()
    t = time.perf_counter()
    f()
    if GPU: torch.cuda.synchronize()
    return time.perf_counter() - t


def in_turn(f, g, repeats):
    "Median seconds of two functions, called in turn after one call of each to warm up."
    f(), g()
    return [statistics.median(o) for o in zip(*((seconds(f), seconds(g)) for _ in range(repeats)))]


def race(name, ours, peer, repeats, **more):
    "Time ours and the peer's in turn and print both, and how many times quicker ours is."
    a, b = in_turn(ours, peer, repeats)
    line(name, ours=round(a, 4), peer=round(b, 4), ratio=round(b/a, 3), unit='s', **more)
