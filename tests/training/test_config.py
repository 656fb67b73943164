import json
import os
from pathlib import Path

import pytest

from pytbptt.errors import InputError
from pytbptt.nn import AWDLSTMConfig, TransformerXLConfig
from pytbptt.training.config import PRESETS, read_command_line, to_toml

SEEDS_COMMAND = """
    --user-dir examples/truncated_bptt data-bin/wikitext-103/ --task truncated_bptt_lm --tokens-per-sample 150
    --batch-size 15 --max-update 200000 --arch transformer_xl --n-layer 16 --d-model 410 --n-head 10 --d-head 41
    --d-inner 2100 --dropout 0.1 --dropatt 0.0 --mem-len 150 --optimizer adam --clip-norm 0.25 --lr-scheduler cosine
    --warmup-updates 0 --min-lr 0.0 --lr 0.00025 --log-format json --log-interval 25 --fp16
""".split()


def test_the_seeds_command_is_read_as_it_stands() -> None:
    settings = read_command_line(SEEDS_COMMAND)
    assert settings.data.data == "data-bin/wikitext-103/"
    assert (settings.data.tokens_per_sample, settings.data.batch_size) == (150, 15)
    assert isinstance(settings.model, TransformerXLConfig)
    assert (settings.model.n_layer, settings.model.d_head, settings.model.mem_len) == (16, 41, 150)
    assert settings.model.cutoffs == (20000, 40000, 200000)
    assert settings.optimization.fp16
    assert settings.logging.log_format == "json"
    assert settings.checkpoint.save_dir == "checkpoints"


def test_no_arguments_mean_the_built_in_corpus_and_its_preset() -> None:
    settings = read_command_line([])
    assert settings.data.data == "python-stdlib"
    assert settings.preset == "python-stdlib"
    assert settings.checkpoint.save_dir == "runs/python-stdlib"


def test_the_built_in_corpus_has_a_preset_for_each_architecture() -> None:
    settings = read_command_line(["--arch", "transformer_xl"])
    assert settings.preset == "python-stdlib-xl"
    assert isinstance(settings.model, TransformerXLConfig)
    assert (settings.model.d_model, settings.model.mem_len) == (128, 64)
    assert read_command_line(["--arch", "awd_lstm"]).preset == "python-stdlib"


def test_lists_may_stand_in_one_word_as_fairseq_takes_them() -> None:
    words = ["data", "--adam-betas", "(0.9, 0.98)", "--cutoffs", "20,30", "--arch", "awd_lstm"]
    settings = read_command_line(words)
    assert settings.optimization.adam_betas == (0.9, 0.98)
    assert settings.model.cutoffs == (20, 30)
    apart = read_command_line(["--adam-betas", "0.9", "0.98", "--cutoffs", "20", "30", "--", "(data, here)"])
    assert apart.optimization.adam_betas == (0.9, 0.98)
    assert apart.data.data == "(data, here)"


def test_a_data_argument_means_no_preset() -> None:
    assert read_command_line(["some/data"]).preset == ""
    assert read_command_line(["--lr", "0.1", "some/data"]).checkpoint.save_dir == "checkpoints"


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_preset_is_read_whole(path: Path) -> None:
    settings = read_command_line(["--preset", path.stem])
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    written = dict(line.split(" = ") for line in to_toml(settings).decode().splitlines())
    for line in lines:
        key, value = line.split(" = ")
        assert json.loads(written[key]) == json.loads(value)


def test_flags_go_before_the_config_file_and_it_before_the_preset(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text('lr = 0.5\nclip_norm = 2.0\nadam-betas = [0.5, 0.6]\nfp16 = true\ndata = "there"\n')
    settings = read_command_line(["--preset", "wt103-base", "--config", str(config), "--lr", "0.25", "--no-fp16"])
    assert settings.optimization.lr == 0.25
    assert settings.optimization.clip_norm == 2.0
    assert settings.optimization.adam_betas == (0.5, 0.6)
    assert not settings.optimization.fp16
    assert settings.data.data == "there"
    assert settings.data.update_freq == 4


def test_written_settings_are_read_back_the_same(tmp_path: Path) -> None:
    anywhere = os.fsdecode('a "b" \U0001f642'.encode() + b"\xff")  # a path need not be UTF-8
    first = read_command_line(["--preset", "awd-lstm-wt2", "--save-dir", anywhere, "--cutoffs", "3", "9"])
    path = tmp_path / "config.toml"
    path.write_bytes(to_toml(first))
    second = read_command_line(["--config", str(path)])
    assert isinstance(second.model, AWDLSTMConfig)
    assert second.checkpoint.save_dir == anywhere
    assert to_toml(second) == to_toml(first)


def test_another_architecture_than_the_presets_drops_the_presets_model() -> None:
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
def test_mistakes_are_named_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        read_command_line(arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_key_of_a_config_file_names_file_and_nearest(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("lrr = 3\n")
    with pytest.raises(InputError, match=r"mine\.toml: lrr: unknown; did you mean lr\?"):
        read_command_line(["--config", str(config)])
    config.write_text("lr = = 3\n")
    with pytest.raises(InputError, match=r"mine\.toml: not TOML"):
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
def test_a_config_files_values_have_their_settings_types(tmp_path: Path, line: str, message: str) -> None:
    config = tmp_path / "mine.toml"
    config.write_text(line + "\n")
    with pytest.raises(InputError, match=rf"mine\.toml: {message}"):
        read_command_line(["--config", str(config)])


def test_a_config_file_may_build_on_a_preset_and_leaves_the_data_argument_alone(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text('preset = "wt103-base"\nlr = 1\ncutoffs = [5, 10]\n')
    settings = read_command_line(["--config", str(config), "some/data"])
    assert (settings.data.data, settings.data.update_freq) == ("some/data", 4)
    assert settings.optimization.lr == 1.0
    assert settings.model.cutoffs == (5, 10)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bptt-backward 100", "--bptt-backward: found 100, expected at least the 150 tokens of an update, or 0"),
        ("--bptt-chunks 2 --bptt-backward 200", "found 200, expected at least the 300 tokens of an update, or 0"),
        ("--bptt-chunks 0", "--bptt-chunks: found 0, expected at least 1"),
        ("--bptt-adaptive", "--bptt-adaptive: found --bptt-backward 0, expected more than the 16 tokens"),
    ],
)
def test_variants_of_truncation_that_make_no_sense_are_refused(words: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_command_line(["data", *words.split()])
