"""Bundles without their weights, and the weights drawn again elsewhere: gigabytes that need not be carried to a GPU.

    python benchmarks/skeleton.py strip BUNDLE OUT     the graphs, the manifest, and of every weight its mean and deviation
    python benchmarks/skeleton.py fill SKELETON OUT    a bundle with normally distributed weights of those, the same each time

Only for what was built with --random-weights: speed does not depend on the numbers, and a comparison of two devices on the
same numbers means what it says. What is not of a float type, or has at most 4,096 numbers, is kept as it is.
`strip` needs onnx, `fill` numpy alone.
"""

import argparse
import base64
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from llm2slm_export.bundle.files import file_entries
from llm2slm_export.bundle.manifest_file import read_manifest, write_manifest

LAYOUT = "weights.json"
KEPT = 4096  # numbers, up to which a weight is kept
_DRAWN = 1 << 22  # numbers drawn in all: weights are parts of these, one after the other, scaled


def strip(bundle: Path, out: Path) -> None:
    """Write a bundle's skeleton.

    Raises:
        ValueError: a bundle whose weights mean something.
    """
    import onnx

    manifest = read_manifest(bundle)
    if any(source.weights != "random" for source in manifest.sources.values()):
        raise ValueError(f"{bundle} has weights that mean something: build one with --random-weights")
    files = {file: (bundle / file).stat().st_size for entry in manifest.graphs.values() for file in entry.data}
    shutil.copytree(bundle, out, ignore=lambda _, names: [name for name in names if name in files])
    weights: dict[tuple[str, int], dict[str, Any]] = {}
    for entry in manifest.graphs.values():
        for tensor in onnx.load(bundle / entry.file, load_external_data=False).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            place = {pair.key: pair.value for pair in tensor.external_data}
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
            offset = int(place.get("offset", 0))
            weights[place["location"], offset] = _described(
                bundle / place["location"], offset, math.prod(tensor.dims), dtype
            )
    layout = {"files": files, "weights": list(weights.values())}
    (out / LAYOUT).write_text(json.dumps(layout) + "\n", encoding="utf-8")


def _described(path: Path, offset: int, count: int, dtype: np.dtype[Any]) -> dict[str, Any]:
    array = np.fromfile(path, dtype, count, offset=offset)
    about = {"file": path.name, "offset": offset, "count": count, "dtype": dtype.name}
    if count <= KEPT or dtype.kind != "f":
        return about | {"bytes": base64.b64encode(array.tobytes()).decode()}
    return about | {"mean": float(array.mean(dtype=np.float64)), "deviation": float(array.std(dtype=np.float64))}


def fill(skeleton: Path, out: Path) -> None:
    """Write the bundle of a skeleton."""
    shutil.copytree(skeleton, out)
    layout = json.loads((out / LAYOUT).read_text(encoding="utf-8"))
    (out / LAYOUT).unlink()
    drawn = np.random.default_rng(0).standard_normal(_DRAWN, np.float32)
    at = 0
    for file, size in layout["files"].items():
        with (out / file).open("wb") as written:
            written.truncate(size)
    for weight in layout["weights"]:
        with (out / weight["file"]).open("r+b") as written:
            written.seek(weight["offset"])
            if "bytes" in weight:
                written.write(base64.b64decode(weight["bytes"]))
                continue
            left = weight["count"]
            while left:
                part = drawn[at : at + left]
                written.write(
                    (part * np.float32(weight["deviation"]) + np.float32(weight["mean"])).astype(weight["dtype"])
                )
                left -= len(part)
                # Not at the start again: rows of a matrix would be one another's.
                at = at + len(part) if at + len(part) < _DRAWN else (at * 31 + 17) % 4093
    manifest = read_manifest(out)
    write_manifest(out, manifest.model_copy(update={"files": file_entries(out)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["strip", "fill"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    (strip if given.what == "strip" else fill)(given.source, given.out)


if __name__ == "__main__":
    main()
