"""The text around a prompt, and how the two are tokenized together. Compositions and bundles hold one."""

from dataclasses import dataclass

PLACEHOLDER = "{prompt}"


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt template.

    Args:
        text: holds {prompt} exactly once.
        special_tokens: whether the tokenizer adds its special tokens to the filled template; False: the template holds
            all of them, as chat templates do.
        strip: whether the prompt loses the whitespace around it.
    """

    text: str = PLACEHOLDER
    special_tokens: bool = True
    strip: bool = False

    @property
    def around(self) -> tuple[str, str]:
        """The text before the prompt, and the text behind it."""
        before, _, behind = self.text.partition(PLACEHOLDER)
        return before, behind

    def fill(self, prompt: str) -> str:
        """The text that is tokenized."""
        # Not str.format: a template may hold other braces.
        return self.text.replace(PLACEHOLDER, prompt.strip() if self.strip else prompt)
