"""Whether a bundle's engines fit a device, checked before any engine is loaded. All mismatches are reported.

Of several sets that fit, the one compiled for the fewest compute capabilities is used, because it may use their special
features. Ties are resolved by the smallest files (their weights are read fastest), then by the most rows, by the most prompt
tokens, and by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm2slm_export.bundle.bundle import Bundle
from llm2slm_export.bundle.files import graph_digest
from llm2slm_export.bundle.manifest import EngineSet, Manifest
from llm2slm_export.contract import GraphName, TensorRtVariant
from llm2slm_export.environment.tensorrt_modules import TENSORRT_VARIANTS
from llm2slm_export.environment.versions import at_least
from llm2slm_export.errors import DeviceError
from llm2slm_export.inference.runtime.tensorrt.device_protocol import DeviceFacts
from llm2slm_export.inference.runtime.tensorrt.library import FoundLibrary


@dataclass(frozen=True)
class Mismatch:
    """A reason why a set of engines does not fit: the manifest's field, the required value and the one found."""

    field: str
    needed: str
    found: str

    def __str__(self) -> str:
        return f"{self.field}: needs {self.needed}, found {self.found}"


@dataclass(frozen=True)
class EngineCandidate:
    """A set of engines, and its mismatches with the device. `key` is its name in the manifest."""

    key: str
    engines: EngineSet
    mismatches: tuple[Mismatch, ...]

    @property
    def fits(self) -> bool:
        return not self.mismatches

    def __str__(self) -> str:
        e, limits = self.engines, self.engines.limits
        devices = "SM " + ", ".join(e.compute_capabilities) if e.compute_capabilities else str(e.device)
        precisions = ", ".join(f"{name} {entry.precision}" for name, entry in e.graphs.items())
        return (
            f"{self.key}: {e.variant} {e.version} for {devices}; {precisions}; up to {limits.batch} rows, {limits.prompt} "
            f"prompt tokens, {limits.new} new tokens"
        )


def check_engines(
    bundle: Bundle,
    *,
    libraries: Mapping[TensorRtVariant, FoundLibrary],
    device: DeviceFacts | None,
    graphs: Sequence[GraphName],
) -> list[EngineCandidate]:
    """Compare all sets of engines of a bundle's head with a device and the installed libraries.

    Args:
        device: None: the machine has no GPU.
        graphs: the graphs to run.
    """
    return [
        EngineCandidate(key, engines, tuple(_mismatches(bundle, engines, libraries, device, graphs)))
        for key, engines in bundle.manifest.engines.items()
    ]


def choose_engines(
    bundle: Bundle,
    *,
    libraries: Mapping[TensorRtVariant, FoundLibrary],
    device: DeviceFacts,
    graphs: Sequence[GraphName],
) -> EngineCandidate:
    """The set of engines to use on a device, by the module's rule.

    Raises:
        DeviceError: none fits, with the mismatches of every set.
    """
    checked = check_engines(bundle, libraries=libraries, device=device, graphs=graphs)
    if fitting := preferred(checked, bundle.manifest):
        return fitting
    name = f"tensorrt:{device.index}"
    here = f"{device.name}, SM {device.compute_capability}, driver {device.driver or 'unknown'}, {_versions(libraries)}"
    if not checked:
        raise DeviceError(
            f"The bundle {bundle.directory} has no TensorRT engines for the device {name!r}.",
            f"this device: {here}",
            remedy=rebuild(bundle, _variant(libraries)) + "; or use device 'cuda'",
        )
    lines = [f"this device: {here}"]
    for entry in checked:
        lines += [str(entry), *(f"  {mismatch}" for mismatch in entry.mismatches)]
    raise DeviceError(
        f"None of the engines in {bundle.directory} is for the device {name!r}.", *lines,
        remedy=rebuild(bundle, _variant(libraries)) + "; or use device 'cuda'",
    )  # fmt: skip


def preferred(checked: Sequence[EngineCandidate], manifest: Manifest) -> EngineCandidate | None:
    """The set to use among those that fit; None if none fits."""
    sizes = {entry.path: entry.bytes for entry in manifest.files}

    def order(entry: EngineCandidate) -> tuple[int, int, int, int, str]:
        e = entry.engines
        files = sum(sizes.get(graph.file, 0) for graph in e.graphs.values())
        return len(e.compute_capabilities), files, -e.limits.batch, -e.limits.prompt, entry.key

    return min((entry for entry in checked if entry.fits), key=order, default=None)


def rebuild(bundle: Bundle, variant: TensorRtVariant, *, options: str = "") -> str:
    """The command that builds engines for this device, with further options."""
    return f"build them on it: llm2slm-export build … --out {bundle.directory} --force --backend {variant}{options}"


def _mismatches(
    bundle: Bundle,
    engines: EngineSet,
    libraries: Mapping[TensorRtVariant, FoundLibrary],
    device: DeviceFacts | None,
    graphs: Sequence[GraphName],
) -> list[Mismatch]:
    found = [*_of_library(engines, libraries), *_of_device(engines, device)]
    missing = [name for name in graphs if name not in engines.graphs]
    if missing:
        found.append(Mismatch("graphs", ", ".join(missing), ", ".join(engines.graphs) or "none"))
    for name in (name for name in graphs if name in engines.graphs):
        found += _of_files(bundle, engines, name)
    return found


def _of_library(engines: EngineSet, libraries: Mapping[TensorRtVariant, FoundLibrary]) -> list[Mismatch]:
    library = libraries[engines.variant]
    if library.version is None:
        return [Mismatch("variant", f"{engines.variant} {engines.version} ({library.pip})", str(library.problem))]
    # Only the release that built an engine loads it, because the engines are not built version-compatible.
    if library.version != engines.version:
        return [Mismatch("version", f"{engines.variant} {engines.version}", f"{engines.variant} {library.version}")]
    return []


def _of_device(engines: EngineSet, device: DeviceFacts | None) -> list[Mismatch]:
    if device is None:
        return [Mismatch("device", "an NVIDIA GPU", "none")]
    found = []
    if engines.compute_capabilities:
        if device.compute_capability not in engines.compute_capabilities:
            of_set, here = ", ".join(engines.compute_capabilities), f"{device.compute_capability} ({device.name})"
            found.append(Mismatch("compute_capabilities", of_set, here))
    elif device.name != engines.device:
        found.append(Mismatch("device", repr(engines.device), repr(device.name)))
    if device.driver is None or not at_least(device.driver, engines.driver):
        found.append(Mismatch("driver", f"{engines.driver} or newer", device.driver or "an unknown version"))
    return found


def _of_files(bundle: Bundle, engines: EngineSet, name: GraphName) -> list[Mismatch]:
    """Mismatches of an engine's file size, source graph, profiles and cache capacity with the manifest."""
    manifest, entry = bundle.manifest, engines.graphs[name]
    hashes = {file.path: file for file in manifest.files}
    found = []
    graph = manifest.graphs[name]
    digest = graph_digest(graph, {path: file.sha256 for path, file in hashes.items()})
    if entry.source != digest:
        found.append(Mismatch(f"graphs.{name}.source", f"{graph.file} {entry.source[:16]}…", f"{digest[:16]}…"))
    listed, path = hashes.get(entry.file), bundle.path(entry.file)
    # `open_bundle` has already compared the file's hash.
    size = path.stat().st_size if path.is_file() else None
    if listed is None or size != listed.bytes:
        expected = f"{entry.file} of {listed.bytes} bytes" if listed else f"{entry.file} among the manifest's files"
        found.append(Mismatch(f"graphs.{name}.file", expected, "no such file" if size is None else f"{size} bytes"))
    found += [
        Mismatch(f"graphs.{name}.profiles", f"{axis} up to {limit}", f"up to {covered}")
        for axis, limit, covered in _uncovered(manifest, engines, name)
    ]
    pasts = {part.past.name: part.growing_axis for part in manifest.cache.state}
    for capacity in {tensor.axes[pasts[tensor.name]] for tensor in entry.inputs if tensor.name in pasts}:
        if capacity != engines.limits.capacity:
            found.append(
                Mismatch(f"graphs.{name}.inputs", f"capacity {engines.limits.capacity}", f"capacity {capacity}")
            )
    return found


def _uncovered(manifest: Manifest, engines: EngineSet, name: GraphName) -> list[tuple[str, int, int]]:
    """Axes whose limit exceeds the engine's profiles: name, limit, maximum of the profiles."""
    limits, context = engines.limits, engines.limits.prompt * manifest.shape.context_per_token
    promised = {"batch": limits.batch, "prompt": limits.prompt, "context": context, "embeds_length": context}
    covered: dict[str, int] = {}
    entry = engines.graphs[name]
    for tensor in entry.inputs:
        for place, axis in enumerate(tensor.axes):
            if isinstance(axis, str) and axis in promised:
                most = max((p[tensor.name].maximum[place] for p in entry.profiles if tensor.name in p), default=0)
                covered[axis] = min(covered.get(axis, most), most)
    return [(axis, promised[axis], most) for axis, most in covered.items() if most < promised[axis]]


def _versions(libraries: Mapping[TensorRtVariant, FoundLibrary]) -> str:
    return ", ".join(f"{variant} {libraries[variant].version or 'not installed'}" for variant in libraries)


def _variant(libraries: Mapping[TensorRtVariant, FoundLibrary]) -> TensorRtVariant:
    return next((variant for variant in TENSORRT_VARIANTS if libraries[variant].version is not None), "tensorrt")
