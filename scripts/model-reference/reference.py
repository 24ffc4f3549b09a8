"""
Checkpoints with random weights, and what transformers computes from them: the measure for bench/gpu/model.ts.

    python3 scripts/model-reference/reference.py --out DIR [--large]

Needs torch, transformers >= 5 and a GPU. Writes DIR/NAME (a checkpoint with reference.json and reference.bin) for one small model of
each architecture, and with --large an 8B-shaped Llama with times of transformers on this GPU. reference.bin: float32 logits
[positions, vocab] of a float32 run, teacher-forced; reference.json: tokens, positions, and the error of transformers' own 16-bit run.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import torch
from checkpoint import LARGE, SMALL, write_checkpoint
from transformers import AutoModelForCausalLM

DECODE_STEPS = 32
PREFIXES = 8


def load(path: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to("cuda").eval()


@torch.inference_mode()
def stepwise(model, ids: torch.Tensor, prompt: int, positions: list[int]) -> torch.Tensor:
    """Prefill, then one token at a time, as a server computes."""
    out = model(ids[None, :prompt], use_cache=True)
    rows = [out.logits[0, position].float() for position in positions if position < prompt]
    for at in range(prompt, len(ids)):
        out = model(ids[None, at:at + 1], past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1].float())
    return torch.stack(rows)


@torch.inference_mode()
def write_reference(path: Path, dtype: torch.dtype, prompt: int) -> dict:
    generator = torch.Generator().manual_seed(2)
    exact = load(path, torch.float32)
    ids = torch.randint(0, exact.config.vocab_size, (prompt + DECODE_STEPS,), generator=generator).cuda()
    positions = [prompt * (i + 1) // PREFIXES - 1 for i in range(PREFIXES)] + list(range(prompt, prompt + DECODE_STEPS))
    reference = exact(ids[None], use_cache=False).logits[0, positions].float()
    del exact
    gc.collect()
    torch.cuda.empty_cache()
    short = load(path, dtype)
    errors = (stepwise(short, ids, prompt, positions) - reference).norm(dim=-1)
    (path / "reference.bin").write_bytes(reference.cpu().numpy().tobytes())
    summary = {"ids": ids.tolist(), "prompt": prompt, "positions": positions, "norm": reference.norm(dim=-1).mean().item(),
               "error": errors.mean().item()}
    (path / "reference.json").write_text(json.dumps(summary))
    print(f"{path.name}: norm {summary['norm']:.2f}, transformers in {dtype} off by {summary['error']:.4f}", flush=True)
    return {"model": short, "ids": ids}


def timed(run, repeat: int) -> float:
    """Median seconds."""
    times = []
    for _ in range(repeat):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


@torch.inference_mode()
def times_of(model) -> dict:
    result = {"prefill": {}, "decode": {}}
    for tokens in (512, 2048, 8192):
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda")
        run = lambda: model(ids, use_cache=True, logits_to_keep=1)
        run()
        result["prefill"][tokens] = 1e3 * timed(run, 5)
    for batch in (1, 16):
        ids = torch.randint(0, model.config.vocab_size, (batch, 512), device="cuda")
        state = model(ids, use_cache=True, logits_to_keep=1)
        token = state.logits[:, -1].argmax(-1, keepdim=True)

        def step():
            nonlocal state, token
            state = model(token, past_key_values=state.past_key_values, use_cache=True)
            token = state.logits[:, -1].argmax(-1, keepdim=True)

        step()
        result["decode"][batch] = 1e3 * timed(step, 24)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for name, (config, dtype) in SMALL.items():
        write_checkpoint(config, dtype, options.out / name)
        write_reference(options.out / name, dtype, 448)
    if not options.large:
        return
    path = options.out / "llama-8b"
    began = time.perf_counter()
    write_checkpoint(LARGE, torch.bfloat16, path)
    print(f"8B checkpoint written in {time.perf_counter() - began:.0f} s", flush=True)
    model = write_reference(path, torch.bfloat16, 512)["model"]
    times = times_of(model)
    (path / "times.json").write_text(json.dumps(times))
    print(f"transformers: {json.dumps(times)} after {time.perf_counter() - began:.0f} s", flush=True)


main()
