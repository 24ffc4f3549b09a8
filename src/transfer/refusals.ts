/** Answers for what cannot be given, and what the log says of it. */
import type { Answer, GetMessage } from '../wire/messages.ts';
import type { TransferContext } from './context.ts';

/** A GET for what is not here. */
export function missing(get: GetMessage, gone = false, near: readonly string[] = []): Answer {
  const seq = get.ours?.seq;
  if (seq === undefined) return { kind: 'get', ret: 1 };
  return { kind: 'get', ret: 1, seq, ...(gone ? { gone } : {}), ...(near.length > 0 ? { near } : {}) };
}

/** What a message that cannot be decoded would be answered, where it can be told that it was a PUT or a GET. */
export function refusalOf(body: Uint8Array): Answer | undefined {
  const head = Buffer.from(body.subarray(0, 64)).toString('latin1');
  // Of a bundle it means all of it: its sender then tries its tensors one by one.
  if (head.includes('\xa3cmd\xa3PUT') || head.includes('\xa3cmd\xa4PUTS')) return { kind: 'no-room' };
  if (head.includes('\xa3cmd\xa3GET')) return { kind: 'get', ret: 1 };
  return undefined;
}

/** Counts and tells, with both values, that a peer uses the other direction. */
export function refuseSendType(context: TransferContext, peer: string, cmd: 'PUT' | 'GET'): void {
  const { metrics, limited, log, options } = context;
  metrics.inc('pd_protocol_errors_total', 1, 'send_type');
  const theirs = cmd === 'GET' ? 'GET' : 'PUT or PUT_ASYNC';
  limited.log(`send_type ${peer}`, (suppressed) =>
    log.error(
      { peer, suppressed },
      `send_type differs: ${peer} has ${theirs}, this engine has ${options.sendType}; its ${cmd} is refused`,
    ),
  );
}
