/** GETs from one peer that are asked together: one announcement, one answer, one operation on the pair. */
import { PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { tensorBytes } from '../../wire/dtype.ts';
import type { Answer, GetsMessage } from '../../wire/messages.ts';
import type { TransferContext } from '../context.ts';
import type { Reaction, Unit } from './announcement.ts';
import type { GetAnnouncement, Incoming } from './get.ts';
import { bundleName } from './put-bundle.ts';
import { regionsOf, runsOf, runsOfTaken } from './regions.ts';

export class GetBundle implements Unit {
  readonly parts: readonly GetAnnouncement[];
  readonly #context: TransferContext;
  #runs: readonly number[] = [];

  constructor(context: TransferContext, parts: readonly GetAnnouncement[]) {
    this.#context = context;
    this.parts = parts;
  }

  message(_ours: boolean, seq: number): GetsMessage {
    const tensors = this.parts.map((part) => {
      part.announce();
      return { tensor_id: part.tensorId, bytes: part.bytes ?? 0 };
    });
    this.#runs = runsOf(this.parts.map((part) => part.reserved));
    return { cmd: 'GETS', seq, tensors, runs: this.#runs };
  }

  answered(answer: Answer, pair: Pair): Reaction {
    if (answer.kind !== 'gets' || answer.tensors.length !== this.parts.length) return 'unexpected';
    const coming: Incoming[] = [];
    const alone: boolean[] = [];
    const taken: boolean[] = [];
    for (const [index, form] of answer.tensors.entries()) {
      const part = this.parts[index]!;
      taken.push(typeof form === 'object');
      if (typeof form === 'string') {
        part.miss(form === 'gone', answer.near);
        continue;
      }
      // Both ends know that its size is not the one asked for (0: any), and let it travel as a region of its own.
      alone.push(tensorBytes(form.shape, form.dtype) !== part.bytes);
      const incoming = part.accept(form, pair);
      if (incoming) coming.push(incoming);
    }
    const wanted = taken.filter(Boolean).length;
    if (wanted === 0) return {};
    if (coming.length < wanted) {
      // There was no room for one of another size: the pair has been ended, and with it all that was to come on it.
      const error = new PdError('KV_BUFFER_FULL', `no room for what ${pair.peer} sends`, { peer: pair.peer });
      for (const one of coming) void one.broke(error, pair.over);
      return {};
    }
    const runs = [runsOfTaken(this.#runs, taken), answer.runs];
    return { moved: this.#receive(coming, runs, alone, pair) };
  }

  async #receive(
    coming: readonly Incoming[],
    runs: readonly (readonly number[])[],
    alone: readonly boolean[],
    pair: Pair,
  ): Promise<void> {
    const entries = coming.map(({ entry }) => entry);
    try {
      const regions = regionsOf(
        entries.map(({ held }) => held.memory),
        runs,
        alone,
      );
      const tensorId = bundleName(entries);
      await pair.receive(regions, { tensorId, timeoutMs: this.#context.options.timeouts.transfer });
      for (const one of coming) one.arrived();
    } catch (error) {
      pair.abort(PdError.from(error));
      await Promise.all(coming.map((one) => one.broke(PdError.from(error, 'PEER_LOST'), pair.over)));
    }
  }
}
