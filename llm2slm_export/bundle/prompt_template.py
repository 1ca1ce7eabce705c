"""The prompt template of a composition or bundle, and its tokenization."""

from dataclasses import dataclass

PLACEHOLDER = "{prompt}"


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt template.

    Args:
        text: the template, with {prompt} exactly once.
        special_tokens: whether the tokenizer adds its special tokens to the filled template; False: the template contains
            all of them, like a chat template.
        strip: whether whitespace around the prompt is removed.
    """

    text: str = PLACEHOLDER
    special_tokens: bool = True
    strip: bool = False

    @property
    def around(self) -> tuple[str, str]:
        """The text before the prompt and the text after it."""
        before, _, behind = self.text.partition(PLACEHOLDER)
        return before, behind

    def fill(self, prompt: str) -> str:
        """The template with the prompt filled in: the text to tokenize."""
        # Not str.format: a template may contain other braces.
        return self.text.replace(PLACEHOLDER, prompt.strip() if self.strip else prompt)
