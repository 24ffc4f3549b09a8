/** Rotary position embedding as a checkpoint declares it, and the frequencies that follow. */

import { PdError } from '../errors.ts';
import { z } from '../zod.ts';
import { checked, invalid } from './checked.ts';

export type RopeScaling =
  | { readonly kind: 'none' }
  /** Positions divided by `factor`. */
  | { readonly kind: 'linear'; readonly factor: number }
  /** Llama 3.1: long wavelengths divided by `factor`, short ones kept, those between blended. */
  | {
      readonly kind: 'llama3';
      readonly factor: number;
      readonly lowFreqFactor: number;
      readonly highFreqFactor: number;
      /** Tokens of context before the scaling. */
      readonly originalMaxPositions: number;
    };

export interface RopeConfig {
  readonly theta: number;
  readonly scaling: RopeScaling;
}

const linearSchema = z.looseObject({ factor: z.number().positive() });
const llama3Schema = z.looseObject({
  factor: z.number().positive(),
  low_freq_factor: z.number().positive(),
  high_freq_factor: z.number().positive(),
  original_max_position_embeddings: z.number().int().positive(),
});

interface RopeJson {
  readonly rope_theta?: number | null | undefined;
  readonly rope_scaling?: Record<string, unknown> | null | undefined;
  readonly rope_parameters?: Record<string, unknown> | null | undefined;
}

/** Until transformers 4 `rope_theta` and `rope_scaling` (with `type` or `rope_type`), from 5 on `rope_parameters` with both. */
export function readRope(json: RopeJson, where: string): RopeConfig {
  const parameters = json.rope_parameters ?? json.rope_scaling ?? {};
  const theta = z
    .number()
    .positive()
    .safeParse(parameters['rope_theta'] ?? json.rope_theta ?? 10_000);
  if (!theta.success) throw invalid(`${where}: rope_theta is not a positive number`);
  const type = parameters['rope_type'] ?? parameters['type'] ?? 'default';
  return { theta: theta.data, scaling: readScaling(type, parameters, where) };
}

function readScaling(type: unknown, parameters: Record<string, unknown>, file: string): RopeScaling {
  const where = `${file}, RoPE scaling`;
  switch (type) {
    case 'default':
      return { kind: 'none' };
    case 'linear':
      return { kind: 'linear', factor: checked(linearSchema, parameters, where).factor };
    case 'llama3': {
      const fields = checked(llama3Schema, parameters, where);
      return {
        kind: 'llama3',
        factor: fields.factor,
        lowFreqFactor: fields.low_freq_factor,
        highFreqFactor: fields.high_freq_factor,
        originalMaxPositions: fields.original_max_position_embeddings,
      };
    }
    default:
      throw new PdError(
        'MODEL_UNSUPPORTED',
        `${file}: RoPE type ${JSON.stringify(type)} is not supported (only default, linear, llama3)`,
      );
  }
}

/** Radians per position of each rotated pair, [headDim / 2]. */
export function ropeFrequencies(rope: RopeConfig, headDim: number): Float64Array {
  return Float64Array.from({ length: headDim / 2 }, (_, i) =>
    scaled(rope.theta ** ((-2 * i) / headDim), rope.scaling),
  );
}

/** Of each rotated pair at each row's position, [rows, headDim / 2]. */
export interface RopeAngles {
  readonly cos: Float32Array;
  readonly sin: Float32Array;
}

export function allocateAngles(rows: number, { length: half }: Float64Array): RopeAngles {
  return { cos: new Float32Array(rows * half), sin: new Float32Array(rows * half) };
}

/** Row `row` for `position`: in double precision, rounded once, by every executor alike. */
export function writeAngles(
  angles: RopeAngles,
  row: number,
  position: number,
  frequencies: Float64Array,
): void {
  const half = frequencies.length;
  for (let i = 0; i < half; i++) {
    const angle = position * frequencies[i]!;
    angles.cos[row * half + i] = Math.cos(angle);
    angles.sin[row * half + i] = Math.sin(angle);
  }
}

function scaled(frequency: number, scaling: RopeScaling): number {
  switch (scaling.kind) {
    case 'none':
      return frequency;
    case 'linear':
      return frequency / scaling.factor;
    case 'llama3': {
      const { factor, lowFreqFactor, highFreqFactor, originalMaxPositions } = scaling;
      // How many turns this pair makes over the original context: many turns carry order, few turns carry distance.
      const turns = (originalMaxPositions * frequency) / (2 * Math.PI);
      if (turns < lowFreqFactor) return frequency / factor;
      if (turns > highFreqFactor) return frequency;
      const keep = (turns - lowFreqFactor) / (highFreqFactor - lowFreqFactor);
      return frequency * (keep + (1 - keep) / factor);
    }
  }
}
