from __future__ import annotations

import json
import math
import struct

import pytest

from glassformer.train import log
from glassformer.train.evaluate import Evaluation
from glassformer.train.log import clock, cut, draw_curve, read_metrics, share_done, smoothed
from glassformer.train.peak import matrix_peak, training_flops_per_token
from train import small


def test_every_step_every_evaluation_every_sample_is_a_line(tmp_path):
    trainer = small.trainer(folder=tmp_path, steps=6, validation=small.data(300), evaluate_every=3, sample=lambda m: "to bé\n", sample_every=6)
    steps = list(trainer)
    rows = read_metrics(tmp_path)
    assert [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in rows if "loss" in r] == [(s.number, s.loss, s.grad_norm, s.lr) for s in steps]
    assert [(r["step"], r["validation"]) for r in rows if "validation" in r] == [(3, steps[2].validation.loss), (6, steps[5].validation.loss)]
    assert [(r["step"], r["sample"]) for r in rows if "sample" in r] == [(6, "to bé\n")]
    assert [r["step"] for r in rows] == sorted(r["step"] for r in rows)


def test_parts_of_the_loss_are_logged_too(tmp_path):
    from glassformer.tasks import NextToken

    small.trainer(task=NextToken(z_loss=0.1), folder=tmp_path, steps=2).run()
    for row in read_metrics(tmp_path):
        assert row["cross_entropy"] + row["z_loss"] == pytest.approx(row["loss"], rel=1e-6)


def test_cutting_keeps_whole_lines_up_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": n, "loss": n / 7}) + "\n" for n in range(1, 6)]
    path.write_text("".join(lines) + '{"step": 3, "lo')
    cut(path, 4)
    assert path.read_text() == "".join(lines[:4])
    path.write_text(lines[0] + "no json\n" + lines[1])
    cut(path, 9)
    assert path.read_text() == lines[0]
    path.write_text(lines[0] + lines[1].rstrip())
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    cut(path, 9)
    assert path.read_text() == lines[0]
    cut(tmp_path / "none", 3)
    assert read_metrics(tmp_path / "none") == []


def records(folder) -> list[bytes]:
    """The records of a TensorBoard file: length, checksum, data, checksum."""
    (path,) = folder.glob("tensorboard/events*")
    content, at, found = path.read_bytes(), 0, []
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        found.append(content[at + 12 : at + 12 + length])
        at += length + 16
    return found


def test_tensorboard_files_hold_the_scalars(tmp_path):
    small.trainer(folder=tmp_path, steps=20, tensorboard=True, validation=small.data(300), evaluate_every=10).run()
    text = b"".join(records(tmp_path))
    for name in (b"train/loss", b"train/lr", b"train/grad_norm", b"train/tokens_per_second", b"validation/loss", b"validation/low", b"validation/high"):
        assert text.count(name) == 2, name


def test_the_curve_is_a_picture(tmp_path):
    small.trainer(folder=tmp_path, steps=30, validation=small.data(300)).run()
    picture = (tmp_path / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (1200, 675)


def test_a_curve_of_one_point_and_of_none(tmp_path):
    assert draw_curve(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "validation": 2.0, "error": null}\n')
    assert draw_curve(tmp_path) == tmp_path / "loss.png"


def test_smoothing_is_a_centred_mean():
    assert smoothed([1.0, 2.0, 6.0, 3.0], 1) == [1.5, 3.0, 11 / 3, 4.5]
    assert smoothed([5.0], 3) == [5.0]


def test_progress_without_a_terminal_is_lines_and_silent_when_told(capsys, monkeypatch):
    monkeypatch.setattr(log, "LINE_SECONDS", 0.0)
    small.trainer(steps=4, progress=True, validation=small.data(200)).run()
    shown = capsys.readouterr().err
    assert "step 4/4  loss" in shown
    assert "tokens/s" in shown
    assert "validation loss" in shown
    small.trainer(steps=4, progress=False).run()
    small.trainer(steps=4, progress=None).run()
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(log.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(log, "REFRESH_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "160")
    small.trainer(steps=5, progress=None, folder=tmp_path).run()
    shown = capsys.readouterr().err
    assert "step 5/5" in shown
    assert "of peak" in shown
    assert "left" in shown


def test_clock_and_share():
    assert [clock(s) for s in (0, 59.6, 75, 3600, 3725)] == ["0:00", "1:00", "1:15", "1:00:00", "1:02:05"]
    assert share_done(5, 1.0, 10, None) == 0.5
    assert share_done(5, 9.0, 10, 10.0) == 0.9
    assert share_done(5, 99.0, None, 10.0) == 1.0


def test_the_matrix_peak_is_measured_once_and_kept(tmp_path, monkeypatch):
    assert 1e8 < matrix_peak(size=128) < 1e15
    trainer = small.trainer(folder=tmp_path, steps=12)
    share = trainer.run().peak_share
    assert 0 < share < 1.5
    again = small.trainer(folder=tmp_path, steps=12, resume=True)
    assert again._peak == trainer._peak
    assert small.trainer(steps=1).run().peak_share is None


def test_flops_of_training_are_three_forward_passes():
    model = small.model()
    assert training_flops_per_token(model, 16) == 3 * model.flops_per_token(16)
    from torch import nn

    assert training_flops_per_token(nn.Linear(4, 3, bias=False), 16) == 3 * 2 * 12


def test_an_evaluation_without_error_is_logged(tmp_path):
    made = log.Log(tmp_path, tensorboard=True)
    made.evaluation(3, Evaluation(1.0, math.nan, 1, 5))
    made.close()
    assert read_metrics(tmp_path)[0] == {"step": 3, "validation": 1.0, "error": None, "windows": 1, "perplexity": math.e, "bits_per_byte": None}
