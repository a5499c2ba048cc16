"Class images made by several processes, and by killed ones: the same set as by one that was left alone."
import os, signal, subprocess, sys, time

from blipbooth.core import file_hash, read_jsonl

env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PYTHONPATH')} | dict(OMP_NUM_THREADS='1')  # as accelerate sets it for processes side by side


def start(out, cwd): # a tight filter, so that the set needs more tries than it has pictures
    args = ['priors', 'owl', '--n', 6, '--steps', 6, '--batch', 2, '--threshold', .4, '--dedupe', .995, '--out', out]
    return subprocess.Popen([sys.executable, '-m', 'blipbooth.cli', *map(str, args)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def made(folder):
    records = read_jsonl(folder/'manifest.jsonl')
    assert sum(r['kept'] for r in records) == 6
    assert sorted(o.name for o in folder.glob('*.png')) == [r['file'] for r in records if r['kept']]
    assert all(file_hash(folder/r['file']) == r['hash'] for r in records)
    return (folder/'manifest.jsonl').read_bytes()


def done(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def test_shared_or_killed_it_is_the_same_set(tmp_path):
    done(start(tmp_path/'alone', tmp_path))
    whole = made(tmp_path/'alone')

    two = [start(tmp_path/'shared', tmp_path) for _ in range(2)]
    for o in two: done(o)
    assert made(tmp_path/'shared') == whole

    cut, log, deadline = start(tmp_path/'cut', tmp_path), tmp_path/'cut'/'tries'/'log.jsonl', time.time() + 300
    while len(read_jsonl(log)) < 2 and cut.poll() is None and time.time() < deadline: time.sleep(.005)
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    assert not (tmp_path/'cut'/'manifest.jsonl').exists()
    again = start(tmp_path/'cut', tmp_path)
    done(again)
    assert made(tmp_path/'cut') == whole
