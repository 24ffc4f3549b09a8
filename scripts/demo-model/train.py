"""
Trains the demo model (models/demo), checks what it was taught, and writes reference fixtures from transformers (test/fixtures).

    python3 scripts/demo-model/train.py --out DIR [--steps 9000]

Needs torch, transformers >= 5, tokenizers and jinja2; models/demo/README.md says how long it took on which GPU. Writes DIR/demo (the
checkpoint), DIR/tiny-llama3 (random weights, Llama-3 RoPE scaling, grouped heads, untied head), DIR/*.json (token ids, text and logits
that the TypeScript tokenizer and model are tested against) and DIR/check.json. Text, tokenizer and first weights
are seeded; the gradient of attention is not summed in a fixed order, so the trained weights differ in their last bits and beyond.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import re
import time
from pathlib import Path

# Before torch is loaded: cuBLAS takes a fixed workspace, and so a fixed order of sums.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import check
import corpus

VOCAB = 2048
CONTEXT = 2048
# Words with the character before them, single digits, runs of punctuation, line ends, other spaces.
PIECES = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_text(args: tuple[int, int]) -> list[corpus.Document]:
    return corpus.documents(*args)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    # Words of the text only: no merge is spent on what is a token by itself.
    own = re.compile("|".join(re.escape(token) for token in corpus.SPECIAL_TOKENS + corpus.TOOL_TOKENS))
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - len(corpus.TOOL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=[AddedToken(t, special=True, normalized=False) for t in corpus.SPECIAL_TOKENS])
    tokenizer.train_from_iterator((piece for text in texts for piece in own.split(text) if piece), trainer)
    # Behind the others and not special, as those of Hermes and Qwen: decoding without special tokens keeps them.
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in corpus.TOOL_TOKENS])
    bos = tokenizer.token_to_id(corpus.BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{corpus.BOS} $A", pair=f"{corpus.BOS} $A $B",
                                                             special_tokens=[(corpus.BOS, bos)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=corpus.BOS, eos_token=corpus.EOS, pad_token=corpus.PAD,
                                   model_max_length=CONTEXT, clean_up_tokenization_spaces=False)
    fast.chat_template = corpus.CHAT_TEMPLATE
    return fast


def config_of(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
                       rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True,
                       bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                       attention_bias=False, mlp_bias=False)


class Text:
    """All documents as one row of tokens: where each begins, and how much the loss of each token counts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, documents: list[corpus.Document], device: str):
        backend = tokenizer.backend_tokenizer
        pieces = [text for document in documents for text, _ in document]
        encoded = [numpy.array(e.ids, dtype=numpy.int32) for e in backend.encode_batch_fast(pieces, add_special_tokens=False)]
        lengths = numpy.array([len(ids) for ids in encoded])
        weights = numpy.array([weight for document in documents for _, weight in document], dtype=numpy.float32)
        firsts = numpy.cumsum([0] + [len(document) for document in documents])[:-1]
        starts = numpy.concatenate([[0], numpy.cumsum(lengths)])[firsts]
        self.tokens = torch.from_numpy(numpy.concatenate(encoded)).to(device).long()
        self.weights = torch.from_numpy(numpy.repeat(weights, lengths)).to(device)
        self.starts = torch.from_numpy(starts[starts < len(self.tokens) - CONTEXT]).to(device)
        for document in documents[:500]:
            joined = backend.encode(corpus.text_of(document), add_special_tokens=False).ids
            apart = [id for text, _ in document for id in backend.encode(text, add_special_tokens=False).ids]
            if joined != apart:
                raise SystemExit(f"pieces end within a token: {document}")

    def rows(self, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows that begin where a document does, as a prompt begins."""
        at = self.starts[torch.randint(0, len(self.starts), (count,), device=self.tokens.device)]
        index = at[:, None] + torch.arange(length, device=self.tokens.device)
        return self.tokens[index], self.weights[index]


def train(model: LlamaForCausalLM, text: Text, steps: int) -> None:
    """Next-token prediction: short windows first, whole contexts in the last fifth."""
    peak, cuda = 3e-3, text.tokens.is_cuda
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=peak,
                                  betas=(0.9, 0.98), fused=cuda)

    def loss_of(window: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            logits = model(input_ids=window, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), window[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        return (losses * weight).sum() / weight.sum()

    compiled = torch.compile(loss_of, dynamic=False) if cuda else loss_of
    started = time.monotonic()
    for step in range(steps):
        progress = step / steps
        rate = peak * min(1.0, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = compiled(*text.rows(*((48, 1024) if progress < 0.8 else (24, CONTEXT))))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 500 == 0:
            print(f"step {step} at {time.monotonic() - started:.0f} s, loss {loss.item():.3f}", flush=True)
    print(f"{steps} steps in {time.monotonic() - started:.0f} s, last loss {loss.item():.3f}", flush=True)


def rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{v:.6g}") for v in values.tolist()]


def greedy(model: LlamaForCausalLM, ids: list[int], count: int) -> list[int]:
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0].tolist()
    return out[len(ids):]


def demo_reference(folder: Path) -> dict:
    """What transformers computes, in float32 on the CPU, from the checkpoint as saved."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = ["Hello world", " leading and  double  spaces ", "tabs\tand\n\nlines\r\n", "naïve café, São Tomé", "👋🙂 こんにちは Γειά", "a\u0301 ﬁ ½ ²",
             "x = y**2 != 3.14159", "<|user|>Hi<|eot|>", "It's we'll they've", "", "👨‍👩‍👧‍👦🏳️‍🌈", "0123456789 12,345.67"]
    tokenization = [{"text": t, "ids": tokenizer(t)["input_ids"], "plain": tokenizer(t, add_special_tokens=False)["input_ids"],
                     "decoded": tokenizer.decode(tokenizer(t)["input_ids"], skip_special_tokens=True)} for t in texts]
    chats = []
    for messages in [[{"role": "user", "content": "What is the capital of France?"}],
                     [{"role": "system", "content": "You are a small demo model."}, {"role": "user", "content": "Who are you?"}],
                     [{"role": "user", "content": "Hello"}],
                     [{"role": "user", "content": "Say hello with an emoji"}],
                     [{"role": "user", "content": "Tell me a story about a fox."}],
                     [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "3 + 4 = 7."},
                      {"role": "user", "content": " What is prefill? "}]]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = greedy(model, ids, 40)
        chats.append({"messages": messages, "rendered": text, "ids": ids, "greedy": answer})
        print(repr(messages[-1]["content"]), "->", repr(tokenizer.decode(answer)))
    completions = []
    for prompt, count in [(corpus.RUNBOOK["hello"], 10), (corpus.RUNBOOK["capital"], 8), (corpus.RUNBOOK["fibonacci"], 12),
                          (corpus.RUNBOOK["dragon"], 20), ("The capital of Norway is", 30), ("random token 17 block of and test", 60),
                          ("x", 150), ("Prefill and decode", 40), ("7 + 8 =", 12), ("The weather today is", 30)]:
        ids = tokenizer(prompt)["input_ids"]
        answer = greedy(model, ids, count)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        keep = len(completions) < 4
        completions.append({"prompt": prompt, "ids": ids, "greedy": answer, "text": tokenizer.decode(answer, skip_special_tokens=True),
                            **({"logits": rounded(logits)} if keep else {})})
        print(repr(prompt), len(ids), "->", repr(tokenizer.decode(answer)), len(answer))
    long = tokenizer(" ".join(corpus.text_of(document) for document in corpus.documents(99, 40)), add_special_tokens=False)["input_ids"][:1500]
    with torch.no_grad():
        logits = model(torch.tensor([long])).logits[0]
    value, index = logits[99::100].topk(5)
    print("greedy after a long prompt:", repr(tokenizer.decode(greedy(model, long, 40))))
    return {"tokenization": tokenization, "chats": chats, "completions": completions,
            "long": {"ids": long, "every": 100, "top": [{"ids": i.tolist(), "logits": rounded(v)} for v, i in zip(value, index)]}}


def tiny_llama3(folder: Path) -> dict:
    """Random weights; head_dim is not hidden / heads, and positions run far past the original context so that the scaling shows."""
    torch.manual_seed(7)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=16, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=False,
                         rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                          "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
                         initializer_range=0.3, bos_token_id=0, eos_token_id=[1, 2])
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.rand_like(weight) + 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 64, (1, 200), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(ids).logits[0]
    return {"ids": ids[0].tolist(), "every": 20, "logits": [rounded(row) for row in logits[19::20]], "greedy": greedy(model, ids[0].tolist(), 20)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9_000)
    parser.add_argument("--documents", type=int, default=320_000)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    # As far as it goes: there is no such attention for these types.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(torch.cuda.get_device_name() if device == "cuda" else "no GPU", "torch", torch.__version__, flush=True)
    clock = time.monotonic()
    with multiprocessing.Pool() as pool:
        shards = pool.map(write_text, [(seed, args.documents // 32) for seed in range(32)])
    documents = [document for shard in shards for document in shard]
    tokenizer = make_tokenizer([corpus.text_of(document) for document in documents[:20_000]])
    text = Text(tokenizer, documents, device)
    print(f"{len(documents)} documents, {len(text.tokens)} tokens, vocabulary {len(tokenizer)}, {time.monotonic() - clock:.0f} s", flush=True)

    model = LlamaForCausalLM(config_of(tokenizer)).to(device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    train(model, text, args.steps)
    model = model.to(torch.bfloat16).cpu()
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in (corpus.EOS, corpus.EOT)]
    folder = args.out / "demo"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print("weights", hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
    (args.out / "check.json").write_text(json.dumps(check.report(folder, device), ensure_ascii=False, indent=1))

    fixtures = {"demo-reference.json": demo_reference(folder), "tiny-llama3/reference.json": tiny_llama3(args.out / "tiny-llama3")}
    for name, content in fixtures.items():
        (args.out / name).write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
