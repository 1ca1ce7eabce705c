"""Requests of many kinds: prompts of different lengths, each with its own options and seed."""

import random
from typing import Any

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "my", "father", "made", "me", "lunch", "in", "our", "garden"]


def mixed_requests(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Prompts of 1 to 12 words, each with its own options and seed."""
    chance = random.Random(5)
    requests = []
    for number in range(count):
        options: dict[str, Any] = {"max_new_tokens": chance.randint(1, 24)}
        match number % 6:
            case 1:
                options |= {"do_sample": True, "seed": number, "temperature": 1.3}
            case 2:
                options |= {"do_sample": True, "seed": number, "num_return_sequences": 3, "top_k": 12}
            case 3:
                options |= {"num_beams": 3, "num_return_sequences": 2}
            case 4:
                options |= {"no_repeat_ngram_size": 2, "repetition_penalty": 1.4}
            case 5:
                options |= {"min_new_tokens": options["max_new_tokens"], "output_scores": True}
        requests.append((" ".join(chance.choices(WORDS, k=chance.randint(1, 12))), options))
    return requests
