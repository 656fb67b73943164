"""Show the installation, or what a checkpoint contains: python -m pytbptt.info [CHECKPOINT]

Without a checkpoint: versions, what the extension was built with, and which implementation each op will use.
"""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pytbptt import __version__, checkpoint as checkpoints
from pytbptt.data import Vocabulary
from pytbptt.ops import dispatch
from pytbptt.ops.extension import EXTENSION
from pytbptt.runtime.build_record import build_command
from pytbptt.runtime.cli import run
from pytbptt.runtime.extras import Positional


@dataclass
class InfoSettings:
    checkpoint: Positional[str] = ""
    """Checkpoint to describe; no code in it is executed. Empty: describe the installation."""


def describe_installation() -> list[str]:
    """Lines that describe the installation."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    result = [
        f"pytbptt       {__version__} in {Path(__file__).parent}",
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch         {torch.__version__}, {cuda}, {torch.get_num_threads()} threads",
    ]
    if EXTENSION.facts is None:
        result.append(f"extension     none: {EXTENSION.unavailable_reason}")
    else:
        facts = EXTENSION.facts
        result += [
            f"extension     compiled with torch {facts['torch']}'s headers by {facts['compiler']}",
            f"CPU kernels   built for {', '.join(facts['cpu_isas'])}; this machine runs {facts['cpu_isa_in_use']}",
            f"CUDA kernels  {_cuda_kernels(facts)}; they need compute capability 8.0 or more: older GPUs, such as V100 "
            "and T4, run the reference",
        ]
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        for op in dispatch.OPS:
            implementation = dispatch.describe(op, torch.device(device), torch.float32)
            result.append(f"{op + ' on ' + device:<25}{implementation}")
    return result


def _cuda_kernels(facts: dict[str, Any]) -> str:
    if facts["why_no_cuda"] is not None:
        how = f"; to build them: {build_command()}" if torch.version.cuda else ""
        return f"none: {facts['why_no_cuda']}{how}"
    return f"built for {facts['cuda_architectures']} by CUDA {facts['cuda_toolkit']}"


def describe_checkpoint(path: Path) -> list[str]:
    """Lines that describe a checkpoint.

    Raises:
        InputError: the file is missing, damaged or not a checkpoint.
    """
    checkpoint = checkpoints.read(path)
    model = checkpoint["config"]["model"]
    vocabulary = Vocabulary.from_state_dict(checkpoint["vocabulary"])
    text_format = checkpoints.text_format(checkpoint)
    # Tied weights are in the dict more than once, but are one tensor.
    weights = {tensor.data_ptr(): tensor.numel() for tensor in checkpoint["model"].values()}
    return [
        f"checkpoint    {path}, {path.stat().st_size:,} bytes, format {checkpoint['format']}",
        f"model         {model['arch']}, {sum(weights.values()):,} parameters",
        *(f"  {name:<25} {value}" for name, value in model.items() if name != "arch"),
        f"vocabulary    {len(vocabulary):,} {vocabulary.kind}",
        f"text          documents: {text_format.documents or 'not known'}; memory reset on: {text_format.reset_on}",
        *(["progress      none: converted weights"] if checkpoint["progress"] is None else _describe_run(checkpoint)),
    ]


def _describe_run(checkpoint: dict[str, Any]) -> list[str]:
    """Lines that describe the run that wrote a checkpoint."""
    run_settings, average = checkpoint["config"]["run"], checkpoint["average"]
    progress, loader = checkpoint["progress"], checkpoint["loader"]
    stopped = progress["stopped"] and f", ended at {progress['stopped']}"
    of_total = f" of {run_settings['max_update']:,}" if run_settings["max_update"] else ""
    position = f"at token {loader['position']:,} of {loader['tokens_per_stream']:,}"
    return [
        f"progress      update {progress['update']:,}{of_total}{stopped}; "
        f"{progress['tokens']:,} tokens; best validation loss {progress['best_loss']:.4f}",
        f"data          {run_settings['data']} (fingerprint {loader['data']})",
        f"streams       {loader['streams']}, epoch {loader['epoch'] + 1}, each {position}",
        *(f"memory        {name} {_shape(tensor)}" for name, tensor in checkpoint["memory"].items()),
        f"optimizer     {run_settings['optimizer']}, state of {len(checkpoint['optimizer']['state'])} parameters, "
        f"learning rate {checkpoint['scheduler']['lr']:.3g}",
        f"average       {'of ' + str(average['updates']) + ' updates' if average['mean'] is not None else 'none'}",
        f"loss scaling  {checkpoint['scaler'].get('scale', 'none')}",
        f"random states of {len(checkpoint['rng'])} processes",
    ]


def _shape(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def info(settings: InfoSettings) -> None:
    """Print the installation's or the checkpoint's description."""
    print("\n".join(describe_checkpoint(Path(settings.checkpoint)) if settings.checkpoint else describe_installation()))


if __name__ == "__main__":
    run("python -m pytbptt.info", InfoSettings, info, __doc__)
