"""The prompt template: the text around a prompt, written out or taken from the LLM's own chat template."""

from transformers import PreTrainedTokenizerFast

from llm2slm_export.errors import CompositionError

CHAT = "chat"
PLACEHOLDER = "{prompt}"


def written_out(template: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """The template with {prompt} in it; `chat` becomes one user turn of the LLM's chat template, ready to be answered.

    A beginning-of-sequence token that the tokenizer adds by itself is left out, or it would come twice.

    Raises:
        CompositionError: `chat`, of a tokenizer without a chat template, or of one that changes what the user says.
    """
    if template != CHAT:
        return template
    if tokenizer.chat_template is None:
        raise CompositionError(
            "The prompt template is `chat`, and the LLM's tokenizer has no chat template.",
            remedy=f"write the template out, for example prompt_template: 'Question: {PLACEHOLDER}'",
        )
    turn = [{"role": "user", "content": PLACEHOLDER}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    if text.count(PLACEHOLDER) != 1:
        raise CompositionError(
            "The LLM's chat template does not hold the user's text exactly once.", f"it gives: {text!r}",
            remedy="write the template out in prompt_template",
        )  # fmt: skip
    bos = tokenizer.bos_token
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(bos)) if adds_bos else text
