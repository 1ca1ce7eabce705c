"""Training on several processes: what one process would have reached with the same rows in a step."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llm2slm_export.authoring.models.pairing import load_composition
from llm2slm_export.authoring.training.checkpoints import last_checkpoint
from llm2slm_export.authoring.training.train import train
from tests.support.paths import REPOSITORY
from tests.support.tiny_models import SLM_CONFIGS
from tests.support.tiny_recipe import changed, tiny_recipe

BART = {
    "model_type": "bart", "vocab_size": 307, "d_model": 36, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
    "max_position_embeddings": 600, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip


def launch(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `train` on two CPU processes, as torchrun starts them."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llm2slm_export", "train"]
    return subprocess.run(
        [sys.executable, *run, str(recipe), *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def logged(work: Path, name: str) -> list[float]:
    """The values a run logged under a name."""
    checkpoint = last_checkpoint(work)
    assert checkpoint is not None
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


@pytest.mark.parametrize(
    ("fusion", "training"),
    [
        pytest.param("add", {"teacher": {"rows": "both"}, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param("replace", {}, marks=pytest.mark.nightly),
        pytest.param("cross_attention", {}, marks=pytest.mark.nightly),
        pytest.param("add", {"slm": "lora"}, marks=pytest.mark.nightly),
        pytest.param("prefix", {"cache_hidden_states": False}, marks=pytest.mark.nightly),
    ],
)
def test_two_processes_train_as_one_does(
    save_generating_model: Callable[..., Path], tmp_path: Path, fusion: str, training: dict[str, Any]
) -> None:
    """Every step's rows are the same, so every training and validation loss is, but for the order of sums.

    Without dropout, which the two processes draw apart from each other. 96 rows and 16 validation rows fill their
    batches, so that no row is repeated to fill the last one.
    """
    still = {**SLM_CONFIGS["t5"], "dropout_rate": 0.0}
    recipe = changed(
        tiny_recipe(tmp_path, save_generating_model, batch_size=16, evaluations_per_epoch=6, **training),
        fusion=fusion, slm={"config": still},
    )  # fmt: skip
    if "teacher" in training:
        # Every prompt gets a usable response, neither endless nor of white space alone: 192 rows fill their batches.
        path = Path(str(recipe.llm.model)) / "generation_config.json"
        ends = {"eos_token_id": [1, *range(5, 307, 2)], "min_new_tokens": 8, "repetition_penalty": 3.0}
        path.write_text(json.dumps(json.loads(path.read_text()) | ends))
    torch.manual_seed(0)
    one = train(recipe, tmp_path / "one" / "out")
    record = json.loads((tmp_path / "one" / "out" / "training.json").read_text())
    assert record["rows"]["train"] == (192 if "teacher" in training else 96)
    halved = changed(recipe, training={"batch_size": 8})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(halved.model_dump(mode="json")))
    done = launch(tmp_path / "recipe.yaml", "--out", str(tmp_path / "two" / "out"), "--json")
    assert done.returncode == 0, done.stderr[-4000:]

    (printed,) = done.stdout.strip().splitlines()
    assert json.loads(printed)["metrics"]["eval_loss"] == pytest.approx(one.metrics["eval_loss"], rel=1e-3)
    assert done.stderr.count("Next: llm2slm-export") == 1, "one of the processes speaks"
    assert done.stderr.count("teacher:") == ("teacher" in training)
    assert "find_unused_parameters" not in done.stderr
    for asked in (tmp_path / "two" / "cache").glob("teacher/*.jsonl"):
        assert len(asked.read_text().splitlines()) == 96, "the main process asks, the others wait"
    for name in ("loss", "eval_loss"):
        alone, together = (logged(tmp_path / run / "out.work", name) for run in ("one", "two"))
        assert len(alone) >= 6
        assert together[0] == pytest.approx(alone[0], rel=1e-5)
        assert together == pytest.approx(alone, rel=1e-3)
    records = [json.loads((tmp_path / run / "out" / "training.json").read_text()) for run in ("one", "two")]
    assert [record["hardware"]["processes"] for record in records] == [1, 2]
    for same in ("rows", "parameters", "teacher", "prompts"):
        assert records[0][same] == records[1][same]
    assert records[0]["metrics"]["steps"] == records[1]["metrics"]["steps"]
    pair = load_composition(tmp_path / "two" / "out")
    assert pair.trained
    weights = [load_file(tmp_path / run / "out" / "projector.safetensors") for run in ("one", "two")]
    torch.testing.assert_close(weights[1], weights[0], atol=2e-3, rtol=1e-2)


@pytest.mark.nightly
def test_two_processes_go_on_where_they_were(save_model: Callable[..., Path], tmp_path: Path) -> None:
    """With dropout: what each process draws is in the checkpoint, and neither decides the order of the rows."""
    recipe = tiny_recipe(tmp_path, save_model, batch_size=8, epochs=3)
    halted = changed(recipe, training={"epochs": 2, "lr_scheduler": "constant"})
    whole = changed(recipe, training={"lr_scheduler": "constant"})
    for name, fields in (("whole", whole), ("halted", halted)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(fields.model_dump(mode="json")))
    assert launch(tmp_path / "whole.yaml", "--out", str(tmp_path / "whole")).returncode == 0
    assert launch(tmp_path / "halted.yaml", "--out", str(tmp_path / "halted")).returncode == 0
    done = launch(
        tmp_path / "whole.yaml", "--out", str(tmp_path / "resumed"), "--work", str(tmp_path / "halted.work"), "--resume"
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for file in ("projector.safetensors", "slm/model.safetensors"):
        torch.testing.assert_close(load_file(tmp_path / "resumed" / file), load_file(tmp_path / "whole" / file))


@pytest.mark.nightly
def test_layers_dropped_at_random_do_not_hold_the_processes_up(save_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, save_model, batch_size=8, epochs=1)
    recipe = changed(recipe, slm={"config": {**BART, "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    done = launch(tmp_path / "recipe.yaml", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.nightly
def test_a_refusal_of_one_process_ends_both(save_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, save_model, teacher={})
    fields = changed(recipe, training={"max_response_tokens": 2}).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    done = launch(tmp_path / "recipe.yaml", "--out", str(tmp_path / "out"))
    assert done.returncode != 0
    assert "no usable response" in done.stderr
    assert not (tmp_path / "out").exists()
