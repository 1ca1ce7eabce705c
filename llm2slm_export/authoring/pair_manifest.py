"""The manifest of an exported pair."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import onnxruntime
from pydantic import ValidationError

from llm2slm_export import contract
from llm2slm_export.authoring.models.compatibility import positions_known
from llm2slm_export.authoring.models.generation_config import EXPORTED, require_exportable
from llm2slm_export.authoring.models.pairing import LoadedPair
from llm2slm_export.authoring.models.reference import digest
from llm2slm_export.authoring.parity.reference_outputs import special_ids
from llm2slm_export.bundle.manifest import CacheEntry, GenerationDefaults, GraphEntry, Manifest, Source, TokenizerEntry
from llm2slm_export.bundle.parity_report import ParityReport
from llm2slm_export.contract import GraphName
from llm2slm_export.errors import CompositionError
from llm2slm_export.files.validation_problems import validation_problems

LLM_TOKENIZER = "tokenizer/llm/tokenizer.json"
_TOOLS = ("llm2slm-export", "torch", "transformers", "onnx", "onnxscript", "tokenizers")


def pair_manifest(pair: LoadedPair, graphs: Mapping[GraphName, GraphEntry], slm_tokenizer: str, rows: int) -> Manifest:
    """The manifest without parity report and files.

    Args:
        pair: the exported pair.
        graphs: the entries of its graphs.
        slm_tokenizer: the file of the SLM's tokenizer.
        rows: number of rows of the tables that prompt ids index.
    """
    reference, shape = pair.reference, pair.reference.shape
    slm: Any = reference.slm
    return Manifest(
        name=pair.file.name,
        sources={"llm": Source.model_validate(pair.sources["llm"]), "slm": Source.model_validate(pair.sources["slm"])},
        trained=pair.trained,
        shape=shape,
        fusion=pair.file.fusion,
        llm_layer=pair.file.llm.layer,
        prompt_template=pair.file.prompt_template,
        prompt_special_tokens=pair.file.prompt_special_tokens,
        prompt_strip=pair.file.prompt_strip,
        prompt_vocab=rows,
        max_prompt_tokens=pair.file.max_prompt_tokens,
        max_total_tokens=positions_known(slm),
        tokenizer=TokenizerEntry(
            strategy=pair.file.tokenizer,
            llm=LLM_TOKENIZER,
            slm=slm_tokenizer,
            slm_size=min(len(pair.slm_tokenizer), shape.vocab_size),
            stand_in=pair.stand_in_tokenizer,
        ),
        special_ids=special_ids(reference, pair.llm_tokenizer),
        generation=generation_defaults(slm, pair.file.max_new_tokens),
        graphs=dict(graphs),
        cache=CacheEntry(state=contract.state(shape, contract.cache_type(graphs["decoder"].precision))),
        parity=ParityReport(rows=()),
        tool_versions={tool: version(tool) for tool in _TOOLS} | {"onnxruntime": onnxruntime.__version__},
        files=(),
        weights={"projector": digest(reference.projector), "slm": digest(reference.slm)},
    )


def generation_defaults(slm: Any, max_new_tokens: int) -> GenerationDefaults:
    """The options of the SLM's generation_config, in the bundle's schema.

    transformers' `min_length` includes the start token of an encoder-decoder. For a decoder-only model it includes the
    prompt, whose length a bundle does not know in advance: it is not exported.
    """
    require_exportable(slm)
    chosen = slm.generation_config
    options = {name: getattr(chosen, name, None) for name in EXPORTED}
    options = {name: value for name, value in options.items() if value is not None}
    if slm.config.is_encoder_decoder and chosen.min_length:
        options.setdefault("min_new_tokens", max(0, min(chosen.min_length - 1, max_new_tokens)))
    try:
        return GenerationDefaults.model_validate({"max_new_tokens": max_new_tokens, **options})
    except ValidationError as error:
        raise CompositionError(
            "The SLM's generation_config has values that bundles do not support.",
            *validation_problems(error, GenerationDefaults, whole="generation_config"),
            remedy="fix the SLM's generation_config.json",
        ) from error
