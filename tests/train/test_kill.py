"""A run is killed, again and again, at any moment, and goes on as if nothing had happened."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

import warm
from glassformer.train import Constant
from glassformer.train.checkpoint import list_steps, newest
from glassformer.train.interrupt import Interrupts
from glassformer.train.log import read_metrics
from train import killed, small


def start(folder: Path, steps: int, compile: bool, *flags: str, hash_seed: str | None = None) -> warm.Program:
    """With ``hash_seed`` from nothing, so that sets have another order in each process."""
    arguments = [killed.__file__, str(folder), str(steps), str(compile), *flags]
    return warm.Program(arguments) if hash_seed is None else warm.Program(arguments, environment={"PYTHONHASHSEED": hash_seed}, cold=True)


def read_until(process: warm.Program, line: str) -> list[str]:
    """Lines of the process up to the first that begins with ``line``."""
    seen = []
    for found in process.stdout:
        seen.append(found.strip())
        if found.startswith(line):
            return seen
    raise AssertionError(f"{line!r} never came: {seen} {process.errors()}")


def kill_at(folder: Path, line: str, steps: int, compile: bool, *flags: str, hash_seed: str | None = None) -> None:
    process = start(folder, steps, compile, *flags, hash_seed=hash_seed)
    try:
        read_until(process, line)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def finish(folder: Path, steps: int, compile: bool, hash_seed: str | None = None) -> None:
    out, err = start(folder, steps, compile, hash_seed=hash_seed).communicate()
    assert f"stopped None {steps}" in out, err


def logged(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row]


def test_killed_between_saves_and_while_saving_a_run_continues_bit_for_bit(tmp_path):
    whole = killed.run(str(tmp_path / "whole"), 13, False)
    broken = tmp_path / "broken"
    kill_at(broken, "step 8", 13, False)
    kill_at(broken, "writing .step-00000010.draft optimizer.safetensors", 13, False, "--slow-disk")
    assert newest(broken)[0].step == 5
    finish(broken, 13, False)
    assert logged(broken) == list(enumerate(whole, 1))
    assert not list((broken / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_killed_at_many_moments_a_run_continues_bit_for_bit(tmp_path):
    whole = killed.run(str(tmp_path / "whole"), 18, False)
    broken = tmp_path / "broken"
    kill_at(broken, "writing .step-00000000.draft state.json", 18, False, "--slow-disk")  # its very first checkpoint is half written
    kill_at(broken, "step 3", 18, False)  # before the second
    kill_at(broken, "step 6", 18, False)
    kill_at(broken, "writing broken checkpoints", 18, False, "--slow-disk")  # renamed, but the folder is not yet flushed
    kill_at(broken, "step 16", 18, False, hash_seed="1")
    finish(broken, 18, False, hash_seed="2")
    assert logged(broken) == list(enumerate(whole, 1))
    assert not list((broken / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_compiled_run_continues_bit_for_bit(tmp_path):
    """Killed once, while saving: at which other moments is the same for eager runs (above), and each process compiles for seconds."""
    finish(tmp_path / "whole", 12, True)
    broken = tmp_path / "broken"
    kill_at(broken, "writing .step-00000010.draft model.safetensors", 12, True, "--slow-disk")
    assert newest(broken)[0].step == 5
    finish(broken, 12, True)
    assert logged(broken) == logged(tmp_path / "whole")
    assert len(logged(broken)) == 12


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_saves_and_ends_cleanly(tmp_path, name):
    process = start(tmp_path, 1000, False, "--body")
    read_until(process, "step 2")
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    number = int(out.split()[-1])
    assert f"stopped {name} {number}" in out
    assert 2 <= number <= 4
    assert list_steps(tmp_path)[-1] == number
    assert (tmp_path / "loss.png").exists()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path):
    process = start(tmp_path, 1000, False, "--body")
    read_until(process, "step 1")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGTERM, 0)  # 0: the two arrived as one


def test_within_a_process_signals_are_noted_and_handlers_put_back(tmp_path):
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts out ignoring it
    try:
        _signals_are_noted_and_handlers_put_back(tmp_path)
    finally:
        signal.signal(signal.SIGINT, found)


def _signals_are_noted_and_handlers_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = small.trainer(folder=tmp_path, steps=9, schedule=Constant())
    for step in trainer:
        if step.number == 4:
            signal.raise_signal(signal.SIGINT)
    assert (trainer.stopped, trainer.number, trainer.finished) == ("SIGINT", 4, False)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert newest(tmp_path)[0].step == 4
    whole = small.losses(small.trainer(steps=9, schedule=Constant()))
    assert small.losses(small.trainer(folder=tmp_path, steps=9, schedule=Constant(), resume=True)) == whole[4:]
    steps = iter(small.trainer(steps=9))
    next(steps)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    steps.close()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_in_another_thread_no_handler_is_installed():
    caught = []

    def work() -> None:
        before = signal.getsignal(signal.SIGINT)
        with Interrupts() as interrupts:
            caught.append((signal.getsignal(signal.SIGINT) is before, interrupts.caught))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert caught == [(True, None)]
