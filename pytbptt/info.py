"""python -m pytbptt.info: versions, what the extension was built with, and which implementation each op will use."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from pytbptt.extension import EXTENSION
from pytbptt.ops import dispatch


def lines() -> list[str]:
    """What main prints, a line each."""
    try:
        own = version("pytbptt")
    except PackageNotFoundError:
        own = "not installed, run from its source tree"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    result = [
        f"pytbptt       {own}",
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch         {torch.__version__}, {cuda}, {torch.get_num_threads()} threads",
    ]
    if EXTENSION.facts is None:
        result.append(f"extension     none: {EXTENSION.why_absent}")
    else:
        facts = EXTENSION.facts
        result += [
            f"extension     built against torch {facts['torch']} with compiler {facts['compiler']}",
            f"CPU kernels   built for {', '.join(facts['cpu_isas'])}; this machine runs {facts['cpu_isa_in_use']}",
            f"CUDA kernels  {'built' if facts['why_no_cuda'] is None else 'none: ' + facts['why_no_cuda']}",
        ]
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for op in ("rel_attention", "lstm"):
            reason = dispatch.why_not_fused(device, torch.float32)
            result.append(f"{op + ' on ' + device:<22}{'fused' if reason is None else 'reference: ' + reason}")
    return result


def main() -> None:
    print("\n".join(lines()))


if __name__ == "__main__":
    main()
