"""A bundle with engines for the fake TensorRT, made of a bundle's own graphs."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2slm_export.bundle.files import file_entries, graph_digest
from llm2slm_export.bundle.manifest import Bounds, EngineEntry, EngineLimits, EngineSet, Manifest
from llm2slm_export.bundle.manifest_file import read_manifest, write_manifest
from llm2slm_export.contract import ARGMAX_IDS, GRAPHS, MAX_LOGITS, GraphName, TensorSpec
from tests.support.fake_tensorrt import engine_bytes

LIMITS = EngineLimits(batch=8, prompt=64, new=20, capacity=0)  # the capacity follows from the rest
BEST = ((ARGMAX_IDS, "int64"), (MAX_LOGITS, "float32"))
CALL_TOKENS = 4  # the most tokens of a decoder call
CACHED = ("past_key_values.", "present.")


def engine_set(
    manifest: Manifest, directory: Path, key: str, *, dtype: str = "float32", in_place: bool = True, **fields: Any
) -> EngineSet:
    """Write a set's engines, and say what they are. `call_tokens` is the most tokens of a decoder call."""
    limits, call_tokens = fields.pop("limits", LIMITS), fields.pop("call_tokens", CALL_TOKENS)
    prompt = limits.prompt * manifest.shape.context_per_token if manifest.shape.slm_kind == "decoder-only" else 0
    limits = limits.model_copy(update={"capacity": limits.capacity or prompt + limits.new})
    graphs = {
        name: _engine(manifest, directory, key, name, limits, dtype, in_place=in_place, call_tokens=call_tokens)
        for name in GRAPHS
    }
    facts = {"variant": "tensorrt", "version": "11.4.0.106", "compute_capabilities": ("8.9",), "driver": "580"}
    return EngineSet(limits=limits, graphs=graphs, **facts | fields)


def with_engines(source: Path, out: Path, sets: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """A copy of a bundle with engines for every head: one set, or the given ones, by their keys."""
    shutil.copytree(source, out)
    manifest = read_manifest(out)

    def equipped(head: Manifest) -> Manifest:
        made = {key: engine_set(head, out, key, **fields) for key, fields in (sets or {"fake": {}}).items()}
        return head.model_copy(update={"engines": made})

    heads = {name: equipped(head) for name, head in manifest.heads.items()}
    # The manifest's own hashes, which the heads' entries do not repeat.
    whole = equipped(manifest).model_copy(update={"heads": heads})
    write_manifest(out, whole.model_copy(update={"files": file_entries(out)}))
    return out


def _engine(
    manifest: Manifest,
    directory: Path,
    key: str,
    name: GraphName,
    limits: EngineLimits,
    dtype: str,
    *,
    in_place: bool,
    call_tokens: int,
) -> EngineEntry:
    graph, shape = manifest.graphs[name], manifest.shape
    prefix = "" if name == "encoder" else Path(graph.file).name.removesuffix(f"{name}.onnx")
    file = f"tensorrt/{key}/{prefix}{name}.engine"

    def typed(tensor: TensorSpec) -> TensorSpec:
        axes = tuple(limits.capacity if axis == "capacity" else axis for axis in tensor.axes)
        return TensorSpec(tensor.name, dtype if tensor.name.startswith(CACHED) else tensor.dtype, axes)  # type: ignore[arg-type]

    inputs, outputs = tuple(map(typed, graph.inputs)), tuple(map(typed, graph.outputs))
    most = {"batch": limits.batch, "context": limits.prompt * shape.context_per_token}
    one = {"batch": (1, most["batch"]), "context": (1, most["context"])}
    ranges: list[dict[str, tuple[int, int]]]
    if name != "decoder":
        # Two buckets of prompts.
        ranges = [one | {"prompt": (1, limit)} for limit in (limits.prompt // 4, limits.prompt)]
    elif shape.slm_kind == "decoder-only":
        prompt_pass = {"sequence_length": (0, 0), "embeds_length": (1, most["context"]), "num_logits": (1, 1)}
        ranges = [one | prompt_pass]
        ranges += [one | {"sequence_length": n, "embeds_length": (0, 0), "num_logits": n} for n in _calls(call_tokens)]
    else:
        ranges = [one | {"sequence_length": tokens} for tokens in _calls(call_tokens)]
    if name == "decoder":
        outputs += tuple(TensorSpec(*best, ("batch", outputs[0].axes[1])) for best in BEST)  # type: ignore[arg-type]
    entry = EngineEntry(
        file=file,
        source=graph_digest(graph, {f.path: f.sha256 for f in read_manifest(directory).files}),
        precision={"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[dtype],  # type: ignore[arg-type]
        inputs=inputs,
        outputs=outputs,
        profiles=tuple({t.name: _bounds(t, sizes) for t in inputs} for sizes in ranges),
        aliases={s.present.name: s.past.name for s in manifest.cache.state} if in_place and name == "decoder" else {},
    )
    path = directory / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(engine_bytes(directory / graph.file, entry, manifest))
    return entry


def _calls(call_tokens: int) -> list[tuple[int, int]]:
    """The tokens of calls of several tokens, if there are any, and of one."""
    return [(2, call_tokens)] * (call_tokens > 1) + [(1, 1)]


def _bounds(tensor: TensorSpec, sizes: Mapping[str, tuple[int, int]]) -> Bounds:
    low, high = (tuple(axis if isinstance(axis, int) else sizes[axis][side] for axis in tensor.axes) for side in (0, 1))
    return Bounds(minimum=low, optimum=high, maximum=high)
