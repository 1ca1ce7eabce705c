"""The arguments of the application on Ray: texts of a command line and values of YAML, and all mistakes at once."""

from pathlib import Path

import pytest
import yaml

from llm2slm_export.errors import UsageError
from llm2slm_export.serving.ray_options import ray_options
from tests.support.paths import REPOSITORY


def test_texts_are_converted() -> None:
    found = ray_options({"bundle": "m=/models/demo", "writer_replicas": "0-3", "max_rows": "4", "log_prompts": "true"})
    assert found.bundles == [("m", Path("/models/demo"))]
    assert (found.writer_replicas, found.max_rows, found.log_prompts) == ("0-3", 4, True)
    assert ray_options({"bundle": ["/a", "b=/c"], "reader_replicas": 2}).reader_replicas == "2"


def test_all_mistakes_are_named() -> None:
    with pytest.raises(UsageError) as error:
        ray_options({"bundel": "x", "max_rows": "many", "reader_replicas": "two", "timeout": 0})
    lines = "\n".join(error.value.evidence)
    assert len(error.value.evidence) == 5
    for words in ("bundle: required", "did you mean 'bundle'", "max_rows", "reader_replicas", "timeout"):
        assert words in lines
    with pytest.raises(UsageError) as error:
        ray_options({"bundle": "models/demo", "reader_replicas": "3-2", "writer_replicas": 0, "api_key_file": "keys"})
    lines = "\n".join(error.value.evidence)
    assert len(error.value.evidence) == 4
    for words in ("bundle: models/demo is a relative path", "'3-2'", "'0'", "api_key_file: keys"):
        assert words in lines


def test_the_examples_arguments_are_right() -> None:
    config = yaml.safe_load((REPOSITORY / "deploy" / "ray-serve.yaml").read_text())
    service = yaml.safe_load((REPOSITORY / "deploy" / "ray-service.yaml").read_text())
    assert service["kind"] == "RayService"
    for found in (config, yaml.safe_load(service["spec"]["serveConfigV2"])):
        (application,) = found["applications"]
        assert application["import_path"] == "llm2slm_export.serving.ray_app:build"
        assert ray_options(application["args"]).bundles[0][0] == "demo"
