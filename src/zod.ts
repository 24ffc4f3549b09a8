/**
 * zod, as the CommonJS files of its package. Every program and most threads need it before they can start, and as the hundred ES
 * modules that an `import` loads it takes twice as long.
 */
import { createRequire } from 'node:module';
import type * as zod from 'zod';

export const { z } = createRequire(import.meta.url)('zod') as typeof zod;

/** What is written as types: `z.infer<typeof schema>`. */
export namespace z {
  export type ZodType<Output = unknown, Input = unknown> = zod.ZodType<Output, Input>;
  export type ZodObject<Shape extends zod.core.$ZodLooseShape = zod.core.$ZodLooseShape> =
    zod.ZodObject<Shape>;
  export type ZodOptional<T extends zod.ZodType> = zod.ZodOptional<T>;
  export type infer<T extends zod.ZodType> = zod.infer<T>;
  export type output<T extends zod.ZodType> = zod.output<T>;
}
