"""
Checkpoints with random weights: for reference.py, and for serving a model of true size where there is none to download.

    python3 scripts/model-reference/checkpoint.py --out DIR [--tokenizer models/demo] [--shape llama-8b|small]

Needs torch, transformers >= 5 and, for the large one, a GPU to draw weights on and 16 GB of disk. Writes DIR/llama-8b, or with --shape small
one small model of each architecture (DIR/llama, DIR/qwen3 ...). --tokenizer puts that checkpoint's tokenizer into each, padded to the
model's vocabulary: pd-worker --model DIR/llama-8b serves it. No token ends a text, so answers have the length asked for.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from padded_tokenizer import write_tokenizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

SHAPE = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, vocab_size=2048, max_position_embeddings=2048, rms_norm_eps=1e-5)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 256}
SMALL = {
    "llama": (LlamaConfig(**SHAPE, num_attention_heads=8, num_key_value_heads=2, head_dim=64, rope_parameters=LLAMA3), torch.bfloat16),
    "llama-f16": (LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=4, head_dim=128), torch.float16),
    "mistral": (MistralConfig(**SHAPE, num_attention_heads=8, num_key_value_heads=1, head_dim=128, sliding_window=None), torch.bfloat16),
    "qwen2": (Qwen2Config(**SHAPE, num_attention_heads=14, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True), torch.bfloat16),
    "qwen3": (Qwen3Config(**SHAPE, num_attention_heads=10, num_key_value_heads=2, head_dim=128), torch.bfloat16),
}
LARGE = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                    vocab_size=128256, max_position_embeddings=16384, rms_norm_eps=1e-5,
                    rope_parameters={"rope_type": "default", "rope_theta": 500000.0})

SHARD_BYTES = 2e9
# Files are written while later weights are drawn, so many at a time.
WRITERS = 4


def write_checkpoint(config, dtype: torch.dtype, path: Path, tokenizer: Path | None = None) -> None:
    """Normal weights of variance 1 / inputs, so that activations keep their size; norms about 1, biases that matter."""
    path.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.eos_token_id = None
    if tokenizer is not None:
        config.bos_token_id = json.loads((tokenizer / "config.json").read_text()).get("bos_token_id")
        write_tokenizer(tokenizer, path, config.vocab_size)
    config.save_pretrained(path)

    shards = shards_of(model.named_parameters(), dtype.itemsize)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(1)
    with ThreadPoolExecutor(WRITERS) as writers:
        writing = []
        for name, shard in zip(names, shards):
            values = {key: draw(key, shape, generator).to(dtype).cpu() for key, shape in shard.items()}
            writing.append(writers.submit(save_file, values, path / name, metadata={"format": "pt"}))
        for written in writing:
            written.result()
    index = {"metadata": {}, "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def shards_of(parameters, bytes_each: int) -> list[dict[str, torch.Size]]:
    """Names and shapes, file by file."""
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, parameter in parameters:
        if size > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = parameter.shape
        size += parameter.numel() * bytes_each
    return shards


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    value = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    if len(shape) > 1:
        return value.mul_(shape[-1] ** -0.5)
    if "norm" in name:
        return 1 + 0.2 * value
    return value.mul_(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--shape", choices=["llama-8b", "small"], default="llama-8b")
    options = parser.parse_args()
    for name, (config, dtype) in ({"llama-8b": (LARGE, torch.bfloat16)} if options.shape == "llama-8b" else SMALL).items():
        began = time.perf_counter()
        write_checkpoint(config, dtype, options.out / name, options.tokenizer)
        print(f"{options.out / name} written in {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
