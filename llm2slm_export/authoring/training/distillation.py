"""Sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947): the SLM is trained on the LLM's responses.

Responses are stored in a file, so that an interrupted run resumes, and a later run on the same prompts does not need
the LLM's decoder.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedTokenizerFast

from llm2slm_export.authoring.models.aliases import hub_id
from llm2slm_export.authoring.models.chat_template import tokenized
from llm2slm_export.authoring.models.compatibility import positions_known
from llm2slm_export.authoring.models.generation_config import WITHOUT_EFFECT
from llm2slm_export.authoring.models.reference import is_encoder_decoder
from llm2slm_export.authoring.models.special_tokens import prompt_pad, slm_special_ids
from llm2slm_export.authoring.progress import SILENT, Progress
from llm2slm_export.authoring.recipe import TeacherRows, TeacherSettings
from llm2slm_export.authoring.training.collate import padded
from llm2slm_export.authoring.training.pairs import Row
from llm2slm_export.authoring.training.trainable import load_writing
from llm2slm_export.bundle.prompt_template import PromptTemplate
from llm2slm_export.errors import CompositionError, DataError
from llm2slm_export.files.bounded_json import JsonError, parse_json

_CONFIGURATIONS = ("config.json", "generation_config.json")
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class TeacherResponses:
    """The teacher's responses.

    Args:
        responses: usable responses by prompt.
        unfinished: number of responses without EOS at the limit.
        empty: number of responses of white space only.
        too_long: number of prompts over the limit, which the teacher did not receive.
    """

    responses: dict[str, str]
    unfinished: int
    empty: int
    too_long: int

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        return len(self.responses) + self.unfinished + self.empty + self.too_long

    def distilled(
        self, rows: Iterable[Row], further: Iterable[str] = (), *, how: TeacherRows = "replaced"
    ) -> list[Row]:
        """The training rows with the teacher's responses.

        They replace the data's responses (`replaced`), follow them (`both`), or are for further prompts only (`kept`).
        Rows without a usable response are dropped; with `both` they keep the data's response. Duplicate rows are
        merged.

        Args:
            rows: the training data.
            further: prompts without rows; their rows come last.
            how: which responses the rows have.

        Raises:
            DataError: the teacher has no usable response.
        """
        distilled: list[Row] = []
        for prompt, own in rows:
            if how != "replaced":
                distilled.append((prompt, own))
            if how != "kept" and prompt in self.responses:
                distilled.append((prompt, self.responses[prompt]))
        distilled += [(prompt, self.responses[prompt]) for prompt in further if prompt in self.responses]
        if not self.responses:
            raise DataError(
                "The teacher has no usable response to any prompt.",
                f"unfinished {self.unfinished}, empty {self.empty}, prompts over the limit {self.too_long}",
                remedy="raise training.max_response_tokens, or check that the LLM was trained for this task",
            )
        return list(dict.fromkeys(distilled))


@dataclass(frozen=True)
class Teacher:
    """The LLM with its language-model head, which responds to training prompts.

    Args:
        name, revision: the LLM, as in the recipe.
        tokenizer: the LLM's.
        template: the text around a prompt.
        settings: the recipe's teacher settings.
        max_prompt_tokens: longer prompts are left out.
        max_new_tokens: maximum response length, EOS included.
        device: of the LLM.
        bf16: load weights in bfloat16 on a GPU.
    """

    name: str
    revision: str | None
    tokenizer: PreTrainedTokenizerFast
    template: PromptTemplate
    settings: TeacherSettings
    max_prompt_tokens: int
    max_new_tokens: int
    device: torch.device
    bf16: bool

    def answer(self, prompts: Iterable[str], directory: Path, progress: Progress = SILENT) -> TeacherResponses:
        """Respond to every distinct prompt; responses are stored in `directory` and reused.

        Args:
            prompts: texts.
            directory: directory that stores the responses.
            progress: receives the number of prompts with a response.

        Raises:
            CompositionError: the LLM cannot generate, has no EOS, or has too few positions.
        """
        distinct = list(dict.fromkeys(prompts))
        ids = tokenized(self.tokenizer, self.template, distinct)
        # Longest first, so that insufficient memory shows at once.
        asked = sorted(
            ((i, p) for i, p in zip(ids, distinct, strict=True) if len(i) <= self.max_prompt_tokens),
            key=lambda pair: (-len(pair[0]), pair[1]),
        )
        if not asked:
            return TeacherResponses({}, 0, 0, len(distinct))
        model = None
        if (origin := _origin(self.name, self.revision)) is None:
            model = self._load(len(asked[0][0]))  # a hub model; loading puts it into the hub's cache
            origin = _origin(self.name, self.revision) or self.name
        path = directory / f"{self._key(origin)}.jsonl"
        known = _read(path)
        missing = [(i, p) for i, p in asked if p not in known]
        if missing:
            directory.mkdir(parents=True, exist_ok=True)
            known |= self._write(self._load(len(asked[0][0])) if model is None else model, missing, path, progress)
        responses = {p: known[p] for _, p in asked}
        return TeacherResponses(
            {prompt: text for prompt, text in responses.items() if text},
            unfinished=sum(text is None for text in responses.values()),
            empty=sum(text == "" for text in responses.values()),
            too_long=len(distinct) - len(asked),
        )

    def _key(self, origin: str) -> str:
        parts = (origin, self.tokenizer.backend_tokenizer.to_str(), self.template, self.settings.num_beams)
        return hashlib.sha256(repr((*parts, self.max_new_tokens, self._in_bf16)).encode()).hexdigest()[:16]

    def _load(self, longest: int) -> nn.Module:
        model = load_writing(self.name, self.revision)
        problems = []
        if not slm_special_ids(model).eos:
            problems.append("its generation_config has no eos_token_id: generation would never stop")
        transformer: Any = model
        # transformers needs the tokenizer for these options, or ends rows without EOS.
        problems += [
            f"its generation_config has {name}, which is not supported for a teacher"
            for name in ("stop_strings", "token_healing")
            if getattr(transformer.generation_config, name, None)
        ]
        separate = is_encoder_decoder(model)
        needs = [(transformer, (0 if separate else longest) + self.max_new_tokens)]
        if separate:
            needs.append((transformer.get_encoder(), longest))
        for part, wanted in needs:
            known = positions_known(part)
            if known is not None and wanted > known:
                problems.append(f"it needs {wanted} positions and has {known}")
        if problems:
            raise CompositionError(
                f"The LLM {self.name} cannot be a teacher.",
                *problems,
                remedy="lower training.max_prompt_tokens and training.max_response_tokens, fix these values, or "
                "train without training.teacher",
            )
        # The model's own options stay (forced tokens, bad words, …), except sampling and a forced EOS at the limit.
        # They are set on the model, because `generate` completes given options from there.
        transformer.generation_config.update(
            do_sample=False, num_beams=self.settings.num_beams, num_return_sequences=1, max_length=None,
            max_new_tokens=self.max_new_tokens, forced_eos_token_id=None, temperature=None, top_k=None, top_p=None,
            min_p=None, typical_p=None, pad_token_id=slm_special_ids(model).pad, use_cache=True,
            **dict.fromkeys(WITHOUT_EFFECT - {"use_cache"}),
        )  # fmt: skip
        return model.to(self.device, torch.bfloat16 if self._in_bf16 else None)

    @property
    def _in_bf16(self) -> bool:
        """Whether weights are in bfloat16: a GPU reads them twice as fast, a CPU does not."""
        return self.bf16 and self.device.type == "cuda"

    def _write(
        self, model: nn.Module, missing: list[tuple[list[int], str]], path: Path, progress: Progress
    ) -> dict[str, str | None]:
        size, written = self.settings.batch_size, dict[str, str | None]()
        # Unbuffered, so that every finished batch is in the file.
        progress.start("teacher responses", len(missing))
        with path.open("ab", buffering=0) as file:
            for start in range(0, len(missing), size):
                batch = missing[start : start + size]
                texts = self._generate(model, [ids for ids, _ in batch])
                made = dict(zip((prompt for _, prompt in batch), texts, strict=True))
                lines = [json.dumps({"prompt": p, "response": t}, ensure_ascii=False) for p, t in made.items()]
                file.write(("\n".join(lines) + "\n").encode())
                written |= made
                progress.advance(len(batch))
        return written

    @torch.no_grad()
    def _generate(self, model: nn.Module, prompts: list[list[int]]) -> list[str | None]:
        """The responses of a batch, stripped; None for a response without EOS."""
        transformer: Any = model
        separate = is_encoder_decoder(model)
        ids = padded(prompts, prompt_pad(self.tokenizer) or 0, left=not separate)
        mask = padded([[1] * len(p) for p in prompts], 0, left=not separate)
        # Dynamic caches: transformers allocates a T5's cache by the number of *encoder* layers.
        cache = {"cache": EncoderDecoderCache(DynamicCache(), DynamicCache())} if separate else {}
        rows = transformer.generate(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device),
            generation_config=transformer.generation_config, **cache,
        )  # fmt: skip
        # Rows begin with the decoder start token, or with the prompt.
        written = rows[:, 1 if separate else ids.shape[1] :].tolist()
        eos = slm_special_ids(model).eos
        responses: list[str | None] = []
        for row in written:
            end = next((i for i, id in enumerate(row) if id in eos), None)
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
            responses.append(text.strip() if end is not None else None)
        return responses


def _read(path: Path) -> dict[str, str | None]:
    """The responses in a file, by prompt; truncated or invalid lines are skipped."""
    known: dict[str, str | None] = {}
    if not path.is_file():
        return known
    content = path.read_bytes()
    for line in content.split(b"\n"):
        try:
            entry = parse_json(line)
        except JsonError:
            continue
        if isinstance(entry, dict) and entry.keys() == {"prompt", "response"}:
            prompt, response = entry["prompt"], entry["response"]
            if isinstance(prompt, str) and (response is None or isinstance(response, str)):
                known[prompt] = response
    if not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return known


def _origin(name: str, revision: str | None) -> str | None:
    """The identity of the LLM's weights, without loading them: a hash of a directory's files, or a hub id's commit.

    None for a hub model that is not in the hub's cache.
    """
    directory = Path(name)
    if not directory.is_dir():
        found = try_to_load_from_cache(hub_id(name), "config.json", revision=revision)
        return f"{hub_id(name)}@{Path(found).parent.name}" if isinstance(found, str) else None
    files = [p for p in sorted(directory.iterdir()) if p.suffix in _WEIGHTS or p.name in _CONFIGURATIONS]
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
