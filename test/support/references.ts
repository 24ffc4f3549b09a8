/** What transformers computed, in float32, when the fixtures were written (scripts/demo-model/train.py). */
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const FIXTURES = new URL('../fixtures/', import.meta.url);

export interface DemoReference {
  readonly tokenization: readonly {
    readonly text: string;
    readonly ids: number[];
    readonly plain: number[];
    readonly decoded: string;
  }[];
  readonly chats: readonly {
    readonly messages: readonly { readonly role: string; readonly content: string }[];
    readonly rendered: string;
    readonly ids: number[];
    readonly greedy: number[];
  }[];
  readonly completions: readonly {
    readonly prompt: string;
    readonly ids: number[];
    readonly greedy: number[];
    readonly text: string;
    /** Of the last prompt token. */
    readonly logits?: readonly number[];
  }[];
  /** Five highest logits after every `every` tokens. */
  readonly long: {
    readonly ids: number[];
    readonly every: number;
    readonly top: readonly { readonly ids: number[]; readonly logits: number[] }[];
  };
}

export interface TinyReference {
  readonly ids: number[];
  readonly every: number;
  /** All logits after every `every` tokens. */
  readonly logits: readonly (readonly number[])[];
  readonly greedy: number[];
}

function read(name: string): unknown {
  return JSON.parse(readFileSync(new URL(name, FIXTURES), 'utf8'));
}

export function demoReference(): DemoReference {
  return read('demo-reference.json') as DemoReference;
}

/** Random weights, Llama 3 RoPE scaling far past the original context, grouped heads, untied head, bfloat16. */
export const TINY_LLAMA3_DIR = fileURLToPath(new URL('tiny-llama3', FIXTURES));

export function tinyLlama3Reference(): TinyReference {
  return read('tiny-llama3/reference.json') as TinyReference;
}
