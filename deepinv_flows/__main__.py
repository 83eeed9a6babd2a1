"""``python -m deepinv_flows`` prints what a bug report needs."""

import importlib.metadata
import platform

import torch

from . import __version__
from .weights import shipped

PACKAGES = ("deepinv", "torch", "torchvision", "FrEIA", "safetensors", "numpy", "zuko", "scikit-image")
INSTRUCTIONS = {"avx2": "AVX2", "avx512_f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}


def installed(package: str) -> str:
    """The version of a package, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, str]:
    """Versions, devices and shipped weights, by what they are called."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    devices = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return {
        "deepinv_flows": __version__,
        **{package: installed(package) for package in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "instructions": ", ".join(name for key, name in INSTRUCTIONS.items() if found.get(key)) or "none known",
        "CUDA": ", ".join(devices) or "none",
        "threads": str(torch.get_num_threads()),
        "shipped weights": ", ".join(shipped()),
    }


if __name__ == "__main__":
    for name, value in facts().items():
        print(f"{name:<16}{value}")
