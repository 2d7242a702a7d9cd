"""The words that a shipped pipeline was trained with; other words give no sensible image."""

import difflib
import json
import os
import re

from xfuser.config.args import SHIPPED_PIPELINE, shipped_folder


def known_words(folder: str = SHIPPED_PIPELINE) -> list[str]:
    """The complete words in the vocabulary of a pipeline's tokenizer, sorted."""
    with open(os.path.join(folder, "tokenizer", "tokenizer.json"), encoding="utf-8") as file:
        vocabulary = json.load(file)["model"]["vocab"]
    return sorted(word for word in vocabulary if not word.startswith("<"))


def check_words(folder: str, *prompts: str | list[str]) -> None:
    """Raise a ValueError that names the nearest known words if a prompt for a shipped pipeline has an unknown one.

    Other pipelines take any text.
    """
    if not shipped_folder(folder):
        return
    known = known_words(folder)
    texts = [text for given in prompts for text in ([given] if isinstance(given, str) else given)]
    words = dict.fromkeys(re.findall(r"\w+", " ".join(texts).lower()))
    unknown = [_with_nearest(word, known) for word in words if word not in known]
    if unknown:
        raise ValueError(
            f"the shipped pipeline does not know the word{'s' * (len(unknown) > 1)} {', '.join(unknown)}:"
            " xdit --help lists all known words; --model selects other pipelines"
        )


def _with_nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, cutoff=0.55)
    return f"{word!r} (near it: {', '.join(near)})" if near else repr(word)
