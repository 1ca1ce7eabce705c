"""`inspect`: show what a bundle is."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llm2slm_export.cli import console
from llm2slm_export.cli.console import Table, facts_table, size, untrained_effect
from llm2slm_export.cli.options import BundleArgument, JsonOption
from llm2slm_export.cli.resources import directory_bytes
from llm2slm_export.contract import LLM_HEAD

if TYPE_CHECKING:
    from rich.console import Console

    from llm2slm_export.bundle.manifest import EngineSet, GraphEntry, Manifest
    from llm2slm_export.contract import GraphName, TensorSpec
EXAMPLES = """
llm2slm-export inspect engines/demo
llm2slm-export inspect engines/demo --json
"""


def inspect(bundle: BundleArgument, json: JsonOption = False) -> None:
    """Show a bundle's models, graphs, tensors, sizes and parity."""
    from llm2slm_export.bundle.manifest_file import read_manifest

    manifest = read_manifest(bundle)
    total = directory_bytes(bundle)
    files = {graph.file for head in manifest.by_head.values() for graph in head.graphs.values()}
    sizes = {entry.path: entry.bytes for entry in manifest.files} | {
        file: _graph_bytes(manifest, file) for file in files
    }
    if json:
        by_head = {
            name: {graph: sizes[entry.file] for graph, entry in head.graphs.items()}
            for name, head in manifest.by_head.items()
        }
        sizes_by_graph = {"graph_bytes": by_head[manifest.head], "graph_bytes_by_head": by_head, "total_bytes": total}
        console.print_json(manifest.model_dump(mode="json") | sizes_by_graph)
    else:
        print_manifest(console.console(), manifest, sizes, total)


def _graph_bytes(manifest: "Manifest", file: str) -> int:
    """The size of a graph's file and of its external data, which is named after it."""
    return sum(entry.bytes for entry in manifest.files if entry.path == file or entry.path.startswith(f"{file}."))


def print_manifest(to: "Console", manifest: "Manifest", sizes: Mapping[str, int], total: int) -> None:
    """Print a manifest as tables.

    Args:
        sizes: bytes of each graph and its external data, by the graph's file.
        total: bytes of the whole bundle.
    """
    heads = manifest.by_head
    whole = [
        ("written by", ", ".join(f"{key} {value}" for key, value in manifest.tool_versions.items())),
        ("total size", size(total)),
    ]
    if len(heads) == 1:
        to.print(facts_table([("name", manifest.name), *_head_facts(manifest), *whole]))
    else:
        names = f"{', '.join(heads)} (default: {manifest.head})"
        to.print(facts_table([("name", manifest.name), ("heads", names), *whole]))
        to.print()
        to.print(_heads(heads, sizes))
    to.print()
    to.print(_sources(heads))
    _print_graph(to, "encoder", manifest.graphs["encoder"], sizes)
    for name, head in heads.items():
        if len(heads) > 1:
            to.print()
            from rich.text import Text

            to.print(Text(f"Head {name}", style="bold"))
            to.print(facts_table(_head_facts(head)))
        _print_graph(to, "projector", head.graphs["projector"], sizes)
        _print_graph(to, "decoder", head.graphs["decoder"], sizes)
        for key, engines in head.engines.items():
            to.print()
            to.print(_engines(key, engines, sizes))


def _head_facts(manifest: "Manifest") -> list[tuple[str, object]]:
    """The facts of a head, or of a bundle with a single head."""
    tokenizer, parity, state = manifest.tokenizer, manifest.parity, manifest.cache.state
    misses = sum(not row.passed for row in parity.rows)
    positions = manifest.max_total_tokens
    # A value that is the class's default has no effect.
    generation = manifest.generation.model_dump(exclude_defaults=True)
    return [
        ("trained", "yes" if manifest.trained else f"no: {untrained_effect(manifest)}"),
        ("SLM kind", manifest.shape.slm_kind),
        ("fusion", _fusion(manifest)),
        ("prompt template", manifest.prompt_template.replace("\n", "\\n")),
        ("prompt limit", f"{manifest.max_prompt_tokens} tokens"),
        ("SLM's positions", "no known limit" if positions is None else positions),
        ("tokenizer", tokenizer.strategy + (" (byte-level stand-in)" if tokenizer.stand_in else "")),
        ("special ids", _named(manifest.special_ids.model_dump())),
        ("generation", _named(generation)),
        (
            "cache",
            f"{len(state)} tensors" + (f" like {_tensor(state[0].past)}" if state else ""),
        ),
        ("parity", f"{len(parity.rows) - misses} of {len(parity.rows)} comparisons within tolerance"),
    ]


def _fusion(manifest: "Manifest") -> str:
    layer = manifest.llm_layer
    if isinstance(layer, int):
        return manifest.fusion + (f" (LLM layer {layer})" if layer != -1 else "")
    return f"{manifest.fusion} (LLM layers {', '.join(map(str, layer))})"


def _heads(heads: "Mapping[str, Manifest]", sizes: Mapping[str, int]) -> Table:
    rows = (
        (
            name, head.sources["slm"].model, _fusion(head), head.tokenizer.strategy, "yes" if head.trained else "no",
            *(size(sizes[head.graphs[graph].file]) for graph in ("projector", "decoder")),
        )
        for name, head in heads.items()
    )  # fmt: skip
    columns = ("head", "SLM", "fusion", "tokenizer", "trained", "projector", "decoder")
    return Table("Heads", columns, rows, right=(5, 6))


def _print_graph(to: "Console", name: "GraphName", graph: "GraphEntry", sizes: Mapping[str, int]) -> None:
    runtime = ", ".join(f"{key} ≥ {value}" for key, value in graph.minimum_runtime.items())
    blocks = f" in blocks of {graph.block_size}" if graph.block_size else ""
    blocks += ", output layer included" if graph.quantize_lm_head else ""
    title = (
        f"{name}: {graph.file}, {graph.precision}{blocks}, {size(sizes[graph.file])}, opset {graph.opset}, {runtime}"
    )
    if graph.data:
        title += f", weights in {', '.join(graph.data)}"
    rows = [("in", t) for t in graph.inputs] + [("out", t) for t in graph.outputs]
    to.print()
    to.print(Table(title, ("", "tensor", "type", "axes"), ((way, t.name, t.dtype, _axes(t)) for way, t in rows)))


def _engines(key: str, engines: "EngineSet", sizes: Mapping[str, int]) -> Table:
    """A set of engines: its devices, limits and sizes."""
    devices, limits = ", ".join(engines.compute_capabilities) or engines.device, engines.limits
    title = (
        f"engines {key}: {engines.variant} {engines.version} for {devices}, driver ≥ {engines.driver}; up to {limits.batch} "
        f"rows, {limits.prompt} prompt and {limits.new} new tokens, in a cache of {limits.capacity}"
    )
    rows = (
        (name, graph.file, graph.precision, len(graph.profiles), size(sizes[graph.file]))
        for name, graph in engines.graphs.items()
    )
    return Table(title, ("graph", "file", "precision", "profiles", "size"), rows, right=(3, 4))


def _sources(heads: "Mapping[str, Manifest]") -> Table:
    """The models: the LLM, which all heads share, and the SLM of each head."""
    llm = next(iter(heads.values())).sources["llm"]
    slms = ((_writer(name, several=len(heads) > 1), head.sources["slm"]) for name, head in heads.items())
    rows = (
        (
            part,
            source.model,
            source.model_type,
            f"{source.parameters / 1e6:.1f} M",
            source.weights if source.seed is None else f"{source.weights} (seed {source.seed})",
            source.revision or "-",
        )
        for part, source in (("LLM", llm), *slms)
    )
    return Table("Models", ("", "source", "type", "parameters", "weights", "revision"), rows, right=(3,))


def _writer(head: str, *, several: bool) -> str:
    if several:
        return "LLM with its decoder" if head == LLM_HEAD else f"SLM of {head}"
    return "SLM"


def _named(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items())


def _plain(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple | list) else "-" if value is None else str(value)


def _axes(tensor: "TensorSpec") -> str:
    return f"[{', '.join(map(str, tensor.axes))}]"


def _tensor(tensor: "TensorSpec") -> str:
    return f"{tensor.name} {_axes(tensor)}"
