"""Tiny models with random weights and awkward sizes, saved as transformers saves them: no network, no fixtures in git."""

import fcntl
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.tiny_models import LLM_CONFIG, SLM_CONFIGS, SaveModel

# Worker processes of pytest-xdist share the cores; torch and ONNX Runtime would each take all of them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that all processes of a test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the traces that tests share; LLM2SLM_TEST_EXPORTS keeps them."""
    kept = os.environ.get("LLM2SLM_TEST_EXPORTS")
    return Path(kept) if kept else shared_directory(tmp_path_factory) / "traces"


@pytest.fixture(scope="session")
def shared_traces(traces: Path) -> Iterator[None]:
    """In this process a graph that was traced before is read from the cache."""
    from llm2slm_export.authoring import build
    from llm2slm_export.authoring.exporters.onnx import export
    from tests.support.export_cache import cached

    # Collections skip what is imported by now: torch and transformers have millions of objects.
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace", cached(export.trace, traces))
        # A build gives memory back after each graph. Tiny graphs have none worth the time.
        patch.setattr(build, "gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's measurements are neither read nor written."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def shared_traces_where_torch_is_loaded(request: pytest.FixtureRequest) -> None:
    """Tests that need no torch do not wait for its import."""
    if "llm2slm_export.authoring.exporters.onnx.export" in sys.modules:
        request.getfixturevalue("shared_traces")


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> SaveModel:
    """save(fields, seed=0) → a directory with a random model of that architecture and a byte-level tokenizer."""

    def save(fields: dict[str, Any], seed: int = 0) -> Path:
        import torch

        from llm2slm_export.authoring.models.byte_tokenizer import byte_tokenizer
        from llm2slm_export.authoring.models.loading import config_from, model_from_config

        directory = tmp_path_factory.mktemp(fields["model_type"])
        torch.manual_seed(seed)
        model_from_config(fields).save_pretrained(directory)  # type: ignore[operator]
        byte_tokenizer(config_from({**SLM_CONFIGS["t5"], "vocab_size": fields["vocab_size"]})).save_pretrained(
            directory
        )
        return directory

    return save


@pytest.fixture(scope="session")
def save_generating_model(save_model: Callable[..., Path]) -> Callable[..., Path]:
    """save(fields) → a random model with something to say: large weights, and a fifth of its ids end a response."""
    import torch
    from safetensors.torch import load_file, save_file

    def save(fields: dict[str, Any]) -> Path:
        directory = save_model(fields)
        weights = load_file(directory / "model.safetensors")
        torch.manual_seed(1)
        for name, weight in weights.items():
            if weight.ndim == 2:
                weights[name] = torch.randn(weight.shape) * 3 / weight.shape[1] ** 0.5
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        path = directory / "generation_config.json"
        options = json.loads(path.read_text()) | {"eos_token_id": [1, *range(5, 307, 5)], "max_length": 20}
        path.write_text(json.dumps(options))
        return directory

    return save


@pytest.fixture(scope="session")
def save_composition(
    save_model: SaveModel, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[..., Path]:
    """save(slm_type, fusion="add", seed=0) → a composition whose projector is not zero, as after training.

    `llm_config`, `fields`: other configurations than LLM_CONFIG and SLM_CONFIGS[slm_type]. `llm`: the directory of an LLM to read with,
    in place of one of its own.
    """

    request.getfixturevalue("shared_traces")

    def save(
        slm_type: str,
        fusion: str = "add",
        seed: int = 0,
        *,
        llm_config: dict[str, Any] = LLM_CONFIG,
        fields: dict[str, Any] | None = None,
        llm: Path | None = None,
    ) -> Path:
        import torch

        from llm2slm_export.authoring.composition import ProjectorEntry
        from llm2slm_export.authoring.models.projector import Projector, save_projector

        directory = tmp_path_factory.mktemp(f"{slm_type}-{fusion}")
        slm = fields or SLM_CONFIGS[slm_type]
        width = slm.get("d_model") or slm.get("hidden_size") or slm["n_embd"]
        torch.manual_seed(seed)
        entry = ProjectorEntry(d_in=llm_config["d_model"], d_hidden=24, d_out=width)
        projector = Projector(entry)
        torch.nn.init.normal_(projector.fc_out.weight, std=0.5)
        save_projector(projector, directory, torch.float32)
        if llm is None:
            save_model(llm_config, seed).rename(directory / "llm")
        save_model(slm, seed + 1).rename(directory / "slm")
        file = {
            "format": "llm2slm-composition", "version": 1, "name": f"tiny-{slm_type}",
            "llm": {"model": "llm" if llm is None else os.path.relpath(llm, directory)}, "slm": {"model": "slm"},
            "projector": entry.model_dump(exclude_defaults=True),
            "fusion": fusion, "tokenizer": "shared", "prompt_template": "{prompt}",
            "max_prompt_tokens": 200, "max_new_tokens": 20,
        }  # fmt: skip
        (directory / "composition.json").write_text(json.dumps(file))
        return directory

    return save


@pytest.fixture(scope="session")
def bundles(
    save_composition: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """bundles(slm_type, fusion="add", precision="fp32") → (composition, bundle), built once for all of a run's processes.

    LLM2SLM_TEST_BUNDLES keeps them for another run of the same tree.
    """
    kept = os.environ.get("LLM2SLM_TEST_BUNDLES")
    shared = Path(kept) if kept else shared_directory(tmp_path_factory) / "bundles"

    def bundle(slm_type: str, fusion: str = "add", precision: str = "fp32") -> tuple[Path, Path]:
        directory = shared / f"{slm_type}-{fusion}-{precision}"
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / "composition").is_dir():
                from llm2slm_export.authoring.build import build
                from llm2slm_export.authoring.build_options import BuildOptions
                from llm2slm_export.authoring.models.pairing import load_composition
                from llm2slm_export.contract import GRAPHS

                made = save_composition(slm_type, fusion)
                options = BuildOptions(dict.fromkeys(GRAPHS, precision))
                build(load_composition(made), directory / "bundle", options)
                shutil.move(made, directory / "composition")
        return directory / "composition", directory / "bundle"

    return bundle


@pytest.fixture(scope="session")
def llm_head_bundle(
    save_generating_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, Path, Path]:
    """An LLM that has something to say; a composition with it, whose SLM is the LLM's decoder with noise, so that some of its
    drafts are right; and their bundle with the LLM head. Built once for all of a run's processes."""
    request.getfixturevalue("shared_traces")
    directory = shared_directory(tmp_path_factory) / "llm-head"
    directory.mkdir(exist_ok=True)
    llm, composition, bundle = (directory / name for name in ("llm", "composition", "bundle"))
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not bundle.is_dir():
            import torch
            from safetensors.torch import load_file, save_file

            from llm2slm_export.authoring.build import build_heads
            from llm2slm_export.authoring.pair_sources import BuildChoice, pair_source

            shutil.move(save_generating_model(LLM_CONFIG), llm)
            shutil.copytree(llm, composition / "slm")
            weights = load_file(llm / "model.safetensors")
            torch.manual_seed(2)
            for name, weight in weights.items():
                if weight.ndim == 2 and name.startswith("decoder."):
                    weights[name] = weight + 0.12 * weight.std() * torch.randn(weight.shape)
            save_file(weights, composition / "slm" / "model.safetensors", metadata={"format": "pt"})
            width = LLM_CONFIG["d_model"]
            file = {
                "format": "llm2slm-composition", "version": 1, "name": "drafting",
                "llm": {"model": "../llm"}, "slm": {"model": "slm"},
                "projector": {"kind": "identity", "d_in": width, "d_out": width}, "fusion": "cross_attention",
                "tokenizer": "shared", "prompt_template": "{prompt}", "max_prompt_tokens": 200, "max_new_tokens": 20,
            }  # fmt: skip
            (composition / "composition.json").write_text(json.dumps(file))
            save_file({}, composition / "projector.safetensors", metadata={"format": "pt"})
            source = pair_source(BuildChoice(composition=composition, llm_head=True))
            build_heads(source.heads, bundle, inputs=source.inputs)
    return llm, composition, bundle


@pytest.fixture(scope="session")
def cpp_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build directory of the C++ library and its test programs; LLM2SLM_CPP_BUILD names one to keep."""
    from tests.support.cpp_library import build

    kept = os.environ.get("LLM2SLM_CPP_BUILD")
    return build(Path(kept) if kept else shared_directory(tmp_path_factory) / "cpp-build", "-DCMAKE_BUILD_TYPE=Release")
