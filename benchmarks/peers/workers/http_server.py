"""CTranslate2 or transformers behind FastAPI: a peer of `llm2slm-export serve` for benchmarks/serving.py.

Waiting prompts are decoded together, and each batch runs to its end: neither runtime lets a row join a running batch. Every token
is sent as it is chosen, as in OpenAI's protocol, with the fields that the benchmark uses.

Usage: PYTHON http_server.py {ctranslate2|transformers} MODEL --port PORT [--threads 2] [--max-rows 64] [--compute-type int8]
MODEL is transformers' directory of an encoder-decoder model. CTranslate2 converts it, once, into `MODEL/ctranslate2`.
"""

import argparse
import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from transformers import AutoTokenizer

Put = Callable[[int, int], None]  # row, token id
Decode = Callable[
    [list[list[int]], int, bool, Put], None
]  # prompts, maximum of new tokens, whether all of them are wanted


@dataclass
class Waiting:
    """A request, and where its tokens go; None ends them."""

    ids: list[int]
    most: int
    fixed: bool
    put: Callable[[int | None], None]


def ctranslate2_decode(model: Path, given: argparse.Namespace) -> Decode:
    """Greedy search of CTranslate2, with its callback for each token."""
    import ctranslate2

    converted = model / "ctranslate2"
    if not converted.exists():
        ctranslate2.converters.TransformersConverter(str(model)).convert(str(converted))
        # A token that the tokenizer lacks is null there, and is refused at load.
        path = converted / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        missing = {
            key: config["eos_token"] for key, value in config.items() if key.endswith("_token") and value is None
        }
        path.write_text(json.dumps(config | missing), encoding="utf-8")
    translator = ctranslate2.Translator(
        str(converted), compute_type=given.compute_type, intra_threads=given.threads, inter_threads=1
    )
    tokenizer = AutoTokenizer.from_pretrained(model)

    def decode(prompts: list[list[int]], most: int, fixed: bool, put: Put) -> None:
        def told(step: Any) -> bool:
            put(step.batch_id, step.token_id)
            return False

        translator.translate_batch(
            [tokenizer.convert_ids_to_tokens(ids) for ids in prompts], beam_size=1, max_decoding_length=most,
            min_decoding_length=most if fixed else 1, callback=told,
        )  # fmt: skip

    return decode


def transformers_decode(model: Path, given: argparse.Namespace) -> Decode:
    """transformers' `generate` at fp32, with a streamer."""
    import torch
    from transformers import AutoModelForSeq2SeqLM
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(given.threads)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    eos, pad = loaded.config.eos_token_id, loaded.config.pad_token_id or 0

    class Rows(BaseStreamer):
        def __init__(self, rows: int, put: Put) -> None:
            self.put_token, self.running, self.started = put, [True] * rows, False

        def put(self, value: Any) -> None:
            if not self.started:  # the decoder start token
                self.started = True
                return
            for row, token in enumerate(value.tolist()):
                if self.running[row]:
                    self.put_token(row, token)
                    self.running[row] = token != eos

        def end(self) -> None:
            pass

    def decode(prompts: list[list[int]], most: int, fixed: bool, put: Put) -> None:
        longest = max(map(len, prompts))
        with torch.inference_mode():
            loaded.generate(
                torch.tensor([ids + [pad] * (longest - len(ids)) for ids in prompts]),
                attention_mask=torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in prompts]),
                do_sample=False, num_beams=1, max_length=None, max_new_tokens=most, min_new_tokens=most if fixed else None,
                streamer=Rows(len(prompts), put),
            )  # fmt: skip

    return decode


def run(decode: Decode, waiting: "queue.Queue[Waiting]", most_rows: int) -> None:
    """Decode what waits, batch after batch."""
    while True:
        batch = [waiting.get()]
        while len(batch) < most_rows and not waiting.empty():
            batch.append(waiting.get())
        decode(
            [one.ids for one in batch],
            max(one.most for one in batch),
            any(one.fixed for one in batch),
            lambda row, token, batch=batch: batch[row].put(token),
        )
        for one in batch:
            one.put(None)


def create_app(model: Path, decode: Decode, most_rows: int) -> FastAPI:
    """The application."""
    app, tokenizer, waiting = FastAPI(), AutoTokenizer.from_pretrained(model), queue.Queue[Waiting]()
    threading.Thread(target=run, args=(decode, waiting, most_rows), daemon=True).start()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "model", "object": "model"}]}

    @app.post("/v1/completions")
    async def complete(http: Request) -> StreamingResponse:
        body, loop = await http.json(), asyncio.get_running_loop()
        ids, tokens = tokenizer(body["prompt"]).input_ids, asyncio.Queue[int | None]()
        waiting.put(
            Waiting(
                ids, body["max_tokens"], bool(body.get("min_new_tokens")),
                lambda token: loop.call_soon_threadsafe(tokens.put_nowait, token),
            )
        )  # fmt: skip

        async def chunks() -> AsyncIterator[str]:
            def chunk(choices: list[Any], usage: Any = None) -> str:
                return f"data: {json.dumps({'id': 'cmpl-0', 'object': 'text_completion', 'created': 0, 'model': 'model', 'choices': choices, 'usage': usage}, separators=(',', ':'))}\n\n"

            count = 0
            while (token := await tokens.get()) is not None:
                count += 1
                text = tokenizer.decode([token])
                yield chunk([{"index": 0, "text": text, "logprobs": None, "finish_reason": None}])
            yield chunk([{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}])
            yield chunk([], {"prompt_tokens": len(ids), "completion_tokens": count, "total_tokens": len(ids) + count})
            yield "data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("ctranslate2", "transformers"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-rows", type=int, default=64)
    parser.add_argument("--compute-type", default="int8", help="of CTranslate2; transformers computes at fp32")
    given = parser.parse_args()
    decode = {"ctranslate2": ctranslate2_decode, "transformers": transformers_decode}[given.engine](given.model, given)
    uvicorn.run(create_app(given.model, decode, given.max_rows), host="127.0.0.1", port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
