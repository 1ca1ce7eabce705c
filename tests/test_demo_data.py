"""The scripts that make training data and models for the recipes, where a mistake would flatter a score."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5ForConditionalGeneration

from tests.support.paths import REPOSITORY
from tests.support.tiny_models import LLM_CONFIG

SCRIPTS = REPOSITORY / "demo"
TEXT = "a small library that reads and writes packages for the archive of one suite"
WORDS = TEXT.split()


@pytest.fixture
def get_debian(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return __import__("get_debian")


def test_near_duplicates_of_training_bodies_are_not_held_out(get_debian: ModuleType) -> None:
    def row(words: list[str]) -> object:
        return get_debian.Row("source", " ".join(words), "a synopsis")

    trained = [row(WORDS), row(["something", "else", *WORDS[:6]])]
    same = row([word.upper() + "," for word in WORDS])  # 10 of 10 runs of five words
    most = row([*WORDS[:11], "x", "y", "z"])  # 7 of 13
    some = row([*WORDS[:9], "x", "y", "z", "v", "w"])  # 5 of 15
    own = row(["entirely", "new", "text", "of", "six", "words"])
    assert get_debian.without_near_duplicates([same, some, most, own], trained) == [some, own]


@pytest.mark.slow
def test_a_pruned_model_reads_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    rows = [{"prompt": " ".join(WORDS[i:] + WORDS[:i]), "response": WORDS[i]} for i in range(len(WORDS))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    trained = __import__("train_tokenizer").train(
        [row["prompt"] for row in rows] + ["quick brown foxes jump"] * 900, 120
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "whole")
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:  # ñ in two texts, ł in one
        file.write(json.dumps({"prompt": "pequeño niño ł", "response": "ñ"}) + "\n")
    command = [sys.executable, SCRIPTS / "prune_vocabulary.py", tmp_path / "whole", tmp_path / "rows.jsonl"]
    subprocess.run([*command, tmp_path / "pruned", "--add", "2"], check=True, capture_output=True)

    pruned = T5ForConditionalGeneration.from_pretrained(tmp_path / "pruned").eval()
    small = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    assert len(small) == pruned.config.vocab_size < len(tokenizer)
    text = WORDS[0] + " " + WORDS[4]
    ids, own = tokenizer(text).input_ids, small(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == small.convert_ids_to_tokens(own)
    assert ids != own
    with torch.no_grad():
        logits, expected = (
            m(input_ids=torch.tensor([row]), decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits
            for m, row in ((pruned, own), (model, ids))
        )
    *stayed, new = small.convert_ids_to_tokens(list(range(len(small))))
    torch.testing.assert_close(logits[..., :-1], expected[..., tokenizer.convert_tokens_to_ids(stayed)])
    assert new == "ñ"
    torch.testing.assert_close(pruned.shared.weight[-1], pruned.shared.weight[:-1].mean(dim=0))
    assert small.decode(small("niño").input_ids, skip_special_tokens=True) == "niño"
    assert small.unk_token_id in small("ł").input_ids
    assert small("quick foxes").input_ids.count(small.unk_token_id) == 0
    assert small.decode(small("quick foxes").input_ids, skip_special_tokens=True) == "quick foxes"


@pytest.mark.slow
def test_an_encoder_reads_as_before_when_it_is_given_a_decoder(save_model: Callable[..., Path], tmp_path: Path) -> None:
    source = save_model(LLM_CONFIG)
    encoder = T5EncoderModel.from_pretrained(source).eval()
    encoder.half().save_pretrained(tmp_path / "encoder")
    command = [sys.executable, SCRIPTS / "give_decoder.py", tmp_path / "encoder", source, tmp_path / "whole"]
    subprocess.run(command, check=True, capture_output=True)

    whole = T5ForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    assert len(whole.decoder.block) == LLM_CONFIG["num_layers"]
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        expected = encoder.float()(input_ids=ids).last_hidden_state
        torch.testing.assert_close(whole.encoder(input_ids=ids).last_hidden_state, expected, atol=0, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "whole")("abc de").input_ids
