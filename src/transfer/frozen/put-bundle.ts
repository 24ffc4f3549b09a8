/** PUTs to one peer that travel together: one announcement, one answer, one operation on the pair. */
import type { MemoryRef } from '../../device/device.ts';
import { PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import type { Answer, PutsMessage } from '../../wire/messages.ts';
import type { TransferContext } from '../context.ts';
import type { Reaction, Unit } from './announcement.ts';
import type { PutAnnouncement } from './put.ts';
import { regionsOf, runsOf, runsOfTaken } from './regions.ts';

export class PutBundle implements Unit {
  readonly parts: readonly PutAnnouncement[];
  readonly #context: TransferContext;
  #runs: readonly number[] = [];

  constructor(context: TransferContext, parts: readonly PutAnnouncement[]) {
    this.#context = context;
    this.parts = parts;
  }

  message(_ours: boolean, seq: number): PutsMessage {
    this.#runs = runsOf(this.parts.map((part) => part.memory!));
    return { cmd: 'PUTS', seq, tensors: this.parts.map((part) => part.form), runs: this.#runs };
  }

  answered(answer: Answer, pair: Pair): Reaction {
    // A peer with other limits cannot read it as a whole: one by one it is seen which tensor it cannot take.
    if (answer.kind === 'no-room') {
      for (const part of this.parts) part.alone = true;
      return { again: this.parts };
    }
    if (answer.kind !== 'puts' || answer.verdicts.length !== this.parts.length) return 'unexpected';
    const taken = answer.verdicts.map((verdict) => verdict === 'send');
    this.parts.forEach((part, index) => {
      if (answer.verdicts[index] === 'no-room') part.refuse();
      else if (answer.verdicts[index] === 'unwanted') part.finish(0);
    });
    const sending = this.parts.filter((_, index) => taken[index]);
    if (sending.length === 0) return {};
    const runs = [runsOfTaken(this.#runs, taken), answer.runs];
    return { moved: this.#send(sending, runs, pair) };
  }

  async #send(
    parts: readonly PutAnnouncement[],
    runs: readonly (readonly number[])[],
    pair: Pair,
  ): Promise<void> {
    const memory = parts.map((part) => part.memory);
    const tensorId = bundleName(parts);
    const missing = memory.indexOf(undefined);
    if (missing >= 0) {
      const error = new PdError('INTERNAL', `${parts[missing]!.tensorId} was answered 0 and cannot be sent`);
      for (const part of parts) part.fail(error);
      pair.abort(error);
      return;
    }
    try {
      const regions = regionsOf(memory as MemoryRef[], runs);
      await pair.send(regions, { tensorId, timeoutMs: this.#context.options.timeouts.transfer });
      for (const part of parts) part.finish(part.bytes);
    } catch (error) {
      pair.abort(PdError.from(error));
      // The transport may read the memory until the pair is over; only then is it anybody else's.
      await pair.over;
      for (const part of parts) {
        part.fail(PdError.from(error, 'KV_SEND_FAILED', { tensorId: part.tensorId, peer: pair.peer }));
      }
    }
  }
}

/** For messages: the first tensor, and how many more. */
export function bundleName(parts: readonly { readonly tensorId: string }[]): string {
  const [first] = parts;
  return parts.length === 1 ? first!.tensorId : `${first!.tensorId} and ${parts.length - 1} more`;
}
