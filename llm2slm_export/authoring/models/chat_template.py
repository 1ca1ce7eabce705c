"""The prompt template: written out, or taken from the LLM's own chat template."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

from jinja2 import Environment
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llm2slm_export.bundle.prompt_template import PLACEHOLDER, PromptTemplate
from llm2slm_export.errors import CompositionError

CHAT = "chat"

# Contents by which a chat template may show that it looks at what the user says.
_CONTENTS = (
    "Where is the station?", "a", "A", "ABC DEF", "abc def", "Title Case Here", "12345", "-1.5", "true", "x y", " ", "\n", "",
    "  two spaces  ", "\ttab\t", "\nlines\nof\n\ntext\n", "\u00a0no-break\u00a0", "\u2028line separator\u2028", "a \n b", "end.\n",
    "<b>bold</b> & \"quoted\" 'text'", "https://example.org/a?b=c", "user@example.org", "{{ braces }} {% raw %} {a}", "{prompt}",
    "[INST] text [/INST]", "<|im_end|>", "</s>", "<think>", "</think>", "<think>a</think>b", "/think", "/no_think", "<tool_call>",
    '{"name": "f"}', "[1, 2]", "Où est la gare ? Ça va.", "日本語のテキスト", "😀👍🏽", "العربية", "a\r\nb", "%s %d", "\\n",
    "word " * 40, "line\n" * 40, "x" * 300, "word " * 1000,
)  # fmt: skip
_MARK = "Zq7vKw2xPf"
_MOST_LITERALS = 60  # of a template, tried in pairs; more are tried one by one
_LONGEST_LENGTH = 20_000


def prompt_template(template: str, tokenizer: PreTrainedTokenizerFast) -> PromptTemplate:
    """The template of a recipe; `chat` becomes one user turn of the LLM's chat template, ready to be answered.

    Raises:
        CompositionError: `chat`, of a tokenizer without a chat template, or of one that fails, or of one whose ids would
            differ from those of transformers' `apply_chat_template`: it looks at what the user says, or at the clock.
    """
    if template != CHAT:
        return PromptTemplate(template)
    if tokenizer.chat_template is None:
        raise CompositionError(
            "The prompt template is `chat`, and the LLM's tokenizer has no chat template.",
            remedy=f"write the template out, for example prompt_template: 'Question: {PLACEHOLDER}'",
        )

    def rendered(content: str, **variables: Any) -> str:
        return _rendered(tokenizer, content, **variables)

    text = rendered(_MARK)
    _refuse_clock(rendered, tokenizer.get_chat_template(), text)
    if text.count(_MARK) != 1 or PLACEHOLDER in text:
        raise _refused(
            "The LLM's chat template does not hold the user's text exactly once.",
            f"it gives: {text.replace(_MARK, PLACEHOLDER)!r}",
        )
    spaced = f"\t\u2028{_MARK}\u2028\t"  # which no template has around it
    found = PromptTemplate(
        text.replace(_MARK, PLACEHOLDER), special_tokens=_adds_nothing(tokenizer), strip=spaced not in rendered(spaced)
    )
    contents = list(dict.fromkeys([*_CONTENTS, *_provoking(tokenizer.get_chat_template())]))
    for content in contents:
        if (got := rendered(content)) != (expected := found.fill(content)):
            raise _refused(
                "The LLM's chat template looks at what the user says.",
                f"of {content[:60]!r} it makes {_around(got, expected)!r}, expected {_around(expected, got)!r}",
            )
    _require_same_ids(found, tokenizer, contents)
    return found


def resolve_template(template: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """The template as text alone, which a tokenizer can be given with a prompt in the place of {prompt}.

    Raises:
        CompositionError: as `prompt_template`; or the text alone would not give the ids: the chat template strips the
            prompt, or the tokenizer adds special tokens to a text that holds them already.
    """
    found = prompt_template(template, tokenizer)
    reasons = []
    if found.strip:
        reasons.append("it strips what the user says")
    if not found.special_tokens:
        reasons.append("the tokenizer would add special tokens to it")
    if reasons:
        raise CompositionError(
            "The LLM's chat template cannot be written out as text alone.", *reasons, remedy="use prompt_template: chat"
        )
    return found.text


def tokenized(tokenizer: PreTrainedTokenizerFast, template: PromptTemplate, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of prompts in their template, as transformers' tokenizer gives them."""
    texts = [template.fill(prompt) for prompt in prompts]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=template.special_tokens).input_ids
    return ids


def _rendered(tokenizer: PreTrainedTokenizerFast, content: str, **variables: Any) -> str:
    """One user turn, by the chat template.

    Raises:
        CompositionError: the template raises, or is broken.
    """
    turn = [{"role": "user", "content": content}]
    try:
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **variables))
    except Exception as error:  # of jinja2, or whatever an expression of the template raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        line = getattr(error, "lineno", None)
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise _refused(
            "The LLM's chat template fails on a single user turn.",
            f"{kind}{reason}{f' (line {line} of the template)' if line else ''}",
        ) from error


def _refused(fact: str, evidence: str) -> CompositionError:
    return CompositionError(
        fact, evidence, remedy=f"write the template out in prompt_template, with {PLACEHOLDER} where the prompt goes"
    )


def _refuse_clock(rendered: Callable[..., str], template: str, text: str) -> None:
    """Refuse a template that gives the time or date, and one that gives something else each time."""
    again = rendered(_MARK)
    if again != text:
        raise _refused(
            "The LLM's chat template gives something else each time.",
            f"it gives {_around(text, again)!r}, then {_around(again, text)!r}",
        )
    # Both have a macro before them, which takes a line break at their beginning away.
    source = "{% macro NAME(format) %}no date{% endmacro %}" + template
    now, dated = (rendered(_MARK, chat_template=source.replace("NAME", name, 1)) for name in ("unused", "strftime_now"))
    if now != dated:
        raise _refused(
            "The LLM's chat template gives the date: a bundle would keep that of its build.",
            f"it gives {_around(now, dated)!r}",
        )


def _provoking(source: str) -> Iterator[str]:
    """Contents made of a chat template's own literals: what it may compare the user's text with, and its length."""
    tokens: list[Any] = list(Environment(autoescape=True).lexer.tokenize(source))
    literals = list(dict.fromkeys(str(token.value) for token in tokens if token.type == "string" and token.value))
    for literal in literals:
        yield from (literal, f"text {literal}", f"{literal} text", f"text {literal} text", f"text\n{literal}\ntext")
        yield from (literal.upper(), literal.lower(), f"{literal}text{literal}")
    for first, second in product(literals[:_MOST_LITERALS], repeat=2):
        yield f"{first} text {second} text"
        yield f"{first} text {second}"
    for token in tokens:
        if token.type == "integer" and 0 < token.value < _LONGEST_LENGTH:
            yield from ("x" * length for length in (token.value - 1, token.value, token.value + 1) if length)
            yield "word " * (token.value + 1)


def _adds_nothing(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer adds no special token to a text."""
    return bool(tokenizer.num_special_tokens_to_add(pair=False) == 0)


def _require_same_ids(found: PromptTemplate, tokenizer: PreTrainedTokenizerFast, contents: Sequence[str]) -> None:
    """Refuse a template whose ids, as a bundle's tokenizer gives them, are not transformers'."""
    backend: Any = tokenizer.backend_tokenizer
    own = Tokenizer.from_str(backend.to_str())
    own.no_padding()
    own.no_truncation()
    for content in contents:
        turn = [{"role": "user", "content": content}]
        given = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)
        expected = [int(id) for id in given]
        ids = own.encode(found.fill(content), add_special_tokens=found.special_tokens).ids
        if ids != expected:
            raise _refused(
                "The LLM's tokenizer.json does not give the ids of transformers' apply_chat_template.",
                f"of {content[:60]!r}: expected {expected[:12]}, got {ids[:12]}",
            )


def _around(text: str, other: str) -> str:
    """The part of a text where it begins to differ from another."""
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return text[max(0, at - 20) : at + 40]
