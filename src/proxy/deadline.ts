/** A wait that ends with another, or by itself. */
import type { PdError } from '../errors.ts';

/** A signal that also ends after `ms`, with that reason. `clear` lets go of both. */
export function deadlineWithin(
  parent: AbortSignal,
  ms: number,
  reason: () => PdError,
): { readonly signal: AbortSignal; clear(): void } {
  const controller = new AbortController();
  const onParent = () => controller.abort(parent.reason);
  if (parent.aborted) onParent();
  parent.addEventListener('abort', onParent, { once: true });
  const timer = setTimeout(() => controller.abort(reason()), ms);
  return {
    signal: controller.signal,
    clear() {
      clearTimeout(timer);
      parent.removeEventListener('abort', onParent);
    },
  };
}
