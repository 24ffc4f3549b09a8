/** Which announcements at the head of a queue travel as one. */
import { MAX_BODY_BYTES, MAX_BUNDLE } from '../../wire/limits.ts';
import type { TransferContext } from '../context.ts';
import type { Announcement, Unit } from './announcement.ts';
import { GetAnnouncement } from './get.ts';
import { GetBundle } from './get-bundle.ts';
import { PutAnnouncement } from './put.ts';
import { PutBundle } from './put-bundle.ts';

/** While one bundle is on the wire the next is gathered, and the one before it scattered: so several, where there is much to send. */
export const MAX_BUNDLE_BYTES = 256 * 2 ** 20;

/** What one tensor takes in a message besides its id: at most a form of its own, of 8 dimensions. */
const FORM_BYTES = 100;
const HEAD_BYTES = 1_024;

/** Takes announcements that are ready off the head of `queue`, which is not empty. */
export function takeUnit(context: TransferContext, queue: Announcement[], bundles: boolean): Unit {
  const first = queue[0]!;
  const count = bundles ? bundleLength(queue) : 1;
  const parts = queue.splice(0, count);
  if (count === 1) return first;
  const puts = parts.filter((part) => part instanceof PutAnnouncement);
  if (puts.length === count) return new PutBundle(context, puts);
  return new GetBundle(
    context,
    parts.filter((part) => part instanceof GetAnnouncement),
  );
}

function bundleLength(queue: readonly Announcement[]): number {
  const { direction, group } = queue[0]!;
  let bytes = 0;
  let body = HEAD_BYTES;
  let count = 0;
  for (const part of queue) {
    if (part.alone || part.direction !== direction || part.group !== group) break;
    if (!part.ready || part.cancelled || count === MAX_BUNDLE) break;
    bytes += part.bytes ?? 0;
    // Of an id in UTF-8, before anything in common is taken out.
    body += 3 * part.tensorId.length + FORM_BYTES;
    if (count > 0 && (bytes > MAX_BUNDLE_BYTES || body > MAX_BODY_BYTES)) break;
    count++;
  }
  return Math.max(count, 1);
}
