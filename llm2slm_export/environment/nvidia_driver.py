"""The NVIDIA driver's version, from the kernel module or nvidia-smi."""

import re
import shutil
import subprocess
from pathlib import Path

_FILES = (Path("/sys/module/nvidia/version"), Path("/proc/driver/nvidia/version"))


def driver_version() -> str | None:
    """The driver's version, such as `580.65.06`; None if it is unknown or there is no driver."""
    for path in _FILES:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:
            continue
        # /sys has the bare version; in /proc it is the first number of a line.
        if match := re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text):
            return match[0]
    listed = nvidia_smi("driver_version")
    return listed[0] if listed else None


def nvidia_smi(*fields: str) -> tuple[str, ...]:
    """The output of `nvidia-smi --query-gpu`, one CSV line per GPU; empty if the tool is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(result.stdout.splitlines()) if result.returncode == 0 else ()
