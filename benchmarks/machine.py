"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch


def describe_machine() -> dict[str, str]:
    """Names the processor, or the GPU, and the version of PyTorch."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    processor = found[1] if found else platform.processor()
    return {"device": f"{processor}, {os.cpu_count()} cores", "torch": torch.__version__}
