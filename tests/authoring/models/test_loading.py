"""Checkpoints that cannot be read, or not as what they are: refused by name, and never by a library's own exception."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2slm_export.authoring.build import build
from llm2slm_export.authoring.models.architectures import ROPE_TYPES, check_types
from llm2slm_export.authoring.models.generation_config import own_options, require_exportable
from llm2slm_export.authoring.models.loading import config_from, load_config, load_full, load_llm, load_tokenizer
from llm2slm_export.authoring.models.pairing import compose_untrained
from llm2slm_export.authoring.recipe import ModelSource
from llm2slm_export.errors import CompositionError, Llm2SlmError
from tests.support.tiny_models import LLM_CONFIG, SLM_CONFIGS

SaveModel = Callable[..., Path]
MARIAN = {
    "model_type": "marian", "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "max_position_embeddings": 32, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture
def t5(save_model: SaveModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(save_model(SLM_CONFIGS["t5"]), tmp_path / "t5"))


@pytest.fixture
def llama(save_model: SaveModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(save_model(SLM_CONFIGS["llama"]), tmp_path / "llama"))


def _edit(directory: Path, file: str = "config.json", **fields: Any) -> Path:
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def _with_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao"])
def test_a_quantised_checkpoint_is_refused_by_its_method(llama: Path, method: str) -> None:
    _edit(llama, quantization_config={"quant_method": method})
    for load in (load_config, load_llm, load_full):
        with pytest.raises(CompositionError, match=rf"quantized \({method}\)(.|\n)*unquantized checkpoint"):
            load(str(llama))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(t5: Path, file: str) -> None:
    (t5 / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 308000000\n")
    with pytest.raises(CompositionError, match=rf"Git LFS pointers(.|\n)*{file}(.|\n)*lfs pull"):
        load_full(str(t5))


def test_a_table_of_another_size_than_the_configuration_is_named_with_both(t5: Path) -> None:
    _edit(t5, vocab_size=384)
    with pytest.raises(
        CompositionError, match=r"shared\.weight: shape \[307, 32\] in the checkpoint, \[384, 32\] by config"
    ):
        load_full(str(t5))


def test_a_tensor_that_nothing_reads_is_refused_by_name(t5: Path, llama: Path) -> None:
    _edit(t5, num_layers=1)
    with pytest.raises(CompositionError, match=r"encoder\.block\.1\.\S+: in the checkpoint, not used"):
        load_full(str(t5))
    with pytest.raises(CompositionError, match=r"encoder\.block\.1\."):
        load_llm(str(t5))
    _edit(llama, num_hidden_layers=1)
    with pytest.raises(CompositionError, match=r"model\.layers\.1\."):
        load_llm(str(llama))


def test_heads_decoders_and_computed_tables_are_no_unread_tensors(t5: Path, llama: Path) -> None:
    def leftovers(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)

    load_llm(str(t5))  # without the decoder and the head
    load_llm(str(llama))
    load_full(str(_with_tensors(llama, leftovers)))


def test_a_table_that_the_class_computes_is_not_missing(save_model: SaveModel, tmp_path: Path) -> None:
    marian = Path(shutil.copytree(save_model(MARIAN), tmp_path / "marian"))

    def strip(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if "embed_positions" in name]:
            del weights[name]

    whole = load_llm(str(marian)).state_dict()
    stripped = load_llm(str(_with_tensors(marian, strip))).state_dict()
    assert all(torch.equal(whole[name], stripped[name]) for name in whole)
    assert any("embed_positions" in name for name in whole)


def test_code_of_a_models_own_is_neither_run_nor_asked_about(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _edit(llama, model_type="my_llama", auto_map={"AutoConfig": "configuration_my.MyConfig"})
    mark = llama / "ran"
    (llama / "configuration_my.py").write_text(f"open({str(mark)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(CompositionError, match="custom code, which is never run"):
        load_config(str(llama))
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_positions_that_depend_on_the_call_are_refused(kind: str) -> None:
    extra = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3} if kind == "longrope" else {"factor": 2.0}
    scaled = config_from(SLM_CONFIGS["llama"] | {"rope_scaling": {"rope_type": kind, "rope_theta": 10000.0, **extra}})
    plain = config_from(SLM_CONFIGS["llama"])
    with pytest.raises(CompositionError, match=rf"SLM: rope_scaling of type '{kind}'") as caught:
        check_types(plain, scaled)
    assert ", ".join(sorted(ROPE_TYPES)) in str(caught.value)
    with pytest.raises(CompositionError, match=rf"LLM: rope_scaling of type '{kind}'"):
        check_types(scaled, plain)


def test_a_configuration_is_refused_by_key_and_value() -> None:
    with pytest.raises(CompositionError, match=r"no model type 't6'(.|\n)*did you mean 't5'"):
        config_from({"model_type": "t6"})
    with pytest.raises(CompositionError, match=r"d_kv: 0; expected at least 1(.|\n)*num_layers: -1"):
        config_from({"model_type": "t5", "d_kv": 0, "num_layers": -1})


@pytest.mark.parametrize("text", ['{"num_beams": 4, "no_re', "[]", "[" * 100_000, ""])
def test_a_generation_config_that_cannot_be_read_is_an_error(t5: Path, text: str) -> None:
    (t5 / "generation_config.json").write_text(text)
    with pytest.raises(CompositionError, match=r"generation_config\.json of .* cannot be read"):
        load_full(str(t5))


def test_generation_options_are_exported_without_effect_or_refused(t5: Path) -> None:
    _edit(t5, "generation_config.json", num_beams=4, return_dict_in_generate=True, cache_implementation="static")
    slm = load_full(str(t5))
    require_exportable(slm)
    own = own_options(slm)
    assert own.num_beams == 4
    assert not own.return_dict_in_generate
    assert own.cache_implementation is None

    _edit(t5, "generation_config.json", stop_strings=["."], token_healing=True, num_beam_groups=1, guidance_scale=2.0)
    with pytest.raises(CompositionError) as caught:
        require_exportable(load_full(str(t5)))
    assert sorted(line.split(":")[0] for line in caught.value.evidence) == [
        "guidance_scale", "stop_strings", "token_healing",
    ]  # fmt: skip


def test_an_option_that_a_later_transformers_adds_is_refused(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GenerationConfig

    known = GenerationConfig.to_dict
    slm: Any = load_full(str(t5))
    slm.generation_config.novel_penalty = 2.0
    monkeypatch.setattr(GenerationConfig, "to_dict", lambda self: known(self) | {"novel_penalty": None})
    with pytest.raises(CompositionError, match=r"novel_penalty: 2\.0"):
        require_exportable(slm)


def test_a_sentencepiece_tokenizer_without_its_library_says_what_to_install(
    t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (t5 / "tokenizer.json").unlink()
    (t5 / "spiece.model").write_bytes(b"\n\x09\n\x05<unk>")
    monkeypatch.setattr("llm2slm_export.authoring.models.loading._installed", lambda module: module != "sentencepiece")
    with pytest.raises(CompositionError, match=r"spiece\.model(.|\n)*llm2slm-export\[sentencepiece\]"):
        load_tokenizer(str(t5))


def test_a_tokenizer_that_nothing_converts_is_refused_without_an_extra_to_install(t5: Path) -> None:
    (t5 / "tokenizer.json").unlink()
    for name in ("source.spm", "target.spm"):
        (t5 / name).write_bytes(b"\n\x09\n\x05<unk>")
    with pytest.raises(
        CompositionError, match=r"source\.spm, target\.spm: Marian's form(.|\n)*give a tokenizer\.json"
    ) as caught:
        load_tokenizer(str(t5))
    assert "pip install" not in str(caught.value)


ROPE_SCALINGS = {
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ROPE_SCALINGS)
def test_every_other_kind_of_rotary_positions_passes_the_parity_gate(
    save_model: SaveModel, tmp_path: Path, kind: str
) -> None:
    scaling = {"rope_type": kind, "rope_theta": 10000.0, **ROPE_SCALINGS[kind]}
    llama = save_model(SLM_CONFIGS["llama"] | {"max_position_embeddings": 600, "rope_scaling": scaling})
    source = ModelSource(model=str(llama))
    manifest = build(compose_untrained(source, source), tmp_path / "bundle")
    assert manifest.parity.passed
    assert ROPE_SCALINGS.keys() | {"default"} == ROPE_TYPES


def test_a_sentencepiece_tokenizer_is_converted(save_model: SaveModel, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece, of the [sentencepiece] extra")
    corpus = tmp_path / "corpus.txt"
    words = ["reading", "writing", "large", "small", "model", "prompt", "once", "token"]
    corpus.write_text("\n".join(" ".join(random.Random(i).choices(words, k=6)) for i in range(200)))
    directory = Path(shutil.copytree(save_model(LLM_CONFIG), tmp_path / "spm"))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "spiece"), vocab_size=28, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    for path in directory.glob("tokenizer*"):
        path.unlink()
    shutil.copy(tmp_path / "spiece.model", directory / "spiece.model")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    tokenizer = load_tokenizer(str(directory))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    for text in ("a large model reading", "the small token", "once"):
        assert tokenizer(text).input_ids == [*processor.encode(text), 1]


@pytest.mark.parametrize("length", ["512", [512], {}, float("nan")])
def test_a_tokenizers_longest_input_that_is_no_number_is_refused(t5: Path, length: object) -> None:
    path = t5 / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    with pytest.raises(CompositionError, match=r"The tokenizer of .* is invalid") as caught:
        load_tokenizer(str(t5))
    assert caught.value.evidence == (f"tokenizer_config.json: model_max_length is {length!r}, expected a number",)


@pytest.mark.slow
def test_whatever_a_mutated_checkpoint_raises_is_an_error_of_ours(t5: Path) -> None:
    files = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"]
    kept = {name: (t5 / name).read_bytes() for name in files}
    odd: list[Any] = [None, -1, 0, 1e308, "x", [], {}, True, 2**70, "../../etc", [[[]]]]
    draw, refused = random.Random(0), 0
    for number in range(200):
        name = files[number % len(files)]
        data = kept[name]
        if name.endswith("config.json") and number % 2:
            fields = json.loads(data)
            fields[draw.choice([*fields, "quantization_config", "rope_scaling", "auto_map"])] = draw.choice(odd)
            (t5 / name).write_text(json.dumps(fields))
        else:
            at = draw.randrange(min(len(data), 2000))
            cut = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
            (t5 / name).write_bytes(data[:at] if number % 3 == 0 else cut)
        try:
            load_tokenizer(str(t5))
            load_full(str(t5))
        except Llm2SlmError:
            refused += 1
        (t5 / name).write_bytes(data)
    assert refused > 50
