"""
Trains the demo model (models/demo) and writes reference fixtures from transformers (test/fixtures).

    python3 scripts/demo-model/train.py --out DIR [--seconds 150]

Needs torch, transformers >= 5 and tokenizers, and takes about three minutes on one GPU. Writes DIR/demo (the checkpoint),
DIR/tiny-llama3 (random weights, Llama-3 RoPE scaling, grouped heads, untied head) and DIR/*.json (token ids, text and logits that
the TypeScript tokenizer and model are tested against).
"""

import argparse
import json
import math
import multiprocessing
import time
from pathlib import Path

import numpy
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import corpus

VOCAB = 2048
CONTEXT = 2048
# Words with the character before them, single digits, runs of punctuation, line ends, other spaces.
PIECES = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_text(args: tuple[int, int]) -> list[str]:
    return corpus.documents(*args)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=[AddedToken(t, special=True, normalized=False) for t in corpus.SPECIAL_TOKENS])
    tokenizer.train_from_iterator(texts, trainer)
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


def train(model: LlamaForCausalLM, tokens: torch.Tensor, seconds: float) -> None:
    """Next-token prediction on random windows: short ones first, whole contexts in the last third. The clock sets the schedule."""
    peak = 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05, fused=tokens.is_cuda)
    started, step = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / seconds) < 1:
        length, rows = (512, 96) if progress < 0.67 else (CONTEXT, 24)
        at = torch.randint(0, len(tokens) - length, (rows,), device=tokens.device)
        window = tokens[at[:, None] + torch.arange(length, device=tokens.device)]
        rate = peak * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            logits = model(input_ids=window, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step} at {time.monotonic() - started:.0f} s, context {length}, loss {loss.item():.3f}", flush=True)
        step += 1
    print(f"{step} steps, last loss {loss.item():.3f}")


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
    long = tokenizer(" ".join(corpus.documents(99, 40)), add_special_tokens=False)["input_ids"][:1500]
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
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--documents", type=int, default=160_000)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.monotonic()
    with multiprocessing.Pool() as pool:
        shards = pool.map(write_text, [(seed, args.documents // 32) for seed in range(32)])
    texts = [text for shard in shards for text in shard]
    tokenizer = make_tokenizer(texts[:20_000])
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    tokens = torch.from_numpy(numpy.concatenate([numpy.array(e.ids, dtype=numpy.int32) for e in encoded])).to(device).long()
    print(f"{len(texts)} documents, {len(tokens)} tokens, vocabulary {len(tokenizer)}, {time.monotonic() - clock:.0f} s", flush=True)

    model = LlamaForCausalLM(config_of(tokenizer)).to(device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    train(model, tokens, args.seconds)
    model = model.to(torch.bfloat16).cpu()
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in (corpus.EOS, corpus.EOT)]
    folder = args.out / "demo"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    fixtures = {"demo-reference.json": demo_reference(folder), "tiny-llama3/reference.json": tiny_llama3(args.out / "tiny-llama3")}
    for name, content in fixtures.items():
        (args.out / name).write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
