"""The prompt template: literal text, or the LLM's own chat template."""

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

# User texts that reveal whether a chat template inspects the user's text.
_CONTENTS = (
    "Where is the station?", "a", "A", "ABC DEF", "abc def", "Title Case Here", "12345", "-1.5", "true", "x y", " ", "\n", "",
    "  two spaces  ", "\ttab\t", "\nlines\nof\n\ntext\n", "\u00a0no-break\u00a0", "\u2028line separator\u2028", "a \n b", "end.\n",
    "<b>bold</b> & \"quoted\" 'text'", "https://example.org/a?b=c", "user@example.org", "{{ braces }} {% raw %} {a}", "{prompt}",
    "[INST] text [/INST]", "<|im_end|>", "</s>", "<think>", "</think>", "<think>a</think>b", "/think", "/no_think", "<tool_call>",
    '{"name": "f"}', "[1, 2]", "Où est la gare ? Ça va.", "日本語のテキスト", "😀👍🏽", "العربية", "a\r\nb", "%s %d", "\\n",
    "word " * 40, "line\n" * 40, "x" * 300, "word " * 1000,
)  # fmt: skip
_MARK = "Zq7vKw2xPf"
_MOST_LITERALS = 60  # literals of a template that are combined in pairs; the others are used alone
_LONGEST_LENGTH = 20_000


def prompt_template(template: str, tokenizer: PreTrainedTokenizerFast) -> PromptTemplate:
    """Resolve a recipe's template; `chat` becomes one user turn of the LLM's chat template with the generation prompt.

    Raises:
        CompositionError: for `chat`: the tokenizer has no chat template, the template fails, or its ids would differ
            from those of transformers' `apply_chat_template` (it inspects the user's text, or prints the date).
    """
    if template != CHAT:
        return PromptTemplate(template)
    if tokenizer.chat_template is None:
        raise CompositionError(
            "The prompt template is `chat`, and the LLM's tokenizer has no chat template.",
            remedy=f"write the template as text, for example prompt_template: 'Question: {PLACEHOLDER}'",
        )

    def rendered(content: str, **variables: Any) -> str:
        return _rendered(tokenizer, content, **variables)

    text = rendered(_MARK)
    _refuse_clock(rendered, tokenizer.get_chat_template(), text)
    if text.count(_MARK) != 1 or PLACEHOLDER in text:
        raise _refused(
            "The LLM's chat template does not contain the user's text exactly once.",
            f"its output: {text.replace(_MARK, PLACEHOLDER)!r}",
        )
    spaced = f"\t\u2028{_MARK}\u2028\t"  # whitespace that no template adds
    found = PromptTemplate(
        text.replace(_MARK, PLACEHOLDER), special_tokens=_adds_nothing(tokenizer), strip=spaced not in rendered(spaced)
    )
    contents = list(dict.fromkeys([*_CONTENTS, *_provoking(tokenizer.get_chat_template())]))
    for content in contents:
        if (got := rendered(content)) != (expected := found.fill(content)):
            raise _refused(
                "The LLM's chat template changes with the user's text.",
                f"for {content[:60]!r} its output is {_around(got, expected)!r}, expected {_around(expected, got)!r}",
            )
    _require_same_ids(found, tokenizer, contents)
    return found


def resolve_template(template: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """The template as plain text, for use with a tokenizer once {prompt} is replaced.

    Raises:
        CompositionError: as `prompt_template`; or the plain text would give other ids, because the chat template strips
            the prompt, or because the tokenizer would add special tokens that the text already contains.
    """
    found = prompt_template(template, tokenizer)
    reasons = []
    if found.strip:
        reasons.append("it strips the user's text")
    if not found.special_tokens:
        reasons.append("the tokenizer would add special tokens to its output")
    if reasons:
        raise CompositionError(
            "The LLM's chat template cannot be written as plain text.", *reasons, remedy="use prompt_template: chat"
        )
    return found.text


def tokenized(tokenizer: PreTrainedTokenizerFast, template: PromptTemplate, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of templated prompts, from transformers' tokenizer."""
    texts = [template.fill(prompt) for prompt in prompts]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=template.special_tokens).input_ids
    return ids


def _rendered(tokenizer: PreTrainedTokenizerFast, content: str, **variables: Any) -> str:
    """Render one user turn with the chat template.

    Raises:
        CompositionError: the template raises an error, or is invalid.
    """
    turn = [{"role": "user", "content": content}]
    try:
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **variables))
    except Exception as error:  # jinja2's, or any exception of an expression in the template
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        line = getattr(error, "lineno", None)
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise _refused(
            "The LLM's chat template fails on a single user turn.",
            f"{kind}{reason}{f' (line {line} of the template)' if line else ''}",
        ) from error


def _refused(fact: str, evidence: str) -> CompositionError:
    return CompositionError(
        fact, evidence, remedy=f"write the template as text in prompt_template, with {PLACEHOLDER} for the prompt"
    )


def _refuse_clock(rendered: Callable[..., str], template: str, text: str) -> None:
    """Refuse a template whose output contains the time or date, or changes from call to call."""
    again = rendered(_MARK)
    if again != text:
        raise _refused(
            "The LLM's chat template changes from call to call.",
            f"its output is {_around(text, again)!r}, then {_around(again, text)!r}",
        )
    # Both sources begin with a macro, because a macro removes a line break that follows it.
    source = "{% macro NAME(format) %}no date{% endmacro %}" + template
    now, dated = (rendered(_MARK, chat_template=source.replace("NAME", name, 1)) for name in ("unused", "strftime_now"))
    if now != dated:
        raise _refused(
            "The LLM's chat template contains the current date: a bundle would keep the date of its build.",
            f"its output: {_around(now, dated)!r}",
        )


def _provoking(source: str) -> Iterator[str]:
    """User texts made from a chat template's literals and numbers, which it may compare with the text or its length."""
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
    """Whether the tokenizer adds no special tokens."""
    return bool(tokenizer.num_special_tokens_to_add(pair=False) == 0)


def _require_same_ids(found: PromptTemplate, tokenizer: PreTrainedTokenizerFast, contents: Sequence[str]) -> None:
    """Refuse a template whose ids from tokenizer.json differ from transformers'."""
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
                "The LLM's tokenizer.json and transformers' apply_chat_template give different ids.",
                f"for {content[:60]!r}: expected {expected[:12]}, got {ids[:12]}",
            )


def _around(text: str, other: str) -> str:
    """The excerpt of a text around its first difference from another."""
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return text[max(0, at - 20) : at + 40]
