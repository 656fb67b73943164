"""The training loop: gradient accumulation, memory across chunks, non-finite values, stopping and resuming."""

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import pytbptt.memory
from pytbptt.checkpoint import load_checkpoint
from pytbptt.errors import InputError, RunError
from pytbptt.training.metrics_log import METRICS_FILE, Log, read_metrics
from pytbptt.training.resume import resume
from pytbptt.training.stopping import MAX_SKIPPED_IN_A_ROW
from pytbptt.training.trainer import Trainer
from tests.common.trainer_setup import SIZE_FLAGS, flat_weights, make_settings, make_trainer


def make_log(trainer: Trainer) -> Log:
    return Log(
        trainer.settings.logging,
        trainer.save_dir,
        enabled=True,
        update=0,
        validated_at=-1,
        max_update=0,
        tokens=0,
        sizes={},
    )


def train(trainer: Trainer) -> list[dict[str, Any]]:
    log = make_log(trainer)
    trainer.fit(log)
    log.close()
    return read_metrics(trainer.save_dir / METRICS_FILE)


def convert_to_float64(trainer: Trainer) -> None:
    trainer.model.double()
    groups = range(trainer.settings.data.update_freq)
    trainer.step.bptt.reset_state([trainer.model.init_memory(trainer.settings.data.batch_size) for _ in groups])


@pytest.mark.parametrize("arch", SIZE_FLAGS)
@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--bptt-variation", "awd", "--reset-on", "</s>", "--rotate"),
        ("--bptt-backward", "20", "--bptt-variation", "awd", "--reset-on", "</s>"),
        ("--bptt-chunks", "3", "--rotate"),
    ],
)
def test_update_freq_equals_larger_batch(corpus: str, tmp_path: Path, arch: str, extra: tuple[str, ...]) -> None:
    trainers = [
        make_trainer(make_settings(corpus, tmp_path / "one", arch, "--batch-size", 4, *extra)),
        make_trainer(make_settings(corpus, tmp_path / "two", arch, "--batch-size", 2, "--update-freq", 2, *extra)),
    ]
    for trainer in trainers:
        convert_to_float64(trainer)
        updates = trainer.updates()
        for _ in range(12):
            trainer.update(next(updates))
        updates.close()
    one, two = trainers
    torch.testing.assert_close(flat_weights(one), flat_weights(two), rtol=0, atol=1e-10)
    assert one.step.metrics.sums[1] == two.step.metrics.sums[1]
    assert float(one.step.metrics.sums[0]) == pytest.approx(float(two.step.metrics.sums[0]), rel=1e-6)
    joined = pytbptt.memory.concatenate(two.step.bptt.states)
    for name, expected in pytbptt.memory.state_dict(one.step.bptt.states[0]).items():
        torch.testing.assert_close(pytbptt.memory.state_dict(joined)[name], expected)


@pytest.mark.parametrize("arch", SIZE_FLAGS)
def test_bptt_backward_gradients_equal_one_long_chunk_scoring_last_tokens(
    corpus: str, tmp_path: Path, arch: str
) -> None:
    """With resets among the last --bptt-backward tokens, and from the memory before these tokens."""
    window = ("--same-length",) if arch == "transformer_xl" else ()
    trainer = make_trainer(
        make_settings(corpus, tmp_path / "run", arch, "--bptt-backward", 23, "--lr", 0, "--reset-on", "</s>", *window)
    )
    convert_to_float64(trainer)
    trainer.model.eval()
    chunks = [chunk for (chunk,) in islice(trainer.updates(), 9)]
    for chunk in chunks[:-1]:
        trainer.update([chunk])
    parameters = list(trainer.model.parameters())
    trainer.step.bptt.accumulate(((chunks[-1].tokens, chunks[-1].reset), (chunks[-1].targets, None)))
    gradients = [parameter.grad for parameter in parameters]
    trainer.model.zero_grad()

    tokens, targets = (torch.cat([getattr(chunk, name) for chunk in chunks], dim=1) for name in ("tokens", "targets"))
    reset = torch.cat([chunk.reset for chunk in chunks if chunk.reset is not None], dim=1)
    assert reset[:, -23:].any()
    before, within = slice(None, -23), slice(-23, None)
    _, memory = trainer.model(tokens[:, before], None, reset[:, before])
    targets[:, :-7] = -100
    result, _ = trainer.model.loss(tokens[:, within], targets[:, within], memory, reset[:, within])
    result.objective.backward()  # type: ignore[no-untyped-call]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", SIZE_FLAGS)
def test_adaptive_backward_length_follows_measured_bias(corpus: str, tmp_path: Path, arch: str) -> None:
    def backward_lengths(tolerance: float) -> list[int]:
        flags = ("--bptt-adaptive", "--bptt-backward", 20, "--bptt-tolerance", tolerance, "--bptt-interval", 5)
        trainer = make_trainer(
            make_settings(corpus, tmp_path / str(tolerance), arch, *flags, "--max-update", 12, "--log-interval", 4)
        )
        entries = [entry for entry in train(trainer) if entry["split"] == "train"]
        assert trainer.step.bptt.context == entries[-1]["bptt_backward"] - 7
        return [entry["bptt_backward"] for entry in entries]

    assert backward_lengths(1e-9) == [20] * 3  # no length has so little bias: the maximum
    assert backward_lengths(1e9) == [7] * 3
    assert set(backward_lengths(0.1)) <= set(range(7, 21))


def test_each_chunk_is_read_once_and_undivided_by_default(corpus: str, tmp_path: Path) -> None:
    trainer = make_trainer(make_settings(corpus, tmp_path / "run", "awd_lstm"))
    lengths: list[int] = []
    trainer.step.bptt.model.register_forward_pre_hook(
        lambda module, arguments: lengths.append(arguments[0][0].shape[1])
    )
    for chunks in islice(trainer.updates(), 3):
        trainer.update(chunks)
    assert lengths == [7, 7, 7]
    assert trainer.step.bptt.context_inputs == [None]


@pytest.mark.parametrize("arch", SIZE_FLAGS)
def test_loss_decreases_and_logged_metrics_are_correct(corpus: str, tmp_path: Path, arch: str) -> None:
    trainer = make_trainer(
        make_settings(corpus, tmp_path / "run", arch, "--max-update", 150, "--log-interval", 10, "--lr", 0.05)
    )
    entries = train(trainer)
    train_entries = [entry for entry in entries if entry["split"] == "train"]
    assert [entry["step"] for entry in train_entries] == list(range(10, 151, 10))
    # A unigram model has 0.96 of the first loss; with 25 seeds the last loss was below 0.79 of the first.
    assert train_entries[-1]["loss"] < 0.9 * train_entries[0]["loss"]
    assert train_entries[-1]["tokens"] == count_targets(trainer, 150)
    valid = [entry for entry in entries if entry["split"] == "valid"]
    assert valid[-1]["step"] == 150
    assert trainer.valid_tokens is not None
    assert trainer.score(trainer.valid_tokens).loss == pytest.approx(valid[-1]["loss"], rel=1e-6)
    assert trainer.progress.stopped == "update 150 (--max-update)"


def count_targets(trainer: Trainer, updates: int) -> int:
    per_epoch = [7] * (trainer.loader.tokens_per_stream // 7)
    if rest := trainer.loader.tokens_per_stream % 7:
        per_epoch.append(rest)
    lengths = per_epoch * (1 + updates // len(per_epoch))
    return trainer.loader.streams * sum(lengths[:updates])


def test_memory_is_reset_at_epoch_end_and_carried_between_chunks(corpus: str, tmp_path: Path) -> None:
    trainer = make_trainer(make_settings(corpus, tmp_path / "run", "awd_lstm", "--max-epoch", 1))
    train(trainer)
    assert all(tensor.abs().sum() == 0 for tensor in pytbptt.memory.state_dict(trainer.step.bptt.states[0]).values())
    for chunks in trainer.updates():
        trainer.update(chunks)
    assert all(tensor.abs().sum() > 0 for tensor in pytbptt.memory.state_dict(trainer.step.bptt.states[0]).values())
    trainer.step.reset_streams()
    assert all(tensor.abs().sum() == 0 for tensor in pytbptt.memory.state_dict(trainer.step.bptt.states[0]).values())


def test_non_finite_gradient_skips_update_and_repeated_skips_raise(corpus: str, tmp_path: Path) -> None:
    trainer = make_trainer(make_settings(corpus, tmp_path / "run", "awd_lstm"))
    updates = trainer.updates()
    trainer.update(next(updates))

    def sums_of_exp_avg() -> str:
        state = trainer.step.optimizer.state_dict()["state"]
        return json.dumps({k: float(v["exp_avg"].sum()) for k, v in state.items()})

    parameter = next(trainer.model.parameters())
    hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
    weights_before = flat_weights(trainer)
    state_before = sums_of_exp_avg()
    trainer.update(next(updates))
    assert torch.equal(flat_weights(trainer), weights_before)
    assert sums_of_exp_avg() == state_before
    trainer.raise_if_too_many_skipped()
    assert (trainer.progress.skipped, trainer.progress.update) == (1, 2)
    for _ in range(MAX_SKIPPED_IN_A_ROW - 2):
        trainer.update(next(updates))
        trainer.raise_if_too_many_skipped()
    trainer.update(next(updates))
    with pytest.raises(RunError, match="lower --lr"):
        trainer.raise_if_too_many_skipped()
    hook.remove()
    updates.close()


def test_non_finite_memory_is_replaced_by_initial_memory(corpus: str, tmp_path: Path) -> None:
    trainer = make_trainer(make_settings(corpus, tmp_path / "run", "transformer_xl"))
    updates = trainer.updates()
    memory = trainer.step.bptt.states[0]
    trainer.step.bptt.states[0] = dataclasses.replace(
        memory, hidden=torch.full_like(memory.hidden, float("nan")), first=torch.zeros_like(memory.first)
    )
    trainer.update(next(updates))
    assert trainer.step.metrics.skips.tolist() == [1, 1]
    assert all(tensor.isfinite().all() for tensor in pytbptt.memory.state_dict(trainer.step.bptt.states[0]).values())
    trainer.update(next(updates))
    assert trainer.step.metrics.skips.tolist() == [1, 0]
    updates.close()


def test_learning_rate_is_scaled_by_awd_chunk_length(corpus: str, tmp_path: Path) -> None:
    flags = ("--bptt-variation", "awd", "--tokens-per-sample", 20, "--lr-scheduler", "constant")
    trainer = make_trainer(make_settings(corpus, tmp_path / "run", "awd_lstm", *flags))
    updates, lengths = trainer.updates(), set()
    for chunks in updates:
        trainer.update(chunks)
        length = chunks[0].tokens.shape[1]
        assert trainer.step.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * length / 20)
        lengths.add(length)
    assert len(lengths) > 3


def test_patience_max_epoch_and_max_minutes_stop_training(corpus: str, tmp_path: Path) -> None:
    patience = make_trainer(
        make_settings(corpus, tmp_path / "a", "awd_lstm", "--lr", 0, "--patience", 2, "--validate-interval-updates", 3)
    )
    train(patience)
    assert patience.progress.stopped == "2 validations without improvement (--patience)"
    assert patience.progress.update == 9
    epochs = make_trainer(make_settings(corpus, tmp_path / "b", "awd_lstm", "--max-epoch", 2))
    train(epochs)
    assert epochs.progress.stopped == "the end of epoch 2 (--max-epoch)"
    assert epochs.progress.update == 2 * -(-epochs.loader.tokens_per_stream // 7)
    minutes = make_trainer(make_settings(corpus, tmp_path / "c", "awd_lstm", "--max-minutes", 0.001))
    train(minutes)
    assert "minutes" in minutes.progress.stopped


def test_nt_asgd_best_checkpoint_has_averaged_weights(corpus: str, tmp_path: Path) -> None:
    flags = "--optimizer asgd --lr 5 --lr-scheduler constant --nonmono 1 --validate-interval-updates 2".split()
    trainer = make_trainer(make_settings(corpus, tmp_path / "run", "awd_lstm", *flags, "--max-update", 60))
    train(trainer)
    assert trainer.step.average.updates > 0
    best, *_ = load_checkpoint(tmp_path / "run" / "checkpoint_best.pt", torch.device("cpu"))
    state = torch.load(tmp_path / "run" / "checkpoint_best.pt", weights_only=True)["average"]
    if state["updates"]:
        assert all(torch.equal(dict(best.named_parameters())[name], mean) for name, mean in state["mean"].items())
    resumed = make_trainer(make_settings(corpus, tmp_path / "run", "awd_lstm", *flags, "--max-update", 60))
    resume(resumed, torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True))
    assert resumed.step.average.updates == trainer.step.average.updates
    assert torch.equal(flat_weights(resumed), flat_weights(trainer))


def test_learning_rate_is_restored_on_resume(corpus: str, tmp_path: Path) -> None:
    """Even before the next update sets it: a run that resumes and makes no update saves the rate that it loaded."""
    flags = ("--warmup-updates", 10, "--max-update", 4)
    train(make_trainer(make_settings(corpus, tmp_path / "run", "awd_lstm", *flags)))
    checkpoint = torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True)
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.004)
    resumed = make_trainer(make_settings(corpus, tmp_path / "run", "awd_lstm", *flags))
    resume(resumed, checkpoint)
    assert resumed.step.optimizer.state_dict()["param_groups"] == checkpoint["optimizer"]["param_groups"]


def test_bf16_loss_decreases(corpus: str, tmp_path: Path) -> None:
    for arch in SIZE_FLAGS:
        trainer = make_trainer(make_settings(corpus, tmp_path / arch, arch, "--bf16", "--max-update", 40))
        entries = [entry for entry in train(trainer) if entry["split"] == "train"]
        assert entries[-1]["skipped"] == 0
        assert entries[-1]["loss"] < 4.0


def test_resume_from_incompatible_checkpoint_reports_difference(corpus: str, tmp_path: Path) -> None:
    trainer = make_trainer(make_settings(corpus, tmp_path / "run", "awd_lstm", "--max-update", 1))
    train(trainer)
    checkpoint = torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True)
    for flags, message in (
        (("--d-hidden", 18), "d_hidden 16, the settings say 18"),
        (("--batch-size", 6), "a run of 4 streams, .* is 6: --reset-streams resumes"),
        (("--optimizer", "sgd"), "--optimizer adam, the settings say sgd"),
        (("--rotate",), "--rotate False, the settings say True"),
    ):
        other = make_trainer(make_settings(corpus, tmp_path / "run", "awd_lstm", *flags))
        with pytest.raises(InputError, match=message):
            resume(other, checkpoint)
    other = make_trainer(make_settings(corpus, tmp_path / "run", "transformer_xl"))
    with pytest.raises(InputError, match="arch awd_lstm, the settings say transformer_xl"):
        resume(other, checkpoint)
    with pytest.raises(InputError, match="another vocabulary"):
        resume(trainer, {**checkpoint, "vocabulary": {}})
    with pytest.raises(InputError, match="on other data"):
        resume(trainer, {**checkpoint, "loader": {**checkpoint["loader"], "data": "other"}})
