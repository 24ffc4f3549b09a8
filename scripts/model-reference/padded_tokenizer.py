"""
A tokenizer for a checkpoint whose vocabulary is larger: further entries, so that every id a model of random weights picks has a text of
its own. They stand behind no merge, and the demo model's tokenizer splits digits one by one, so texts are encoded as before.
"""

import json
import shutil
from pathlib import Path


def write_tokenizer(source: Path, target: Path, vocab_size: int) -> None:
    """`source`: a checkpoint with a byte-level BPE tokenizer, as models/demo. Its chat template comes along."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    pad(tokenizer, vocab_size, source)
    (target / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("model_max_length", None)  # the other model's
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    template = source / "chat_template.jinja"
    if template.exists():
        shutil.copy(template, target)


def pad(tokenizer: dict, vocab_size: int, source: Path) -> None:
    model = tokenizer["model"]
    if model["type"] != "BPE" or tokenizer["decoder"]["type"] != "ByteLevel":
        raise SystemExit(f"{source}: only a byte-level BPE tokenizer can be padded")
    vocab = model["vocab"]
    used = set(vocab.values()) | {token["id"] for token in tokenizer["added_tokens"]}
    if max(used) >= vocab_size:
        raise SystemExit(f"{source}: its tokenizer has ids up to {max(used)}, the model a vocabulary of {vocab_size}")
    for id in range(vocab_size):
        if id not in used and vocab.setdefault(f"Ġpad{id}", id) != id:
            raise SystemExit(f"{source}: its tokenizer has a token Ġpad{id} already")
