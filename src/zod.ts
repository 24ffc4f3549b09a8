/**
 * zod, loaded as CommonJS. Every program and most threads need it before they can start, and the hundred ES modules of an `import`
 * take twice as long.
 */
import { createRequire } from 'node:module';
import type * as zod from 'zod';

export const { z } = createRequire(import.meta.url)('zod') as typeof zod;

/** For types: `z.infer<typeof schema>`. */
export namespace z {
  export type ZodType<Output = unknown, Input = unknown> = zod.ZodType<Output, Input>;
  export type ZodObject<Shape extends zod.core.$ZodLooseShape = zod.core.$ZodLooseShape> =
    zod.ZodObject<Shape>;
  export type ZodOptional<T extends zod.ZodType> = zod.ZodOptional<T>;
  export type infer<T extends zod.ZodType> = zod.infer<T>;
  export type output<T extends zod.ZodType> = zod.output<T>;
}
