"""train.py from its command line: the notebook's runs, what is printed, the step, sampling; bench.py; machine.py."""

import contextlib
import io
import itertools
import json
import math
import platform
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, MEASURED_SPEEDUP, REPO, SMALL, assert_same
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import machine
import sample
import train
from checkpoint import load, save
from data import open_corpus
from model import Transformer

NOTEBOOK = {  # its words for its runs
    'sgd': '6 layer transformer (1863025 parameters), batch size 20, SGD learning rate 5.0, dropout 0.2',
    'adam': '6 layer transformer (1863025 parameters), batch size 20, Adam learning rate 1e-4, dropout 0.2',
    'cosine': '6 layer transformer (1863025 parameters), batch size 20, Adam learning rate 1e-4, dropout 0.2, '
    'cosine learning rate schedule',
    'flash': '6 layer (flash attention) transformer (1658800 parameters), rotary position embeddings, batch size 20, '
    'Adam learning rate 1e-4, dropout 0.2, cosine learning rate schedule',
    'weight_decay': '6 layer (flash attention) transformer (1658800 parameters), rotary position embeddings, '
    'batch size 20, Adam learning rate 1e-4, dropout 0.0, weight decay 0.1, cosine learning rate schedule',
    'dropout_weight_decay': '6 layer (flash attention) transformer (1658800 parameters), rotary position embeddings, '
    'batch size 20, Adam learning rate 1e-4, dropout 0.2, weight decay 0.1, cosine learning rate schedule',
    'ema': '6 layer (flash attention) transformer (1658800 parameters), rotary position embeddings, batch size 20, '
    'Adam learning rate 1e-4, dropout 0.0, weight decay 0.1, cosine learning rate schedule, ema',
    'swiglu': '6 layer (flash attention) transformer (2102272 parameters), swiglu activation, rotary position '
    'embeddings, batch size 20, Adam learning rate 1e-4, dropout 0.0, weight decay 0.1, cosine learning rate schedule',
    'deep': '8 layer (flash attention) transformer (2142800 parameters), rotary position embeddings, batch size 20, '
    'Adam learning rate 1e-4, dropout 0.0, weight decay 0.1, cosine learning rate schedule',
    'wide': '5 layer (flash attention) transformer (2042360 parameters), model width 512, rotary position embeddings, '
    'batch size 20, Adam learning rate 1e-4, dropout 0.0, weight decay 0.1, cosine learning rate schedule',
    'swiglu_18': '18 layer (flash attention) transformer (15669248 parameters), swiglu activation, model width 768, '
    'rotary position embeddings, batch size 20, Adam learning rate 1e-4, dropout 0.0, weight decay 0.1, '
    'cosine learning rate schedule',
    'warmup': '6 layer (flash attention) transformer (2102272 parameters), swiglu activation, rotary position '
    'embeddings, batch size 20, Adam learning rate 1e-4, dropout 0.0, weight decay 0.1, cosine learning rate schedule '
    'with warmup',
    'learning_rate': '6 layer (flash attention) transformer (2102272 parameters), swiglu activation, rotary position '
    'embeddings, batch size 20, Adam learning rate 3e-4, dropout 0.0, weight decay 0.1, cosine learning rate schedule '
    'with warmup',
    # the notebook itself leaves this width out
    'swiglu_23': '23 layer (flash attention) transformer (97198592 parameters), swiglu activation, model width 2048, '
    'rotary position embeddings, batch size 20, Adam learning rate 3e-4, dropout 0.0, weight decay 0.1, '
    'cosine learning rate schedule with warmup',
    'learned': '6 layer (flash attention) transformer (2102272 parameters), swiglu activation, learned position '
    'embeddings, batch size 20, Adam learning rate 3e-4, dropout 0.0, weight decay 0.1, cosine learning rate schedule '
    'with warmup',
}


def main(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, 'argv', [f'{module.__name__}.py', *arguments])
    module.main()


# ---- the notebook ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', NOTEBOOK)
def test_description_and_count_are_the_notebooks(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    main(monkeypatch, train, f'{REPO}/config/{name}.py', '--max_iters=0', '--device=cpu')
    assert capsys.readouterr().out == f'run: {NOTEBOOK[name]}\n'
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_trains(name, run):
    small = [flag for flag in SMALL if 'learning_rate' not in flag]
    out = run(f'{REPO}/config/{name}.py', *small, '--max_iters=2', f'--out_dir=out/config_{name}')
    losses = re.findall(r'loss: (\d+\.\d\d)', out)
    assert losses and all(0 < float(loss) < 15 for loss in losses)
    assert ('ema_loss' in out) == (name == 'ema')
    assert load(f'out/config_{name}')['knobs']['batch_size'] == 4


# ---- what is printed -----------------------------------------------------------------------------------------------


def test_a_run_says_what_it_does(run):
    out = run('--out_dir=out/says', '--max_iters=10', '--ema_decay=0.9')
    lines = out.splitlines()
    assert lines[0].startswith('run: 2 layer (flash attention) transformer (')
    assert lines[1] == 'device: cpu, float32' and lines[2].startswith('attention: sdpa (')
    assert re.fullmatch(
        r'corpus: .*, [\d,]+ tokens, \d+ batches per epoch, 10 in all \(by max_iters, not by epochs\)', lines[3]
    )
    assert re.match(r'epoch  1 \|     5/\d+ batches \| lr \S+ \| ms/batch +\S+ \| loss +\S+ \| gradient norm', lines[4])
    (result,) = [line for line in lines if ' ema_loss: ' in line]
    assert re.fullmatch(r'step 10 loss: \d\.\d\d ema_loss: \d\.\d\d \(0\.\d+ epochs\)', result)
    details = lines[lines.index(result) + 1]
    assert all(word in details for word in ('training loss', 'bits per byte', 'tokens/s'))
    *_, more, curve, on = lines
    assert more == 'sample more:   python sample.py --out_dir=out/says'
    assert curve == 'see its curve: python plot.py out/says'
    assert on.startswith('train on:      python train.py ') and ' --max_iters=20  # a longer cosine' in on
    assert 'minutes left' not in out


@pytest.mark.parametrize('block_size', [16, 256])
def test_a_long_run_on_a_cpu_says_how_long_and_what_helps(run, block_size):
    """A batch as small as config/cpu.py's cannot be helped by config/cpu.py."""
    out = run('--out_dir=out/long', '--overwrite', '--max_iters=100000000', f'--block_size={block_size}', stop_at=10)
    hints = re.findall(r'\n    about \d+ minutes left; config/cpu.py after the config makes it a short run\n', out)
    assert len(hints) == (block_size == 256)


@pytest.mark.parametrize(('threads', 'slower', 'said'), [(2, 20, 1), (2, 2, 0), (1, 20, 0)])
def test_steps_that_become_much_slower_are_said_once(run, monkeypatch, threads, slower, said):
    clock, train_step = [0.0], train.Run.train_step

    def timed_step(run):
        clock[0] += 0.1 * (slower if run.step >= 10 else 1)
        return train_step(run)

    monkeypatch.setattr(train.Run, 'train_step', timed_step)
    monkeypatch.setattr(train, 'time', SimpleNamespace(perf_counter=lambda: clock[0], monotonic=time.monotonic))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    run('--out_dir=out/slower', '--overwrite', '--max_iters=30', stop_at=4)  # its fifth step alone tells nothing
    out = run('--out_dir=out/slower', '--init_from=resume', '--max_iters=30')
    hints = re.findall('\n    20 times as slow as before: .* Ctrl-C, then (python train.py .*--threads=1)\n', out)
    assert len(hints) == out.count('as slow as before') == said
    if said:
        assert 'resumed at step 30 of 30: nothing is left to train' in run(*hints[0].split()[2:])


def test_the_scale_multiplies_both_rates(run):
    knobs = ['--learning_rate=1e-3', '--min_lr=1e-4', '--learning_rate_scale=3', '--max_iters=5']
    out = run('--out_dir=out/scale', '--optimizer=muon', *knobs)
    assert 'Muon learning rate 3e-3' in out
    groups = [group for optimizer in load('out/scale')['optimizers'] for group in optimizer['param_groups']]
    expected = 3e-4 + 2.7e-3 * (1 + math.cos(math.pi * 4 / 5)) / 2
    assert [group['lr'] for group in groups] == pytest.approx([expected] * 3)  # Muon's, and the two of AdamW


def test_an_epoch_ends_with_the_notebooks_line_and_its_numbers_are_right(run):
    """The printed loss and bits per byte, against a float64 evaluation of the saved weights, token by
    token from the file."""
    out = run('--out_dir=out/epoch', '--epochs=1', '--max_iters=None', '--block_size=64', '--batch_size=16')
    saved, meta = load('out/epoch'), json.loads(Path('data/tiny/meta.json').read_text())
    assert saved['corpus'] == meta['sha256']['train.bin']
    net = train.build_model(SimpleNamespace(**saved['knobs']), train.vocab_size_of('tiny')).double().eval()
    net.load_state_dict(saved['model'])
    stream = []
    net.norm.register_forward_hook(lambda module, args, out: stream.append(out[0]))
    tokens = torch.frombuffer(bytearray(Path('data/tiny/val.bin').read_bytes()), dtype=torch.int32).long()
    total = 0.0
    for start in range(0, len(tokens) - 1, 64):
        window = tokens[start : start + 65]
        with torch.no_grad():
            net(window[None, :-1])
            total += F.cross_entropy(stream.pop() @ net.embedding.weight.T, window[1:], reduction='sum').item()
    loss = total / (len(tokens) - 1)
    bits = loss * len(tokens) / meta['val']['bytes'] / math.log(2)
    assert f'epoch 1 loss: {loss:.2f}\n' in out
    assert f' | {bits:.3f} bits per byte | ' in out
    *steps, end = [json.loads(line) for line in Path('out/epoch/metrics.jsonl').read_text().splitlines()]
    assert end['val_loss'] == pytest.approx(loss, abs=1e-4) and end['bits_per_byte'] == pytest.approx(bits, abs=1e-4)
    assert [line['step'] for line in steps] == list(range(5, end['step'] + 1, 5))
    assert end['train_loss'] == pytest.approx(sum(line['loss'] for line in steps) / len(steps), rel=0.05)


def test_every_epoch_ends_with_an_evaluation_and_the_means_of_its_own_steps(run):
    batches = ['--block_size=64', '--batch_size=16', '--log_interval=1']
    run('--out_dir=out/epochs', '--epochs=2', '--max_iters=None', *batches)
    lines = [json.loads(line) for line in open('out/epochs/metrics.jsonl')]
    first, second = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    for epoch, (*steps, end) in ((1, first), (2, second)):
        assert end['epoch'] == epoch and end['step'] == epoch * len(steps)
        assert end['train_loss'] == pytest.approx(statistics.mean(step['loss'] for step in steps))
        ms = statistics.mean(step['ms_per_batch'] for step in steps)
        assert end['tokens_per_s'] == pytest.approx(16 * 64 / ms * 1e3)


def test_a_log_line_shares_its_wait_among_its_steps(run, monkeypatch):
    """On a GPU a step only gives orders; the time of the work shows where a loss is read, at the log line."""
    clock, read_losses = [0.0], train.read_losses

    def wait_and_read(*arguments):
        clock[0] += 1
        return read_losses(*arguments)

    monkeypatch.setattr(train.time, 'perf_counter', lambda: clock[0])
    monkeypatch.setattr(train, 'read_losses', wait_and_read)
    run('--out_dir=out/waits', '--max_iters=10')
    lines = [json.loads(line) for line in open('out/waits/metrics.jsonl')]
    assert [line.get('ms_per_batch') for line in lines] == [200, 200, None]  # a second for five steps
    assert lines[-1]['tokens_per_s'] == pytest.approx(4 * 16 / 0.2)


def test_any_text_stream_will_do_as_the_output(run):
    """A notebook's has no encoding, nor a file behind it."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run('--out_dir=out/stream')
    assert 'step 10 loss: ' in out.getvalue()


def test_a_run_is_named_after_its_configs(run, monkeypatch):
    """And after its corpus, where that is not the default one."""
    knobs = [f'{REPO}/config/swiglu.py', f'{REPO}/config/cpu.py', '--max_iters=1', '--overwrite']
    run(*knobs)
    assert load('out/swiglu_cpu_tiny')['step'] == 1
    monkeypatch.setattr(train, 'dataset', 'tiny')
    run(*knobs)
    assert load('out/swiglu_cpu')['step'] == 1


# ---- the training step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('dtype', 'optimizer'), [('float32', 'adamw'), ('bfloat16', 'muon'), ('float16', 'adamw')])
def test_ten_steps_equal_five_and_resume_and_five(run, dtype, optimizer):
    state = ['--dropout=0.2', '--ema_decay=0.9', '--gradient_accumulation_steps=2']
    knobs = [f'--dtype={dtype}', f'--optimizer={optimizer}', *state]
    run(f'--out_dir=out/whole_{dtype}', *knobs)
    run(f'--out_dir=out/half_{dtype}', *knobs, stop_at=5)
    assert load(f'out/half_{dtype}')['step'] == 5
    with open(f'out/half_{dtype}/metrics.jsonl', 'a') as file:
        file.write('{"step": 6}\n{"step": 5, "lo')  # what a run writes after its last save, and in its last moment
    out = run(f'--out_dir=out/half_{dtype}', *knobs, '--init_from=resume')
    assert 'resumed at step 5 of 10' in out and 'resume: ' not in out
    assert_same(load(f'out/half_{dtype}'), load(f'out/whole_{dtype}'))
    assert bool(load(f'out/whole_{dtype}')['scaler']) == (dtype == 'float16')
    logs = [Path(f'out/{name}_{dtype}/metrics.jsonl').read_text().splitlines() for name in ('whole', 'half')]
    whole, half = ([json.loads(line) for line in log] for log in logs)
    assert [line['step'] for line in whole] == [line['step'] for line in half] == [5, 10, 10]
    assert whole[1]['loss'] == half[1]['loss'] and whole[2]['val_loss'] == half[2]['val_loss']


def test_a_run_that_stops_after_an_epoch_continues_as_if_it_had_not(run):
    knobs = ['--max_iters=None', '--epochs=3', '--block_size=64', '--batch_size=16', '--ema_decay=0.9', '--dropout=0.1']
    run('--out_dir=out/through', *knobs)
    for stop, epochs, hint in (('1', 1, '--stop_epoch=2'), ('2', 2, '--stop_epoch=3'), ('None', 3, '--epochs=4')):
        how = 'resume' if epochs > 1 else 'scratch'
        out = run('--out_dir=out/stops', *knobs, f'--stop_epoch={stop}', f'--init_from={how}')
        per_epoch = load('out/stops')['step'] // epochs
        assert f'{per_epoch} batches per epoch, {3 * per_epoch} in all' in out  # the schedule's
        assert (f'stops after epoch {stop}' in out) == (stop != 'None')
        assert f'epoch {epochs} loss: ' in out and f' --init_from=resume {hint}' in out.splitlines()[-1]
    assert_same(load('out/stops'), load('out/through'))
    whole, stopped = ([json.loads(line) for line in open(f'out/{name}/metrics.jsonl')] for name in ('through', 'stops'))
    for line in (*whole, *stopped):
        line.pop('ms_per_batch', line.pop('tokens_per_s', None))  # times
    assert whole == stopped
    out = run('--out_dir=out/stops', *knobs, '--stop_epoch=3', '--init_from=resume')  # nothing is left to do
    assert ' --init_from=resume --epochs=4 --stop_epoch=None' in out.splitlines()[-1]


def test_an_evaluation_can_read_a_part_of_the_validation_text(run):
    """The first 3 x 4 x 16 targets, as a model restored from the checkpoint counts them."""
    run('--out_dir=out/part', '--eval_iters=3')
    lines = [json.loads(line) for line in open('out/part/metrics.jsonl')]
    net, _, _ = sample.load_model('out/part', 'cpu')
    tokens = open_corpus('tiny').val[: 3 * 4 * 16 + 1].long()
    with torch.no_grad():
        expected = F.cross_entropy(net(tokens[:-1].view(12, 16)).flatten(0, 1), tokens[1:])
    assert lines[-1]['val_loss'] == pytest.approx(expected.item(), abs=1e-5)
    run('--out_dir=out/more_than_all', '--eval_iters=100000')
    assert_same(load('out/more_than_all') | {'lowest': 0}, load('out/part') | {'lowest': 0})


def test_a_slow_evaluation_says_how_long_it_took(run, monkeypatch):
    clock, evaluate = [0.0], train.Run.evaluate

    def slow(run, *arguments):
        clock[0] += 35
        return evaluate(run, *arguments)

    def tick():
        clock[0] += 0.1
        return clock[0]

    monkeypatch.setattr(train.time, 'perf_counter', tick)
    assert 'evaluated in' not in run('--out_dir=out/quick')
    monkeypatch.setattr(train.Run, 'evaluate', slow)
    assert 'evaluated in 35 s; --eval_iters takes fewer' in run('--out_dir=out/slow')


def test_a_log_line_after_an_evaluation_is_the_mean_of_a_whole_interval(run):
    run('--out_dir=out/between_log', '--eval_interval=3', '--max_iters=20')
    run('--out_dir=out/after_log', '--max_iters=20')
    between, after = (
        [line['loss'] for line in map(json.loads, open(f'out/{name}/metrics.jsonl')) if 'loss' in line]
        for name in ('between_log', 'after_log')
    )
    assert len(after) == 4 and between == after


def test_many_passes_over_a_small_text_are_said(run):
    per_epoch = int(re.search(r'(\d+) batches per epoch', run('--out_dir=out/passes')).group(1))
    for max_iters, said in ((10 * per_epoch, False), (11 * per_epoch, True)):
        out = run('--out_dir=out/passes', f'--max_iters={max_iters}', '--overwrite', stop_at=1)
        assert (f' 11 passes over a small text, which the model will memorise; --max_iters={5 * per_epoch} '
                in out) == said  # fmt: skip


def test_a_warmup_longer_than_the_run_is_said(run):
    assert ('warmup_iters is 10: the learning rate does not reach its peak; --warmup_iters=1 would do'
            in run('--warmup_iters=10'))  # fmt: skip
    assert 'warmup_iters is' not in run('--warmup_iters=9', '--overwrite')


def test_a_validation_loss_that_rises_for_long_is_said(run, monkeypatch):
    losses = iter([3.0, 2.5, 2.25, 2.5, 3.0, 2.5, 2.0, 2.5])
    monkeypatch.setattr(train.Run, 'evaluate', lambda run, net, signals: next(losses))
    knobs = ['--out_dir=out/rises', '--eval_interval=2', '--max_iters=16']
    lines = run(*knobs, stop_at=9).splitlines()  # the lowest loss is kept with the run
    lines += run(*knobs, '--init_from=resume').splitlines()
    said = [lines[i - 2] for i, line in enumerate(lines) if 'has not fallen below 2.25 since step 6: ' in line]
    assert [line.split(' (')[0] for line in said] == ['step 12 loss: 2.50']


@pytest.mark.parametrize(('eval_interval', 'per_epoch'), [(1000, 5), (5, 1000), (5, 5)])
def test_a_rising_validation_loss_is_said_once_however_often_it_is_evaluated(eval_interval, per_epoch, capsys):
    for step in range(5, 100, 5):
        run = SimpleNamespace(step=step, lowest=(2.0, 10 if step >= 10 else step), batches=SimpleNamespace())
        run.config, run.batches.per_epoch = SimpleNamespace(eval_interval=eval_interval), per_epoch
        train.hint_at_memorising(run)
    assert capsys.readouterr().out.count('has not fallen below 2.00 since step 10: ') == 1


def test_micro_steps_give_the_update_of_the_whole_batch(run):
    run('--out_dir=out/micro_1')
    run('--out_dir=out/micro_4', '--gradient_accumulation_steps=4')
    one, four = load('out/micro_1')['model'], load('out/micro_4')['model']
    torch.testing.assert_close(one, four, atol=1e-4, rtol=1e-3)
    ones, fours = ([json.loads(line) for line in open(f'out/micro_{n}/metrics.jsonl')] for n in (1, 4))
    assert [line.get('loss') for line in ones] == pytest.approx([line.get('loss') for line in fours], abs=1e-4)


def test_float16_follows_float32(run):
    """The scaler's factor is out of the gradients before they are clipped."""
    weights = []
    for dtype in ('float32', 'float16'):
        run(f'--out_dir=out/follows_{dtype}', f'--dtype={dtype}', '--optimizer=sgd', '--learning_rate=1')
        saved = load(f'out/follows_{dtype}')
        weights.append(torch.cat([p.flatten() for p in saved['model'].values()]))
    net = train.build_model(SimpleNamespace(**saved['knobs']), train.vocab_size_of('tiny'))
    start = torch.cat([p.flatten() for p in net.state_dict().values()])
    assert (weights[0] - weights[1]).norm() < 0.1 * (weights[0] - start).norm()


def test_each_seed_step_and_rank_drops_others(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    seeds = []
    for seed, rank in ((1, 0), (2, 0), (1, 1)):
        c, _ = train.configure([train.__file__], [*SMALL, '--dropout=0.2', f'--seed={seed}'])
        machine.choose_machine(c)
        run = train.Run(c, train.open_corpus('tiny'))
        run.rank, run.world_size = rank, 2
        for _ in range(2):
            run.train_step()
            seeds.append(torch.initial_seed())
    assert len(set(seeds)) == 6


def test_the_average_takes_up_the_step_just_done(run):
    run('--out_dir=out/forgets', '--ema_decay=1e-9')  # an average of the last weights alone
    saved = load('out/forgets')
    torch.testing.assert_close(saved['ema'], saved['model'], atol=1e-6, rtol=0)


def test_the_average_is_what_is_evaluated_and_sampled(run, monkeypatch):
    nets = []
    monkeypatch.setattr(train, 'write_text', lambda net, *args, **options: str(nets.append(net)))
    run('--out_dir=out/average', '--ema_decay=0.9')
    nets.append(sample.load_model('out/average')[0])
    end = json.loads(open('out/average/metrics.jsonl').readlines()[-1])
    assert abs(end['ema_loss'] - end['val_loss']) > 0.01
    again = train.Run(SimpleNamespace(**load('out/average')['knobs']), train.open_corpus('tiny'))
    assert [again.evaluate(net) for net in nets] == pytest.approx([end['ema_loss']] * 2, abs=1e-5)


def test_a_step_is_the_textbooks(run, workplace, monkeypatch):
    """Three steps of SGD with clipping, redone in plain PyTorch on the same batches."""
    knobs = ['--max_iters=3', '--grad_clip=0.5', '--weight_decay=0', '--learning_rate=1']
    run('--out_dir=out/sgd', '--optimizer=sgd', *knobs)
    saved = load('out/sgd')
    c = SimpleNamespace(**saved['knobs'])
    corpus = train.open_corpus('tiny')
    net = train.build_model(c, corpus.encoding.n_vocab)
    batches = train.Batches(corpus.train, 4, 16, c.seed, 'cpu')
    for step in range(3):
        net.zero_grad()
        net(*batches.get_batch(step)).backward()
        norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
        lr = 0.5 * (1 + math.cos(math.pi * step / 3))
        for p in net.parameters():
            p.data -= lr * p.grad * min(1, 0.5 / norm)
    torch.testing.assert_close(saved['model'], net.state_dict(), atol=1e-5, rtol=1e-4)


class NeverWaits(TorchDispatchMode):
    """Fails where a value is read back from the device, for which a GPU's host would have to wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, 'waits for the device'
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_muons_knobs_reach_muon(workplace, monkeypatch, dtype):
    monkeypatch.chdir(workplace)
    knobs = ['--optimizer=muon', '--muon_steps=3', '--muon_rms=0.07', f'--dtype={dtype}']
    c, _ = train.configure([train.__file__], [*SMALL, *knobs])
    machine.choose_machine(c)
    run = train.Run(c, train.open_corpus('tiny'))
    muon, _ = run.optimizers
    assert (muon.steps, muon.rms, muon.dtype) == (3, 0.07, getattr(torch, dtype))


@pytest.mark.parametrize('knobs', [['--optimizer=sgd'], ['--dropout=0.1', '--ema_decay=0.9'], ['--optimizer=muon'],
                                   ['--model=torch', '--gradient_accumulation_steps=2']])  # fmt: skip
def test_a_step_never_waits_for_the_device(workplace, monkeypatch, knobs):
    monkeypatch.chdir(workplace)
    c, _ = train.configure([train.__file__], [*SMALL, *knobs])
    machine.choose_machine(c)
    run = train.Run(c, train.open_corpus('tiny'))
    before = run.model.embedding.weight.clone()
    run.train_step()  # the first creates the optimizer's state
    seeds, modes = [], []
    monkeypatch.setattr(torch, 'manual_seed', seeds.append)
    monkeypatch.setattr(torch.nn.Module, 'train', lambda net, mode=True: modes.append(net))
    with NeverWaits():
        loss, norm = run.train_step()
    assert not modes and len(seeds) == (c.dropout > 0)  # a walk over all modules, and a seed, cost a GPU's host time
    assert not torch.equal(run.model.embedding.weight, before)
    with pytest.raises(AssertionError, match='waits'), NeverWaits():
        float(loss + norm)


def test_clipping_can_be_off(run):
    run('--out_dir=out/clip_0', '--grad_clip=0', '--optimizer=sgd')
    run('--out_dir=out/clip_9', '--grad_clip=1e9', '--optimizer=sgd')
    assert_same(load('out/clip_0'), load('out/clip_9'))


def test_seeds(run):
    """Same seed, same bits, whatever is logged, evaluated and saved in between; another seed, another model."""
    run('--out_dir=out/seed_a', '--dropout=0.2')
    run('--out_dir=out/seed_b', '--dropout=0.2', '--eval_interval=3', '--log_interval=1')
    run('--out_dir=out/seed_c', '--dropout=0.2', '--seed=2')
    a, b, c = (load(f'out/seed_{name}')['model'] for name in 'abc')
    torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert not torch.allclose(a['embedding.weight'], c['embedding.weight'])
    means, losses = (
        [line['loss'] for line in map(json.loads, open(f'out/seed_{name}/metrics.jsonl')) if 'loss' in line]
        for name in 'ab'
    )
    assert means == pytest.approx([statistics.mean(losses[:5]), statistics.mean(losses[5:])])


# ---- sample.py and bench.py ----------------------------------------------------------------------------------------


def test_sampling(run, monkeypatch, capsys):
    run('--out_dir=out/sample', '--ema_decay=0.5', '--block_size=64')

    def text(*knobs, start='the ladder'):
        main(monkeypatch, sample, '--out_dir=out/sample', f'--start={start}', '--num_samples=2', *knobs)
        return capsys.readouterr().out

    first = text('--max_new_tokens=100', '--seed=1')
    assert first.count('the ladder') >= 2 and first.count('---------------\n') == 2
    assert first == text('--max_new_tokens=100', '--seed=1') != text('--max_new_tokens=100', '--seed=2')
    Path('prompt.txt').write_text('the ladder')
    assert first == text('--max_new_tokens=100', '--seed=1', start='FILE:prompt.txt')
    greedy = text('--temperature=0')
    one, two, _ = greedy.split('---------------\n')
    assert one == two


@pytest.mark.parametrize(
    'knobs, words',
    [
        (['--out_dir=out/nothing'], 'out/nothing/ckpt.pt cannot be read: No such file'),
        (['--out_dir=~nobody_of_that_name'], '~nobody_of_that_name/ckpt.pt cannot be read: No such file'),
        (['--top_k=0'], 'top_k is 0, expected 1 <= top_k < '),
        (['--temperature=-1'], 'temperature is -1.0, expected 0 <= temperature < '),
        (['--device=gpu'], "device is 'gpu'"),
        (['--device=hpu'], "device is 'hpu', which is not there"),
        (['--device=meta'], "device is 'meta'"),
    ],
)
def test_sampling_refuses(run, monkeypatch, knobs, words):
    if not Path('out/refuse').exists():
        run('--out_dir=out/refuse')
    with pytest.raises(SystemExit, match=re.escape(words)):
        main(monkeypatch, sample, '--out_dir=out/refuse', *knobs)


def test_a_checkpoint_from_before_a_knob_can_be_sampled_and_resumed(run, monkeypatch, capsys):
    run('--out_dir=out/old', '--overwrite')
    old = load('out/old')
    del old['knobs']['head_gate'], old['knobs']['learning_rate_scale'], old['lowest']
    save(Path('out/old'), old)
    main(monkeypatch, sample, '--out_dir=out/old', '--max_new_tokens=3')
    assert capsys.readouterr().out.endswith('\n---------------\n')
    assert 'resumed at step 10 of 20' in run('--out_dir=out/old', '--init_from=resume', '--max_iters=20')


def test_a_sample_ends_at_the_end_of_a_document(run, monkeypatch, capsys):
    run('--out_dir=out/end')
    end = train.open_corpus('tiny').encoding.eot_token
    ids, asked = [ord('a'), ord('b'), end, ord('c')], []

    def generate(self, idx, max_new_tokens, temperature, top_k, generator, unused_ids):
        asked.append((idx.tolist(), max_new_tokens, temperature, top_k, generator.initial_seed()))
        return (torch.tensor([[i]]) for i in ids)

    monkeypatch.setattr('model.Transformer.generate', generate)
    knobs = ['--max_new_tokens=7', '--temperature=0.5', '--top_k=3', '--seed=4']
    main(monkeypatch, sample, '--out_dir=out/end', '--start=x', *knobs)
    assert capsys.readouterr().out == 'xab\n---------------\n'
    assert asked == [([[end, ord('x')]], 7, 0.5, 3, 4)]  # the prompt stands at the start of a document


def test_a_resumed_run_keeps_its_dtype_unless_it_is_asked_for_another(run, monkeypatch):
    """Whatever this computer finds fast now: 'bit for bit' holds for the run."""
    monkeypatch.setattr(machine, 'bfloat16_speedup', lambda c: 0.5)
    run('--out_dir=out/dtype', '--dtype=bfloat16', '--max_iters=2')
    out = run('--out_dir=out/dtype', '--init_from=resume', '--dtype=auto', '--max_iters=3')
    assert 'device: cpu, bfloat16' in out and 'dtype was' not in out
    out = run('--out_dir=out/dtype', '--init_from=resume', '--dtype=float32', '--max_iters=4')
    assert "resume: dtype was 'bfloat16', now 'float32'" in out
    assert "now 'float16'" in run('--out_dir=out/dtype', '--init_from=resume', '--dtype=float16', '--max_iters=5')


def test_all_is_computed_in_the_runs_dtype_and_dropout_is_in_the_steps_alone(run, monkeypatch):
    """The step, the evaluation, the closing sample and sample.py. flash-attn takes nothing but half precision."""
    seen, forward = [], Transformer.forward

    def spy(net, *args, **options):
        seen.append((net.training, torch.is_autocast_enabled('cpu')))
        return forward(net, *args, **options)

    monkeypatch.setattr(Transformer, 'forward', spy)
    run('--out_dir=out/modes', '--dtype=bfloat16', '--dropout=0.2', '--max_iters=1')
    assert seen[0] == (True, True) and len(seen) > 6 and set(seen[1:]) == {(False, True)}
    for flags, half in (([], True), (['--dtype=float32'], False)):
        seen.clear()
        main(monkeypatch, sample, '--out_dir=out/modes', '--max_new_tokens=3', *flags)
        assert set(seen) == {(False, half)}


@pytest.mark.parametrize(('cost', 'line'), [
    (0.5, 'device: cpu, bfloat16 (2.0 times as fast as float32 here)'),
    (1.25, 'device: cpu, float32 (1.2 times as fast as bfloat16 here)'),
    (9.0, 'device: cpu, float32 (9.0 times as fast as bfloat16 here)'),
])  # fmt: skip
def test_a_cpu_takes_the_dtype_in_which_the_models_layers_are_faster(run, monkeypatch, cost, line):
    """By a clock that ticks once per layer stack in float32, and `cost` times in bfloat16; the first round, which warms
    up, does not count, and a hopeless case ends early."""
    clock, seen, autocast = [0.0], [], machine.autocast

    @contextlib.contextmanager
    def tick(c):
        with autocast(c):
            yield
        seen.append(c.dtype)
        clock[0] += (1.0 if c.dtype == 'float32' else cost) * (50 if len(seen) <= 2 else 1)

    gain = machine.bfloat16_speedup

    def measured(c):
        with monkeypatch.context() as patch:
            patch.setattr(machine, 'autocast', tick)
            patch.setattr(machine.time, 'perf_counter', lambda: clock[0])
            return gain(c)

    monkeypatch.setattr(machine, 'bfloat16_speedup', measured)
    out = run(f'--out_dir=out/dtype_{cost}', '--dtype=auto', '--max_iters=1')
    assert line in out.splitlines() and seen == ['float32', 'bfloat16'] * (5 if cost < 4 else 2)


@pytest.mark.parametrize(('speed_of_fewer', 'chosen', 'line'), [
    ({4: 1.1, 1: 0.3}, 8, ''), ({4: 1.1, 1: 1.15}, 8, ''),  # twice the threads are worth keeping
    ({4: 2.0, 1: 7.0}, 1, ', 1 thread (7.0 times as fast as 8 here)'),
    ({4: 2.0, 1: 1.3}, 4, ', 4 threads (2.0 times as fast as 8 here)'),
])  # fmt: skip
def test_a_busy_cpu_gets_fewer_threads(monkeypatch, speed_of_fewer, chosen, line):
    speeds, set_to = {8: 1.0} | speed_of_fewer, []
    monkeypatch.delenv('OMP_NUM_THREADS')
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 8)
    monkeypatch.setattr(torch, 'set_num_threads', set_to.append)
    monkeypatch.setattr(machine, 'time_two_layers', lambda c, ways: {way: 1 / speeds.get(way[1], 1) for way in ways})
    config = SimpleNamespace(threads=None, dtype='auto')
    assert machine.choose_threads(config, {}) == line and config.threads == set_to[-1] == chosen
    for kept, same in (({'threads': 4}, 4), ({'threads': 64}, 8), ({'threads': None}, 8)):  # a resumed run, from a
        assert machine.choose_threads(SimpleNamespace(threads=None, dtype='float32'), kept) == ''  # larger computer,
        assert set_to[-1] == same  # from a GPU
    monkeypatch.setenv('OMP_NUM_THREADS', '8')
    assert machine.choose_threads(SimpleNamespace(threads=None, dtype='float32'), {'threads': 4}) == ''
    assert set_to[-1] == 8
    assert machine.choose_threads(SimpleNamespace(threads=2, dtype='float32'), {'threads': 4}) == '' and set_to[-1] == 2


@pytest.mark.parametrize(('speedup', 'rounds', 'chosen'), [
    (2.3, False, 'medium'), (1.1, False, 'highest'), (4.0, True, 'highest')])  # fmt: skip
def test_float32_products_are_onednns_where_they_are_faster_and_as_exact(monkeypatch, speedup, rounds, chosen):
    """Slow as on AMD's CPUs, and rounded to bfloat16 as on those with AMX."""
    clock, multiply = [0.0], torch.Tensor.__matmul__

    def product(a, b):
        is_medium = torch.get_float32_matmul_precision() == 'medium'
        clock[0] += 1 / speedup if is_medium else 1
        kind = torch.bfloat16 if is_medium and rounds else torch.float64
        return multiply(a.to(kind), b.to(kind)).to(a.dtype)

    before = torch.get_float32_matmul_precision()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, '__matmul__', product)
        patch.setattr(machine.time, 'thread_time', lambda: clock[0])  # what other programs use does not count
        monkeypatch.setattr(machine, 'onednn_speedup', MEASURED_SPEEDUP)
        config = SimpleNamespace()
        for kept in ({'products': 'medium'}, {}):  # of another computer, of an older version
            machine.choose_products(config, {'device': 'cpu', **kept})
            assert config.products == ('medium' if kept and not rounds else 'highest')
        said = machine.choose_products(config, {})
    assert config.products == torch.get_float32_matmul_precision() == chosen
    assert said == (', float32 products by oneDNN (2.3 times as fast here)' if chosen == 'medium' else '')
    machine.choose_products(config, {'device': 'cpu', 'products': before})  # a resumed run keeps its own
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a setting of glibc')
def test_freed_memory_is_not_asked_for_anew():
    """The page faults of allocating four times 20 MB again and again: by default thousands."""
    import resource  # Windows has none

    machine.keep_freed_memory()
    faults = []
    for _ in range(9):
        tensors = [torch.ones(5_000_000) for _ in range(4)]
        del tensors
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[-1] - faults[4] < 2_000


BENCH = [*(flag for flag in SMALL if 'interval' not in flag), '--seconds', '0.01']


def test_bench_times_the_training_step(workplace, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    main(monkeypatch, bench, f'{REPO}/config/swiglu.py', f'{REPO}/config/ema.py', *BENCH, '--json')
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [row['config'] for row in rows] == ['swiglu', 'ema']
    for row in rows:
        assert 0 < row['ms_p10'] <= row['ms_median'] <= row['ms_p90']
        assert row['tokens_per_s'] == pytest.approx(4 * 16 / row['ms_median'] * 1e3)
        assert (row['torch'], row['dtype'], row['attention']) == (torch.__version__, 'float32', 'sdpa')
        assert row['device'].startswith('cpu')


def test_each_config_of_bench_is_checked_by_itself(workplace, monkeypatch, capfd):
    """The min_lr of best is above the learning_rate of run 13, which has none of its own."""
    monkeypatch.chdir(workplace)
    flags = [flag for flag in BENCH if 'learning_rate' not in flag]
    main(monkeypatch, bench, 'best', 'learning_rate', *flags, '--json')
    assert [json.loads(line)['config'] for line in capfd.readouterr().out.splitlines()] == ['best', 'learning_rate']


def test_bench_prints_a_table(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    main(monkeypatch, bench, *BENCH)
    machine, names, row = capsys.readouterr().out.splitlines()
    assert 'float32' in machine and 'batch 4 x 16' in machine
    assert names.split() == bench.COLUMNS and row.split()[0] == 'default' and row.split()[2] == row.split()[-1] == '-'


def test_a_bench_table_has_one_dtype_and_number_of_threads_and_takes_overlays(workplace, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    gains = iter([0.9, 1.1, 1.2, 1.3])
    monkeypatch.setattr(machine, 'bfloat16_speedup', lambda c: next(gains))
    threads = []

    def choose_one(config, kept):
        threads.append(config.threads)
        config.threads = 1
        return ''

    monkeypatch.setattr(machine, 'choose_threads', choose_one)
    flags = [flag for flag in BENCH if 'dtype' not in flag and 'batch_size' not in flag]
    main(monkeypatch, bench, 'swiglu', 'ema', 'cpu', *flags, '--dtype=auto', '--json')
    assert threads == [None, 1]
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(row['config'], row['dtype'], row['batch_size']) for row in rows] == [
        ('swiglu', 'float32', 6), ('ema', 'float32', 6)]  # fmt: skip


@pytest.mark.parametrize(('what', 'variants'), [
    ('attention', ['attention=sdpa', 'attention=chunked', 'attention=naive']),
    ('dtype', ['dtype=float32', 'dtype=bfloat16', 'dtype=float16']),
    ('n_head=x,1,2,3,4', ['n_head=1', 'n_head=2', 'n_head=4']),
    ('n_embd=16,8,1000000000000', ['n_embd=16', 'n_embd=8']),
])  # fmt: skip
def test_bench_compares_a_knobs_values(workplace, monkeypatch, capsys, what, variants):
    """A value that was named and cannot run makes the exit status 1. flash-attn needs a GPU and was not named."""
    monkeypatch.chdir(workplace)
    with contextlib.nullcontext() if what in ('attention', 'dtype') else pytest.raises(SystemExit, match='^1$'):
        main(monkeypatch, bench, *BENCH, f'--compare={what}', '--json')
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row['config'] for row in rows] == [f'default {variant}' for variant in variants]
    assert rows[0]['ratio'] == 1 and min(row['ratio'] for row in rows) > 0 and len({row['steps'] for row in rows}) == 1
    said = {'attention': ['attention=flash is left out: --attention=flash cannot run here'],
            'n_head': ["n_head=x is left out: command line: n_head is 'x'", 'n_head=3 is left out: n_embd=16'],
            'n_embd': ['n_embd=1000000000000 is left out: out of memory']}.get(what.split('=')[0], [])  # fmt: skip
    assert all(line.startswith(f'default {words}') for line, words in zip(err.splitlines(), said, strict=True))


def test_a_config_that_cannot_run_stops_no_other_of_bench(workplace, monkeypatch, capsys, tmp_path):
    (tmp_path / 'uneven.py').write_text('n_head = 3')
    (tmp_path / 'huge.py').write_text('n_embd = 1_000_000_000_000')
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in BENCH if 'n_head' not in flag and 'n_embd' not in flag]
    with pytest.raises(SystemExit, match='^1$'):
        main(monkeypatch, bench, 'uneven.py', 'swiglu', 'huge.py', 'best', *flags)
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[1:]] == ['config', 'swiglu', 'best']
    assert [line.split(': ')[0] for line in err.splitlines()] == ['uneven is left out', 'huge is left out']


def test_bench_times_several_steps_as_one_where_the_host_runs_ahead(monkeypatch):
    """The device is waited for before and after a turn, not between its steps; a time is that of one step."""
    calls, clock = [], itertools.count(step=0.03)
    monkeypatch.setitem(bench.IN_A_ROW, 'cpu', 3)
    monkeypatch.setattr(torch.cpu, 'synchronize', lambda: calls.append('wait'))
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: next(clock))
    [times] = bench.time_in_turns([lambda: calls.append('step')], torch.device('cpu'), 0)
    assert calls == ['wait', *['step'] * 3, 'wait'] * 5 and times == pytest.approx([10] * 5)


def test_bench_profiles(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    main(monkeypatch, bench, *BENCH, '--profile')
    out = capsys.readouterr().out
    assert 'aten::' in out and 'Self CPU' in out and json.loads(Path('trace.json').read_text())
    Path('trace.json').unlink()
    Path('trace.json').symlink_to('nowhere/trace.json')
    monkeypatch.setattr(bench, 'milliseconds', None)  # no step is taken for a trace that cannot be written
    with pytest.raises(FileNotFoundError):
        main(monkeypatch, bench, *BENCH, '--profile')
    Path('trace.json').unlink()


def test_bench_refuses(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    uneven = '--gradient_accumulation_steps=3'  # of a batch of 4: no variant can run
    for flags, words in (
        (['--compare=speed'], "--compare=speed: name one of train.py's knobs"),
        (['--compare=n_layer'], "--compare=n_layer: name one of train.py's knobs and its values"),
        (['--compare=threads=1,2'], '--compare=threads: .* time each by itself'),
        (['--device=gpu'], '1'),
        (['--compare=dtype', uneven], '1'),
    ):
        with pytest.raises(SystemExit, match=words):
            main(monkeypatch, bench, *BENCH, '--json', *flags)


def test_what_is_set_on_a_gpu(monkeypatch):
    """Before torch 2.12 cuDNN rounds dropout to sixteenths: runs 4 and 6 do without it."""
    switched = []
    monkeypatch.setattr(torch, 'zeros', lambda *size, device: torch.ones(()))  # on the GPU
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda precision: None)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, 'enable_cudnn_sdp', switched.append)
    for version, dropout in (('2.11.0', 0.2), ('2.11.0', 0.0), ('2.13.0', 0.2)):
        monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion(version))
        c, _ = train.configure([train.__file__], ['--device=cuda', f'--dropout={dropout}'])
        assert machine.choose_machine(c) == ('bfloat16', "sdpa (cuDNN's kernel is the fastest, measured on an H100)")
        assert (c.device, c.dtype) == ('cuda:0', 'bfloat16')
    assert switched == [False, True]


def test_a_group_waits_for_the_process_that_prepares_the_corpus(monkeypatch):
    """A large one takes longer than the ten minutes after which NCCL gives up."""
    joined, join = [], machine.dist.init_process_group
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setattr(machine.dist, 'init_process_group', lambda *backend, **options: joined.append(options))
    monkeypatch.setattr(machine.ctypes.pythonapi, 'Py_IncRef', lambda group: None)
    c, _ = train.configure([train.__file__], SMALL)
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match='WORLD_SIZE .* Use torchrun'),
    ):
        patch.setattr(machine.dist, 'init_process_group', join)
        machine.choose_machine(c)
    machine.choose_machine(c)
    assert joined[0]['timeout'].total_seconds() >= 3600


def test_only_torchrun_makes_several_processes(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')  # as clusters set it for programs of their own
    assert machine.rank_and_world_size() == (0, 1)
    monkeypatch.setenv('RANK', 'first')
    with pytest.raises(SystemExit, match="RANK is 'first' and WORLD_SIZE '2', expected numbers. Use torchrun, or"):
        machine.rank_and_world_size()
    monkeypatch.setenv('RANK', '1')
    assert machine.rank_and_world_size() == (1, 2)


@pytest.mark.parametrize('kernel, name', [('naive', 'softmax'), ('chunked', 'baddbmm'), ('sdpa', 'scaled_dot_product')])
def test_each_attention_compiles_to_code_of_its_own_in_one_piece(kernel, name):
    graphs, c = [], train.configure([train.__file__], [*SMALL, f'--attention={kernel}'])[0]
    net = train.build_model(c, 9)
    net.compile(backend=lambda graph, inputs: graphs.append(graph.code) or graph.forward, fullgraph=True)
    net(torch.zeros(1, 16, dtype=torch.long))
    [code] = graphs
    assert name in code and ('scaled_dot_product' in code) == (kernel == 'sdpa') == ('softmax' not in code)


def test_where_compiling_is_impossible(monkeypatch, capsys):
    """By default, as on a GPU, the run goes on without. Asked for, it ends in a line that names the knob."""
    c, _ = train.configure([train.__file__], SMALL)
    model, stances = torch.nn.Linear(1, 1), []
    monkeypatch.setattr(torch.compiler, 'set_stance', stances.append)
    monkeypatch.setattr(torch.nn.Linear, 'compile', lambda net, **options: None)

    def cannot(*args):
        raise error

    monkeypatch.setattr(torch.nn.Linear, 'forward', cannot)
    error = RuntimeError('No working C++ compiler found\nand much more')
    c.device, c.dtype = 'cuda', 'float32'
    machine.compile_model(model, None, None, c)
    assert stances == ['default', 'force_eager'] and not c.compile
    assert 'not compiled: No working' in capsys.readouterr().out
    c.compile = True
    with pytest.raises(SystemExit, match='^--compile cannot work here, --compile=False does without: [^\n]+$'):
        machine.compile_model(model, None, None, c)
    error = torch.OutOfMemoryError()
    with pytest.raises(torch.OutOfMemoryError):
        machine.compile_model(model, None, None, c)


class Replayed:
    """A CUDA graph on a CPU. What is recorded runs at once, so the first replay does nothing; each later one runs the
    recorded function on the memory that it read, and writes where it wrote."""

    def __init__(self, recorded):
        self.recorded, self.replays = recorded, 0

    def replay(self):
        if self.replays:
            for place, result in zip(self.recorded.results, self.recorded.function(*self.recorded.inputs), strict=True):
                place.copy_(result)
        self.replays += 1


@pytest.mark.parametrize('knobs', [
    ['--optimizer=adamw'], ['--optimizer=muon', '--gradient_accumulation_steps=2'], ['--optimizer=sgd'],
    ['--dropout=0.2', '--ema_decay=0.9', '--warmup_iters=3'],
])  # fmt: skip
def test_a_recorded_step_trains_as_another(run, monkeypatch, knobs):
    """Its learning rate is a tensor in float32, which is all that may differ: the arguments of each step are read, and
    no result is overwritten by the next. GPUs have the same test in test_promises.py."""
    plain = run('--out_dir=out/plain', '--overwrite', *knobs)
    recorded = []

    class Recorded(machine.Recorded):
        def __init__(self, function):
            super().__init__(function)
            recorded.append(self)

    create = train.create_optimizers
    monkeypatch.setattr(torch.cuda, 'Stream', lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, 'current_stream', torch.cuda.Stream)
    for name in ('stream', 'graph'):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', lambda: Replayed(recorded[-1]))

    def create_and_record(*arguments, **options):
        run = sys._getframe(1).f_locals['self']
        run.update = Recorded(run.update)
        return create(*arguments, **options)

    monkeypatch.setattr(train, 'create_optimizers', create_and_record)
    again = run('--out_dir=out/recorded', '--overwrite', *knobs, stop_at=6)
    again += run('--out_dir=out/recorded', *knobs, '--init_from=resume')
    assert [each.calls for each in recorded] == [6, 4] and [each.graph.replays for each in recorded] == [3, 1]
    models = (load(f'out/{name}')['model'] for name in ('plain', 'recorded'))
    torch.testing.assert_close(*models, atol=1e-5, rtol=1e-5)
    assert re.findall('loss +.*norm', plain) == re.findall('loss +.*norm', again)


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler')
def test_a_compiled_run_follows_the_plain_one(run, monkeypatch):
    losses = []
    # an evaluation has another shape, which would be compiled as well
    monkeypatch.setattr(train.Run, 'evaluate', lambda run, net, signals: 1.0)
    for compiled in (False, True):
        printed = run(f'--out_dir=out/compiled_{compiled}', f'--compile={compiled}', '--n_layer=1', '--max_iters=50')
        assert ('cpu, float32, compiled' in printed) == compiled
        lines = map(json.loads, open(f'out/compiled_{compiled}/metrics.jsonl'))
        losses.append([line['loss'] for line in lines if 'loss' in line])
    assert len(losses[0]) == 10 and losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
