"""Training settings from command lines, config files and presets."""

import json
import os
from pathlib import Path

import pytest

from pytbptt.errors import InputError
from pytbptt.nn import AWDLSTMConfig, TransformerXLConfig
from pytbptt.training.config import PRESETS, read_command_line, to_toml

FAIRSEQ_COMMAND = """
    --user-dir examples/truncated_bptt data-bin/wikitext-103/ --task truncated_bptt_lm --tokens-per-sample 150
    --batch-size 15 --max-update 200000 --arch transformer_xl --n-layer 16 --d-model 410 --n-head 10 --d-head 41
    --d-inner 2100 --dropout 0.1 --dropatt 0.0 --mem-len 150 --optimizer adam --clip-norm 0.25 --lr-scheduler cosine
    --warmup-updates 0 --min-lr 0.0 --lr 0.00025 --log-format json --log-interval 25 --fp16
""".split()


def test_fairseq_example_command_is_parsed() -> None:
    settings = read_command_line(FAIRSEQ_COMMAND)
    assert settings.data.data == "data-bin/wikitext-103/"
    assert (settings.data.tokens_per_sample, settings.data.batch_size) == (150, 15)
    assert isinstance(settings.model, TransformerXLConfig)
    assert (settings.model.n_layer, settings.model.d_head, settings.model.mem_len) == (16, 41, 150)
    assert settings.model.cutoffs == (20000, 40000, 200000)
    assert settings.optimization.fp16
    assert settings.logging.log_format == "json"
    assert settings.checkpoint.save_dir == "checkpoints"


def test_no_arguments_select_built_in_corpus_and_preset() -> None:
    settings = read_command_line([])
    assert settings.data.data == "python-stdlib"
    assert settings.preset == "python-stdlib"
    assert settings.checkpoint.save_dir == "runs/python-stdlib"


def test_built_in_corpus_has_preset_for_each_architecture() -> None:
    settings = read_command_line(["--arch", "transformer_xl"])
    assert settings.preset == "python-stdlib-xl"
    assert isinstance(settings.model, TransformerXLConfig)
    assert (settings.model.d_model, settings.model.mem_len) == (128, 64)
    assert read_command_line(["--arch", "awd_lstm"]).preset == "python-stdlib"


def test_list_flags_accept_fairseq_syntax() -> None:
    settings = read_command_line(["data", "--adam-betas", "(0.9, 0.98)", "--cutoffs", "20,30", "--arch", "awd_lstm"])
    assert settings.optimization.adam_betas == (0.9, 0.98)
    assert settings.model.cutoffs == (20, 30)
    settings = read_command_line(["--adam-betas", "0.9", "0.98", "--cutoffs", "20", "30", "--", "(data, here)"])
    assert settings.optimization.adam_betas == (0.9, 0.98)
    assert settings.data.data == "(data, here)"


def test_data_argument_disables_default_preset() -> None:
    assert read_command_line(["some/data"]).preset == ""
    assert read_command_line(["--lr", "0.1", "some/data"]).checkpoint.save_dir == "checkpoints"


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_preset_value_is_applied(path: Path) -> None:
    settings = read_command_line(["--preset", path.stem])
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    actual = dict(line.split(" = ") for line in to_toml(settings).decode().splitlines())
    for line in lines:
        key, expected = line.split(" = ")
        assert json.loads(actual[key]) == json.loads(expected)


def test_precedence_flags_config_preset(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('lr = 0.5\nclip_norm = 2.0\nadam-betas = [0.5, 0.6]\nfp16 = true\ndata = "there"\n')
    settings = read_command_line(["--preset", "wt103-base", "--config", str(config), "--lr", "0.25", "--no-fp16"])
    assert settings.optimization.lr == 0.25
    assert settings.optimization.clip_norm == 2.0
    assert settings.optimization.adam_betas == (0.5, 0.6)
    assert not settings.optimization.fp16
    assert settings.data.data == "there"
    assert settings.data.update_freq == 4


def test_settings_survive_toml_round_trip(tmp_path: Path) -> None:
    save_dir = os.fsdecode('a "b" \U0001f642'.encode() + b"\xff")  # a path need not be UTF-8
    first = read_command_line(["--preset", "awd-lstm-wt2", "--save-dir", save_dir, "--cutoffs", "3", "9"])
    path = tmp_path / "config.toml"
    path.write_bytes(to_toml(first))
    second = read_command_line(["--config", str(path)])
    assert isinstance(second.model, AWDLSTMConfig)
    assert second.checkpoint.save_dir == save_dir
    assert to_toml(second) == to_toml(first)


def test_arch_flag_overrides_preset_and_drops_its_model_settings() -> None:
    settings = read_command_line(["--preset", "awd-lstm-ptb", "--arch", "transformer_xl", "--n-head", "2"])
    assert isinstance(settings.model, TransformerXLConfig)
    assert (settings.model.n_head, settings.model.n_layer, settings.model.dropout) == (2, 12, 0.0)
    assert settings.data.bptt_variation == "awd"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n-layr", "3"], "--n-layr: unknown flag; did you mean --n-layer?"),
        (["data", "--tokens_per_sampel", "3"], "did you mean --tokens-per-sample?"),
        (["--batch-size", "0"], "--batch-size: found 0, expected at least 1"),
        (["--lr", "nan"], "--lr: found nan, expected at least 0"),
        (["--lr", "fast"], "--lr"),
        (["--arch", "gru"], "gru"),
        (["--preset", "wt103-bas"], "did you mean wt103-base?"),
        (["--config", "missing.toml"], "missing.toml: No such file"),
        (["--fp16", "--bf16"], "found both"),
        (["--task", "translation"], "translation"),
        (["--config"], "--config"),
        (["--seed", "99999999999999999999"], "--seed: found 99999999999999999999, expected less than 2**63"),
        (["--cutoffs", "3", "x"], "--cutoffs: found"),
    ],
)
def test_invalid_arguments_raise_one_line_errors(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        read_command_line(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_config_key_error_names_file_and_closest_key(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("lrr = 3\n")
    with pytest.raises(InputError, match=r"config\.toml: lrr: unknown; did you mean lr\?"):
        read_command_line(["--config", str(config)])
    config.write_text("lr = = 3\n")
    with pytest.raises(InputError, match=r"config\.toml: not TOML"):
        read_command_line(["--config", str(config)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('lr = "fast"', 'lr: found "fast", expected float'),
        ("batch-size = 1.5", "batch-size: found 1.5, expected int"),
        ("fp16 = 1", "fp16: found 1, expected bool"),
        ("n-layer = true", "n-layer: found true, expected int"),
        ('optimizer = "adagrad"', 'optimizer: found "adagrad", expected one of adam, adamw, sgd, asgd'),
        ("adam-betas = [0.9]", r"adam-betas: found \[0.9\], expected a list of float, 2 of them"),
        ('cutoffs = [1, "x"]', 'cutoffs: found "x", expected int'),
        ("arch = [1]", r"arch: found \[1\], expected one of transformer_xl, awd_lstm"),
        ("cutoffs = 3", "cutoffs: found 3, expected a list of int"),
        ('arch = "gru"', "arch: found gru, expected one of transformer_xl, awd_lstm"),
        ("[model]\nlr = 1", "model: unknown"),
        ('config = "other.toml"', "config: unknown"),
    ],
)
def test_config_file_values_are_type_checked(tmp_path: Path, line: str, message: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(line + "\n")
    with pytest.raises(InputError, match=rf"config\.toml: {message}"):
        read_command_line(["--config", str(config)])


def test_config_file_can_extend_preset_and_keeps_data_argument(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('preset = "wt103-base"\nlr = 1\ncutoffs = [5, 10]\n')
    settings = read_command_line(["--config", str(config), "some/data"])
    assert (settings.data.data, settings.data.update_freq) == ("some/data", 4)
    assert settings.optimization.lr == 1.0
    assert settings.model.cutoffs == (5, 10)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--bptt-backward 100", "--bptt-backward: found 100, expected at least the 150 tokens of an update, or 0"),
        ("--bptt-chunks 2 --bptt-backward 200", "found 200, expected at least the 300 tokens of an update, or 0"),
        ("--bptt-chunks 0", "--bptt-chunks: found 0, expected at least 1"),
        ("--bptt-adaptive", "--bptt-adaptive: found --bptt-backward 0, expected more than the 16 tokens"),
    ],
)
def test_inconsistent_bptt_flags_raise(flags: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_command_line(["data", *flags.split()])
