"""The NVIDIA driver's version, from the first place that tells it."""

import re
import shutil
import subprocess
from pathlib import Path

_FILES = (Path("/sys/module/nvidia/version"), Path("/proc/driver/nvidia/version"))


def driver_version() -> str | None:
    """`580.65.06`; None where there is no driver, or nothing that tells."""
    for path in _FILES:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:
            continue
        # The one file is the number; the other a line in which it comes first.
        if match := re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text):
            return match[0]
    listed = nvidia_smi("driver_version")
    return listed[0] if listed else None


def nvidia_smi(*fields: str) -> tuple[str, ...]:
    """What the driver's own tool says of every GPU, a line each; nothing where it is not installed, or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(result.stdout.splitlines()) if result.returncode == 0 else ()
