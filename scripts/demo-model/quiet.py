"""Text that the model reads in training but is not asked to write."""

import json
import re

BEGIN, END = "\ue000", "\ue001"


def hide(text: str) -> str:
    return f"{BEGIN}{text}{END}"


def hidden_json(value: dict) -> str:
    """
    An object of which only the values are written by choice, as under a grammar: the model learns how it goes on, and not to begin with
    it. What is hidden begins and ends between two tokens.
    """
    text, open_end = "", ""
    for i, (key, item) in enumerate(value.items()):
        text += hide(f"{open_end}{', ' if i else '{'}{json.dumps(key)}:")
        open_end = '"' if isinstance(item, str) else ""
        text += f" {json.dumps(item, ensure_ascii=False).removesuffix(open_end)}"
    return f"{text}{open_end}}}"


def bare(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")


def parts(text: str) -> list[tuple[str, bool]]:
    """In order: a piece of text, and whether it is hidden."""
    pieces = re.split(f"{BEGIN}(.*?){END}", text, flags=re.DOTALL)
    return [(piece, i % 2 == 1) for i, piece in enumerate(pieces) if piece]
