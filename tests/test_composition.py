"""Compositions on disk that do not fit, and models that cannot be had."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llm2slm_export.composition import read_composition
from llm2slm_export.errors import CompositionError
from llm2slm_export.models.catalog import CATALOG, architecture
from llm2slm_export.models.loading import compose_untrained, config_from, load_composition, load_config
from llm2slm_export.recipe import ModelSource


def edit(directory: Path, **fields: object) -> None:
    path = directory / "composition.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_projector_of_another_shape_is_refused(save_composition: Callable[..., Path]) -> None:
    directory = save_composition("t5", seed=3)
    save_file({"fc_in.weight": torch.zeros(24, 47), "fc_in.bias": torch.zeros(24)}, directory / "projector.safetensors")
    with pytest.raises(CompositionError) as caught:
        load_composition(directory)
    assert "fc_in.weight: expected (24, 48), got (24, 47)" in str(caught.value)
    assert "fc_out.weight: expected (32, 24), got nothing" in str(caught.value)


def test_a_projector_that_fits_neither_model_names_both(save_composition: Callable[..., Path]) -> None:
    from llm2slm_export.models.projector import Projector, save_projector

    directory = save_composition("t5", seed=4)
    save_projector(Projector(40, 24, 33), directory, torch.float32)
    edit(directory, projector={"kind": "mlp", "d_in": 40, "d_hidden": 24, "d_out": 33, "activation": "relu"})
    with pytest.raises(CompositionError) as caught:
        load_composition(directory)
    assert "d_in is 40, the LLM's width is 48" in str(caught.value)
    assert "d_out is 33, the SLM's width is 32" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"version": 9}, "version 9"),
        ({"fusion": "multiply"}, "fusion"),
        ({"fuson": "add"}, "fuson"),
    ],
)
def test_a_composition_file_that_cannot_be_read_is_named(
    save_composition: Callable[..., Path], tmp_path: Path, fields: dict[str, object], said: str
) -> None:
    source = save_composition("t5", seed=5) / "composition.json"
    (tmp_path / "composition.json").write_text(source.read_text())
    edit(tmp_path, **fields)
    with pytest.raises(CompositionError, match=said):
        read_composition(tmp_path)


def test_a_directory_without_a_composition_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match=r"composition\.json"):
        read_composition(tmp_path)


def test_a_model_that_does_not_exist_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("nobody/no-such-model is not a local folder and is not a valid model identifier")

    monkeypatch.setattr("llm2slm_export.models.loading.AutoConfig.from_pretrained", refused)
    with pytest.raises(CompositionError) as caught:
        load_config("nobody/no-such-model")
    assert "nobody/no-such-model" in str(caught.value)
    assert "→" in str(caught.value)


def test_unsupported_types_are_refused_both_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CompositionError) as caught:
        compose_untrained(
            ModelSource(model=str(tmp_path / "a")), ModelSource(model=str(tmp_path / "b")), random_weights=True
        )
    assert str(caught.value).count("'bert'") == 2


@pytest.mark.parametrize("alias", list(CATALOG))
def test_every_alias_has_an_architecture_transformers_knows(alias: str) -> None:
    known = architecture(alias)
    assert known is not None
    assert known == architecture(CATALOG[alias][0])
    config_from(known)
