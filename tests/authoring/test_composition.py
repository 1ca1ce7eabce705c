"""Compositions on disk that do not fit, and models that cannot be had."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from llm2slm_export.authoring.composition import ProjectorEntry, read_composition
from llm2slm_export.authoring.models.aliases import CATALOG, architecture
from llm2slm_export.authoring.models.byte_tokenizer import byte_tokenizer
from llm2slm_export.authoring.models.chat_template import prompt_template, resolve_template, tokenized
from llm2slm_export.authoring.models.compatibility import PROBES, require_special_tokens
from llm2slm_export.authoring.models.loading import config_from, load_config, load_tokenizer, model_from_config
from llm2slm_export.authoring.models.pairing import PairConfig, compose_untrained, load_composition
from llm2slm_export.authoring.models.projector import Projector, save_projector
from llm2slm_export.authoring.recipe import ModelSource, ProjectorSettings
from llm2slm_export.bundle.prompt_template import PromptTemplate
from llm2slm_export.errors import CompositionError
from tests.families.models import CONFIGS
from tests.support.tiny_models import LLM_CONFIG, SLM_CONFIGS


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
    directory = save_composition("t5", seed=4)
    save_projector(Projector(ProjectorEntry(d_in=40, d_hidden=24, d_out=33)), directory, torch.float32)
    edit(directory, projector={"kind": "mlp", "d_in": 40, "d_hidden": 24, "d_out": 33, "activation": "relu"})
    with pytest.raises(CompositionError) as caught:
        load_composition(directory)
    assert "d_in is 40, the LLM's hidden size is 48" in str(caught.value)
    assert "d_out is 33, the SLM's hidden size is 32" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 9}, "version 9"),
        ({"version": 1.0}, r"version: .*whole number.*got 1\.0"),
        ({"version": True}, r"version: .*whole number.*got True"),
        ({"fusion": "multiply"}, "fusion"),
        ({"fuson": "add"}, "fuson"),
        ({"prompt_template": "Translate:"}, "must contain {prompt} exactly once"),
        ({"max_prompt_tokens": 0, "max_new_tokens": -1}, "max_prompt_tokens: .*\n.*max_new_tokens: "),
    ],
)
def test_a_composition_file_that_cannot_be_read_is_named(
    save_composition: Callable[..., Path], tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    source = save_composition("t5", seed=5) / "composition.json"
    (tmp_path / "composition.json").write_text(source.read_text())
    edit(tmp_path, **fields)
    with pytest.raises(CompositionError, match=message):
        read_composition(tmp_path)


def test_a_directory_without_a_composition_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match=r"composition\.json"):
        read_composition(tmp_path)


def test_a_model_that_does_not_exist_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("nobody/no-such-model is not a local folder and is not a valid model identifier")

    monkeypatch.setattr("llm2slm_export.authoring.models.loading.AutoConfig.from_pretrained", refused)
    with pytest.raises(CompositionError) as caught:
        load_config("nobody/no-such-model")
    assert "nobody/no-such-model" in str(caught.value)
    assert "→" in str(caught.value)


def config_only(directory: Path, fields: dict[str, Any]) -> ModelSource:
    config_from(fields).save_pretrained(directory)
    return ModelSource(model=str(directory))


def test_unsupported_types_are_refused_both_at_once(tmp_path: Path) -> None:
    mamba = config_only(tmp_path, {"model_type": "mamba"})
    with pytest.raises(CompositionError) as caught:
        compose_untrained(mamba, mamba, random_weights=True)
    llm, slm = caught.value.evidence
    assert llm.startswith("LLM of type 'mamba'; supported: encoder-decoder: t5, ")
    assert "; encoder-only: bert, distilbert, modernbert; decoder-only: gpt2, " in llm
    assert slm.startswith("SLM of type 'mamba'; supported: encoder-decoder: t5, ")
    assert "; decoder-only: gpt2, " in slm
    assert "encoder-only" not in slm


def test_attention_over_the_padded_length_is_refused(tmp_path: Path) -> None:
    t5 = config_only(tmp_path / "t5", LLM_CONFIG)
    globally = config_only(tmp_path / "longt5", {"model_type": "longt5", "encoder_attention_type": "transient-global"})
    with pytest.raises(CompositionError) as caught:
        compose_untrained(globally, t5, random_weights=True)
    assert caught.value.evidence == ("LLM of type 'longt5' with transient-global attention; supported: local",)


# --- parts that do not fit -----------------------------------------------------------------------------------------


def refusal(directory: Path) -> CompositionError:
    with pytest.raises(CompositionError) as caught:
        load_composition(directory)
    assert caught.value.remedy
    return caught.value


def with_projector(directory: Path, **entry: Any) -> Path:
    """The composition with another projector, and composition.json saying so."""
    made = ProjectorEntry(**{"d_in": 48, "d_hidden": 24, "d_out": 32} | entry)
    save_projector(Projector(made), directory, torch.float32)
    edit(directory, projector=made.model_dump())
    return directory


def test_cross_attention_needs_an_slm_that_has_it(save_composition: Callable[..., Path]) -> None:
    error = refusal(save_composition("llama", "cross_attention"))
    assert error.evidence == ("fusion cross_attention needs an SLM with cross-attention; llama is decoder-only",)


def test_cross_attention_of_two_models_needs_an_slm_that_has_it(tmp_path: Path) -> None:
    llm, slm = config_only(tmp_path / "llm", LLM_CONFIG), config_only(tmp_path / "slm", SLM_CONFIGS["gpt2"])
    with pytest.raises(CompositionError, match="cross_attention needs an SLM with cross-attention; gpt2"):
        compose_untrained(llm, slm, pair_config=PairConfig(fusion="cross_attention"), random_weights=True)


@pytest.mark.parametrize(
    ("layer", "layers", "evidence"),
    [
        (4, 1, ["LLM layer 4 of 2 layers; choose -3 to 2"]),
        (-5, 1, ["LLM layer -5 of 2 layers; choose -3 to 2"]),
        ([1, 9, -8], 3, ["LLM layer 9, -8 of 2 layers; choose -3 to 2"]),
        ([1, 2], 1, ["the composition uses 2 LLM layers, the projector fuses 1"]),
        (
            [1, 9],
            3,
            ["LLM layer 9 of 2 layers; choose -3 to 2", "the composition uses 2 LLM layers, the projector fuses 3"],
        ),
    ],
)
def test_layers_that_the_llm_has_not_are_named(
    save_composition: Callable[..., Path], layer: int | list[int], layers: int, evidence: list[str]
) -> None:
    directory = with_projector(save_composition("t5"), layers=layers)
    edit(directory, llm={"model": "llm", "layer": layer})
    assert list(refusal(directory).evidence) == evidence


@pytest.mark.parametrize(
    ("fusion", "tokenizer", "entry", "message"),
    [
        ("add", "llm", {}, "fusion add with tokenizer llm needs an adapter; projector.d_embedding is None"),
        ("prefix", "llm", {}, "fusion prefix with tokenizer llm needs an adapter; projector.d_embedding is None"),
        ("add", "shared", {"d_embedding": 48}, "fusion add with tokenizer shared has no adapter; projector.d_embedding is 48"),
        ("replace", "llm", {"d_embedding": 48}, "fusion replace with tokenizer llm has no adapter; projector.d_embedding is 48"),
        ("add", "llm", {"d_embedding": 47}, "projector d_embedding is 47, the LLM's embedding size is 48"),
    ],
)  # fmt: skip
def test_an_adapter_is_there_exactly_where_it_is_used(
    save_composition: Callable[..., Path], fusion: str, tokenizer: str, entry: dict[str, int], message: str
) -> None:
    directory = with_projector(save_composition("t5", fusion), **entry)
    edit(directory, tokenizer=tokenizer)
    assert refusal(directory).evidence == (message,)


def test_everything_that_does_not_fit_is_named_at_once(save_composition: Callable[..., Path]) -> None:
    directory = with_projector(save_composition("llama", "cross_attention"), d_embedding=48, d_out=36)
    edit(directory, llm={"model": "llm", "layer": 7})
    assert [line.split()[0] for line in refusal(directory).evidence] == ["fusion", "fusion", "LLM"]


@pytest.mark.parametrize(("fusion", "limit"), [("add", 260), ("prefix", 130), ("cross_attention", None)])
def test_prompts_end_where_the_positions_of_the_slms_encoder_do(
    save_composition: Callable[..., Path], fusion: str, limit: int | None
) -> None:
    directory = save_composition("bart", fusion, fields=CONFIGS["bart"])
    edit(directory, max_prompt_tokens=300)
    if limit is None:
        assert load_composition(directory).file.max_prompt_tokens == 300
        return
    message = f"max_prompt_tokens is 300; the models' positions end at {limit} prompt tokens"
    assert refusal(directory).evidence == (message,)


def test_prompts_end_where_the_llms_positions_do(tmp_path: Path) -> None:
    llm, slm = config_only(tmp_path / "llm", CONFIGS["bert"]), config_only(tmp_path / "slm", SLM_CONFIGS["t5"])
    assert compose_untrained(llm, slm, random_weights=True).file.max_prompt_tokens == 260
    with pytest.raises(CompositionError, match=r"max_prompt_tokens is 261.* end at 260 prompt tokens"):
        compose_untrained(llm, slm, pair_config=PairConfig(max_prompt_tokens=261), random_weights=True)


def test_an_identity_projector_needs_equal_widths(save_composition: Callable[..., Path], tmp_path: Path) -> None:
    llm, slm = config_only(tmp_path / "llm", LLM_CONFIG), config_only(tmp_path / "slm", SLM_CONFIGS["t5"])
    identity = PairConfig(fusion="replace", projector=ProjectorSettings(kind="identity"))
    with pytest.raises(CompositionError) as caught:
        compose_untrained(llm, slm, pair_config=identity, random_weights=True)
    assert caught.value.evidence == ("an identity projector needs d_in = d_out, got 48 and 32",)
    assert compose_untrained(llm, llm, pair_config=identity, random_weights=True).file.projector.kind == "identity"
    directory = save_composition("t5")
    edit(directory, projector={"kind": "identity", "d_in": 48, "d_out": 32})
    assert "an identity projector needs d_in = d_out, got 48 and 32" in str(refusal(directory))


# --- tokenizers ----------------------------------------------------------------------------------------------------


def tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """The LLM's and the SLM's, alike."""
    config = config_from(SLM_CONFIGS["t5"])
    return byte_tokenizer(config), byte_tokenizer(config)


def test_padding_that_only_one_tokenizer_has_is_no_mismatch() -> None:
    slm = model_from_config(SLM_CONFIGS["t5"])
    llm_tokenizer, slm_tokenizer = tokenizers()
    llm_tokenizer.pad_token = None
    require_special_tokens(slm, llm_tokenizer, slm_tokenizer, "shared")


def test_special_tokens_that_are_missing_are_named_at_once() -> None:
    slm = model_from_config(SLM_CONFIGS["t5"])
    config, generation = slm.config, slm.generation_config
    generation.eos_token_id = generation.decoder_start_token_id = config.decoder_start_token_id = None
    llm_tokenizer, slm_tokenizer = tokenizers()
    llm_tokenizer.pad_token = llm_tokenizer.eos_token = None
    with pytest.raises(CompositionError, match="special tokens of the pair are not compatible") as caught:
        require_special_tokens(slm, llm_tokenizer, slm_tokenizer, "shared")
    assert caught.value.evidence == (
        "the SLM's generation_config has no eos_token_id: generation would never stop",
        "the SLM has no decoder_start_token_id",
        "eos_token_id: None in the LLM's tokenizer, 1 in the SLM's",
        "the LLM's tokenizer has neither a padding nor an end-of-sequence token",
    )


def test_special_tokens_that_contradict_each_other_are_named_at_once() -> None:
    slm = model_from_config(SLM_CONFIGS["t5"])
    slm.generation_config.eos_token_id, slm.generation_config.decoder_start_token_id = [5, 307], 400
    llm_tokenizer, slm_tokenizer = tokenizers()
    llm_tokenizer.pad_token = llm_tokenizer.eos_token
    with pytest.raises(CompositionError) as caught:
        require_special_tokens(slm, llm_tokenizer, slm_tokenizer, "shared")
    contradictions = (
        "the SLM's eos_token_id is [5, 307], its tokenizer's is 1",
        "special ids [307, 400] are outside the SLM's vocabulary of 307",
    )
    assert caught.value.evidence == (*contradictions, "pad_token_id: 1 in the LLM's tokenizer, 0 in the SLM's")
    with pytest.raises(CompositionError) as caught:  # the LLM's tokenizer only reads
        require_special_tokens(slm, llm_tokenizer, slm_tokenizer, "llm")
    assert caught.value.evidence == contradictions


def test_special_tokens_that_fit_are_accepted() -> None:
    for slm_type in SLM_CONFIGS.values():
        require_special_tokens(model_from_config(slm_type), *tokenizers(), "shared")


def test_two_tokenizations_are_not_fused_position_by_position(save_composition: Callable[..., Path]) -> None:
    directory = save_composition("t5")
    tokenizer = load_tokenizer(str(directory / "llm"))
    tokenizer.add_tokens(["quick"])
    tokenizer.save_pretrained(directory / "llm")
    error = refusal(directory)
    assert f"differently (1 of {len(PROBES)} probe sentences)" in error.fact
    assert error.evidence[0].startswith(f"{PROBES[0]!r}: LLM ids [")
    assert "`tokenizer: llm`" in error.remedy
    edit(with_projector(directory, d_embedding=48), tokenizer="llm")
    assert load_composition(directory).reference.projector.adapter is not None


TURN = "{{ bos_token }}[user] {{ messages[0]['content'] }}{% if add_generation_prompt %} [model] {% endif %}"


def chatting(template: str | None, *, adds_bos: bool) -> PreTrainedTokenizerFast:
    _, tokenizer = tokenizers()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_is_left_as_it_is() -> None:
    assert prompt_template("Say {prompt}.", chatting(None, adds_bos=True)) == PromptTemplate("Say {prompt}.")
    assert resolve_template("Say {prompt}.", chatting(None, adds_bos=True)) == "Say {prompt}."


def bundle_ids(template: PromptTemplate, tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """What a bundle reads, which has tokenizer.json alone."""
    backend: Any = tokenizer.backend_tokenizer
    ids: list[int] = (
        Tokenizer.from_str(backend.to_str())
        .encode(template.fill(prompt), add_special_tokens=template.special_tokens)
        .ids
    )
    return ids


CHATS = {
    "plain": TURN,
    "trimmed": TURN.replace("content']", "content'] | trim"),
    "a line break first": "\n" + TURN,
    "a default system prompt": "{% if messages[0]['role'] != 'system' %}[sys] Be short.\n{% endif %}" + TURN,
    "a look that changes nothing": "{% if messages[0]['content'].startswith('<tool>') %}{% set found = true %}{% endif %}" + TURN,
    "parts or text": "{% if messages[0]['content'] is string %}" + TURN + "{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("post_processor", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("chat", CHATS)
def test_chat_gives_the_ids_of_transformers(chat: str, post_processor: str) -> None:
    tokenizer = chatting(CHATS[chat], adds_bos=False)
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=post_processor, special_tokens=special
    )
    template, draw = prompt_template("chat", tokenizer), random.Random(chat)
    pieces = [
        "hello",
        " ",
        "\n",
        "\t",
        "</s>",
        "<s>",
        "{prompt}",
        "{{ x }}",
        "é",
        "日本",
        "\u00a0",
        "\u2028",
        "[user]",
        ".",
    ]
    for _ in range(60):
        prompt = "".join(draw.choices(pieces, k=draw.randint(1, 8)))
        turn = [{"role": "user", "content": prompt}]
        expected = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert bundle_ids(template, tokenizer, prompt) == expected
        assert tokenized(tokenizer, template, [prompt]) == [expected]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the LLM's tokenizer has no chat template"),
        ("{{ messages[0]['content'] | upper }}", "exactly once"),
        ("{{ messages[0]['content'] * 2 }}", "{prompt}{prompt}"),
        ("{prompt} " + TURN, "exactly once"),
        (TURN.replace("[user]", "[user]{% if '/fast' in messages[0]['content'] %}[fast]{% endif %}"), "'/fast'"),
        (TURN.replace("content']", "content'].split('##')[-1]"), "'##'"),
        (TURN.replace("content']", "content'] | replace('ß', 'ss')"), "'ß'"),
        (TURN + "{% if messages[0]['content'] | length > 77 %}long{% endif %}", "changes with the user's text"),
        (TURN.replace("content']", "content'].rstrip()"), "changes with the user's text"),
        (TURN.replace("content']", "content'] | e"), "changes with the user's text"),
        (TURN.replace("content']", "content'] | indent"), "changes with the user's text"),
        ("{{ strftime_now('%d %b %Y') }}" + TURN, "contains the current date"),
        ("{{ range(1000000) | random }}" + TURN, "fails on a single user turn"),
        ("{{ range(90000) | random }}" + TURN, "changes from call to call"),
        ("{{ raise_exception('a system message is required') }}", "a system message is required"),
        ("{% for m in messages %}", "(line 1 of the template)"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].nothing.at_all }}", "no attribute 'nothing'"),
    ],
)  # fmt: skip
def test_chat_needs_a_template_that_holds_the_prompt(template: str | None, message: str) -> None:
    with pytest.raises(CompositionError) as caught:
        prompt_template("chat", chatting(template, adds_bos=True))
    assert message in str(caught.value)
    assert "write the template as text" in caught.value.remedy


@pytest.mark.parametrize(
    ("chat", "adds_bos", "says"),
    [(TURN, True, "would add special tokens"), (CHATS["trimmed"], False, "it strips the user's text")],
)
def test_a_chat_template_that_text_alone_does_not_say_is_not_resolved(chat: str, adds_bos: bool, says: str) -> None:
    def adding(chat: str, form: str) -> PreTrainedTokenizerFast:
        tokenizer = chatting(chat, adds_bos=False)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=form, special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        return tokenizer

    assert resolve_template("chat", adding(TURN, "$A")) == "<s>[user] {prompt} [model] "
    with pytest.raises(CompositionError, match=says):
        resolve_template("chat", adding(chat, "<s> $A" if adds_bos else "$A"))


@pytest.mark.parametrize("alias", list(CATALOG))
def test_every_alias_has_an_architecture_transformers_knows(alias: str) -> None:
    known = architecture(alias)
    assert known is not None
    assert known == architecture(CATALOG[alias][0])
    config_from(known)


def test_a_model_without_some_of_its_weights_is_refused(save_composition: Callable[..., Path]) -> None:
    from safetensors.torch import load_file

    directory = save_composition("llama", seed=9)
    path = directory / "slm" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CompositionError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_composition(directory)


def test_prompt_ids_that_the_llm_has_no_row_for_are_refused(tmp_path: Path) -> None:
    llm_config = config_only(tmp_path / "a", {**SLM_CONFIGS["llama"], "vocab_size": 280})
    slm_type = config_only(
        tmp_path / "b", {**SLM_CONFIGS["gpt2"], "vocab_size": 400, "eos_token_id": 350, "pad_token_id": None}
    )
    with pytest.raises(CompositionError, match="the 280 rows of the LLM") as caught:
        compose_untrained(llm_config, slm_type, random_weights=True)
    assert "350" in str(caught.value)
    assert "tokenizer: llm" in str(caught.value)
    compose_untrained(llm_config, slm_type, pair_config=PairConfig(tokenizer="llm"), random_weights=True)
