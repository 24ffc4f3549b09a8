/** Answers for what cannot be given, and what the log says of it. */
import type { Answer, GetMessage } from '../../wire/messages.ts';
import type { TransferContext } from '../context.ts';

/** A GET for what is not here. */
export function missing(get: GetMessage, gone = false, near: readonly string[] = []): Answer {
  const seq = get.native?.seq;
  if (seq === undefined) return { kind: 'get', ret: 1 };
  return { kind: 'get', ret: 1, seq, ...(gone ? { gone } : {}), ...(near.length > 0 ? { near } : {}) };
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
