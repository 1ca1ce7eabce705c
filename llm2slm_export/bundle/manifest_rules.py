"""Rules for a manifest's fields beyond their types: bounds, and consistency with each other.

A violation would otherwise surface later, as a wrong tensor shape or as exhausted memory.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm2slm_export import contract
from llm2slm_export.bundle.files import path_problem
from llm2slm_export.bundle.manifest import EngineSet, GraphEntry, Manifest

MOST_HEADS = 256
MOST_ENGINE_SETS = 256
MOST_NAME = 200
MOST_LAYERS = 4_096
MOST_SIZE = 2**24  # rows of a table, or the size of a tensor's axis
MOST_TEMPLATE = 100_000
PLACEHOLDER = "{prompt}"


def manifest_problems(manifest: Manifest) -> list[str]:
    """Problems of a manifest, one line each, beginning with the field's name."""
    listed = {entry.path for entry in manifest.files}
    problems = [*_files(manifest), *_head(manifest, listed)]
    if len(manifest.heads) > MOST_HEADS:
        return [*problems, f"heads: there are {len(manifest.heads)}, at most {MOST_HEADS} are read"]
    for name, head in manifest.heads.items():
        own = [*_of_other_head(name, head, manifest), *_head(head, listed)]
        problems += [f"heads.{name}.{problem}" for problem in own]
    return problems


def text_problems(value: Any) -> list[str]:
    """Strings of a manifest's JSON with control characters, one line each. The prompt template may hold them."""
    return [
        f"{at}: holds the character {next(c for c in text if not _plain(c))!a}"
        for at, text in _texts(value, "")
        if at.rpartition(".")[2] != "prompt_template" and not all(map(_plain, text))
    ]


def _texts(value: Any, at: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{at}.{index}")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield f"{at}.{ascii(name)[1:-1]}" if at else ascii(name)[1:-1], name
            yield from _texts(item, f"{at}.{name}" if at else name)


def _plain(character: str) -> bool:
    """Whether a character is neither a control character nor a bidirectional control."""
    return character.isprintable() or (character.isspace() and character not in "\v\f\r\x1c\x1d\x1e\x1f\x85")


def _files(manifest: Manifest) -> Iterator[str]:
    seen = set()
    for index, entry in enumerate(manifest.files):
        if (problem := path_problem(entry.path)) is not None:
            yield f"files.{index}.path: {entry.path!r} {problem}"
        if entry.path in seen:
            yield f"files.{index}.path: {entry.path!r} is listed twice"
        seen.add(entry.path)
        if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
            yield f"files.{index}.sha256: must be 64 hexadecimal digits"


def _of_other_head(name: str, head: Manifest, first: Manifest) -> Iterator[str]:
    if head.head != name:
        yield f"head: must be {name!r}, got {head.head!r}"
    if name == first.head:
        yield "head: is the name of the first head"
    if head.heads or head.files or head.digest.strip("0"):
        yield "heads, files, digest: are the first head's alone"
    if head.graphs.get("encoder") != first.graphs.get("encoder"):
        yield "graphs.encoder: is not the first head's"


def _head(manifest: Manifest, listed: set[str]) -> Iterator[str]:
    yield from _names(manifest)
    yield from _template(manifest)
    yield from _listed(manifest, listed)
    beyond = list(_sizes(manifest.shape))
    yield from beyond
    # The other rules assume valid sizes.
    if not beyond:
        yield from _relations(manifest)
        yield from _ids(manifest)
        yield from _graphs(manifest)
    yield from _engines(manifest)


def _names(manifest: Manifest) -> Iterator[str]:
    for field, name in (("name", manifest.name), ("head", manifest.head)):
        if not name.strip(". ") or len(name) > MOST_NAME or "/" in name or "\\" in name or not name.isprintable():
            yield f"{field}: must be a name of at most {MOST_NAME} characters without slashes, got {name[:MOST_NAME]!a}"
    if manifest.sources.keys() != {"llm", "slm"}:
        yield f"sources: must be of llm and slm, got {', '.join(manifest.sources) or 'none'}"


def _template(manifest: Manifest) -> Iterator[str]:
    template = manifest.prompt_template
    if template.count(PLACEHOLDER) != 1:
        yield f"prompt_template: must hold {PLACEHOLDER} exactly once, it does {template.count(PLACEHOLDER)} times"
    if len(template) > MOST_TEMPLATE:
        yield f"prompt_template: has {len(template)} characters, at most {MOST_TEMPLATE} are read"


def _sizes(shape: contract.PairShape) -> Iterator[str]:
    for field in (
        "encoder_hidden_size",
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    ):
        most = MOST_LAYERS if field == "num_hidden_layers" else MOST_SIZE
        if not 0 < getattr(shape, field) <= most:
            yield f"shape.{field}: must be from 1 to {most}, got {getattr(shape, field)}"


def _relations(manifest: Manifest) -> Iterator[str]:
    shape = manifest.shape
    if shape.fusion != manifest.fusion:
        yield f"fusion: is {manifest.fusion!r}, and the shape's is {shape.fusion!r}"
    if manifest.tokenizer.slm_size > shape.vocab_size:
        yield f"tokenizer.slm_size: is {manifest.tokenizer.slm_size}, above the vocabulary's {shape.vocab_size}"


def _ids(manifest: Manifest) -> Iterator[str]:
    ids, shape = manifest.special_ids, manifest.shape
    of_vocabulary: dict[str, Sequence[int | None]] = {
        "pad": [ids.pad],
        "eos": ids.eos,
        "decoder_start": [ids.decoder_start],
    }
    for field, own in of_vocabulary.items():
        for token_id in own:
            if token_id is not None and not 0 <= token_id < shape.vocab_size:
                yield f"special_ids.{field}: must be an id below {shape.vocab_size}, got {token_id}"
    if shape.slm_kind == "encoder-decoder" and ids.decoder_start is None:
        yield "special_ids.decoder_start: an encoder-decoder SLM has one"
    num_tokens, generation = manifest.tokenizer.slm_size, manifest.generation
    words = [token_id for word in generation.bad_words_ids for token_id in word]
    named: dict[str, Sequence[int | None]] = {
        "bad_words_ids": words,
        "forced_bos_token_id": [generation.forced_bos_token_id],
        "forced_eos_token_id": [generation.forced_eos_token_id],
    }
    for field, own in named.items():
        beyond = [token_id for token_id in own if token_id is not None and not 0 <= token_id < num_tokens]
        if beyond:
            yield f"generation.{field}: must be ids below {num_tokens}, got {beyond[0]}"


def _listed(manifest: Manifest, listed: set[str]) -> Iterator[str]:
    read = {"tokenizer.llm": manifest.tokenizer.llm, "tokenizer.slm": manifest.tokenizer.slm}
    for name, graph in manifest.graphs.items():
        read[f"graphs.{name}.file"] = graph.file
        read |= {f"graphs.{name}.data.{index}": file for index, file in enumerate(graph.data)}
        # A runtime may detect another format by another extension.
        if not graph.file.endswith(".onnx"):
            yield f"graphs.{name}.file: must end in .onnx, got {graph.file!r}"
    for key, engines in manifest.engines.items():
        read |= {f"engines.{key}.graphs.{name}.file": entry.file for name, entry in engines.graphs.items()}
    for field, file in read.items():
        if (problem := path_problem(file)) is not None:
            yield f"{field}: {file!r} {problem}"
        elif file not in listed:
            yield f"{field}: {file!r} is not listed in `files`"


def _graphs(manifest: Manifest) -> Iterator[str]:
    """Differences between the graphs' inputs, outputs and state and the contract for the manifest's shape."""
    missing = [name for name in contract.GRAPHS if name not in manifest.graphs]
    if missing:
        yield from (f"graphs.{name}: is missing" for name in missing)
        return
    shape, dtype = manifest.shape, contract.cache_type(manifest.graphs["decoder"].precision)
    for name, spec in contract.graph_specs(shape, dtype).items():
        yield from _tensors(f"graphs.{name}", manifest.graphs[name], spec)
    state = contract.state(shape, dtype)
    if len(manifest.cache.state) != len(state):
        yield f"cache.state: must have {len(state)} parts, got {len(manifest.cache.state)}"
    elif manifest.cache.state != state:
        first = next(i for i, own in enumerate(state) if manifest.cache.state[i] != own)
        yield f"cache.state.{first}: is not that of a decoder of the manifest's shape"


def _tensors(at: str, graph: GraphEntry, spec: contract.GraphSpec) -> Iterator[str]:
    sides: Mapping[str, tuple[tuple[contract.TensorSpec, ...], tuple[contract.TensorSpec, ...]]] = {
        "inputs": (graph.inputs, spec.inputs),
        "outputs": (graph.outputs, spec.outputs),
    }
    for side, (got, wanted) in sides.items():
        if len(got) != len(wanted):
            yield f"{at}.{side}: must be {len(wanted)} tensors, got {len(got)}"
            continue
        for index, (own, expected) in enumerate(zip(got, wanted, strict=True)):
            if own != expected:
                yield f"{at}.{side}.{index}: must be {_described(expected)}, got {_described(own)}"


def _described(tensor: contract.TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.axes))}]"


def _engines(manifest: Manifest) -> Iterator[str]:
    if len(manifest.engines) > MOST_ENGINE_SETS:
        yield f"engines: there are {len(manifest.engines)} sets, at most {MOST_ENGINE_SETS} are read"
    for key, engines in manifest.engines.items():
        yield from (f"engines.{key}.{problem}" for problem in _engine_set(engines))


def _engine_set(engines: EngineSet) -> Iterator[str]:
    yield from (f"graphs.{name}: is missing" for name in contract.GRAPHS if name not in engines.graphs)
    for name, entry in engines.graphs.items():
        ranks = {tensor.name: len(tensor.axes) for tensor in entry.inputs}
        for index, profile in enumerate(entry.profiles):
            for tensor, bounds in profile.items():
                sizes = (bounds.minimum, bounds.optimum, bounds.maximum)
                if tensor not in ranks or any(len(own) != ranks[tensor] for own in sizes):
                    yield f"graphs.{name}.profiles.{index}.{tensor}: is not of an input's rank"
