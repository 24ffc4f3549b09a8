/** The core thread's entry: `CoreInit` in, messages of core-messages.ts both ways. It ends by itself once its port is closed. */
import { parentPort, workerData } from 'node:worker_threads';
import { PdError, unreachable } from '../errors.ts';
import { createLogger } from '../observability/log.ts';
import { pingOf } from '../transfer/hello.ts';
import type { PingMessage } from '../wire/messages.ts';
import { NATIVE_FEATURE, OVERLAP_FEATURE, TLS_FEATURE } from '../wire/overlap.ts';
import { PROMPT_IDS_FEATURE } from '../wire/prompt-ids.ts';
import type { CoreInit, FromCore, ToCore } from './core-messages.ts';
import { type CoreParts, createCore } from './core-parts.ts';

if (!parentPort) throw new PdError('INTERNAL', 'the core thread was started as a program');
const port = parentPort;
const init = workerData as CoreInit;
const { config } = init;
const log = createLogger(config.transfer.log, 'core');
/** Without the load. */
let ping: PingMessage | undefined;

/** Resolves at what nobody caught. Left to Node it would cut off the transfer thread, whose sockets crash the process under that. */
const broken = new Promise<void>((resolve) => {
  process.on('uncaughtException', (error) => {
    fatal(error);
    resolve();
  });
});
await main().catch(fatal);
post({ type: 'closed' });
port.close();

function post(message: FromCore): void {
  port.postMessage(message);
}

function fatal(error: unknown): void {
  post({ type: 'fatal', error: PdError.from(error).toData() });
}

async function main(): Promise<void> {
  // Until the core is there, messages wait in the port.
  const core = await createCore(init, log, {
    post: (outputs) => post({ type: 'outputs', outputs }),
    cacheChanged: (changes) => post({ type: 'cache', changes }),
    kvSaved: (requestId, error) => post({ type: 'kv-saved', requestId, ...(error && { error }) }),
  });
  try {
    post({ type: 'ready', info: core.info });
    const ended = core.loop.run().catch((error: unknown) => fatal(error));
    const shutdown = new Promise<void>((resolve) => {
      port.on('message', (message: ToCore) => {
        if (message.type === 'shutdown') resolve();
        else receive(core, message);
      });
    });
    await Promise.race([ended, shutdown, broken]);
    core.loop.close();
    // Every WANT is answered before its connection ends.
    await core.handOver?.close();
    // Disposing the engine settles whatever the step under way waits for.
    await core.engine?.dispose();
    await ended;
  } finally {
    await core.dispose();
  }
}

function receive(core: CoreParts, message: Exclude<ToCore, { readonly type: 'shutdown' }>): void {
  switch (message.type) {
    case 'add':
      core.loop.add(message.request);
      return;
    case 'abort':
      core.loop.abort(message.requestId, message.index);
      return;
    case 'state':
      void answerState(core, message);
      return;
    case 'timelines':
      post({ type: 'timelines', seq: message.seq, timelines: core.loop.timelines(message.transferIds) });
      return;
    case 'release':
      for (const id of message.transferIds) {
        core.loop.released(id);
        core.engine?.finish(id);
        core.handOver?.fail(id, 'KV_SEND_FAILED', 'nobody will decode it');
      }
      return;
    case 'prefilled':
      for (const id of message.transferIds) {
        core.loop.prefilled(id);
        core.engine?.prefilled(id);
        core.handOver?.prefilled(id);
      }
      return;
    case 'kv-failed':
      for (const id of message.transferIds) {
        core.engine?.sendFailed(id, message.reason);
        core.handOver?.sendFailed(id, message.reason);
      }
      return;
    case 'serve':
      announce(core, message);
      return;
    case 'drain':
      core.engine?.stopPing();
      return;
    default:
      unreachable(message, 'message to the core thread');
  }
}

async function answerState(
  core: CoreParts,
  { seq, integrity }: Extract<ToCore, { readonly type: 'state' }>,
): Promise<void> {
  const loop = core.loop.state(integrity);
  // what waits and what failed is told with that of the frozen wire: it means the same
  const native = core.handOver?.told();
  const wrong = core.handOver?.checkIntegrity() ?? [];
  const state = {
    ...loop,
    ...(loop.integrity && { integrity: [...loop.integrity, ...wrong] }),
    ...(native && { handOver: native.state }),
    ...(ping?.native && { ping: { ...ping, native: { ...ping.native, load: core.loop.load } } }),
  };
  try {
    const told = await core.engine?.state();
    const transfer = told && {
      ...told,
      waiting: [...told.waiting, ...(native?.waiting ?? [])],
      failures: [...told.failures, ...(native?.failures ?? [])],
    };
    post({ type: 'state', seq, state: { ...state, ...(transfer && { transfer }) } });
  } catch (error) {
    log.warn(
      { code: PdError.from(error).code },
      `the transfer engine did not tell its state: ${PdError.from(error).message}`,
    );
    post({ type: 'state', seq, state });
  }
}

/** Rank 0 speaks for its instance: to the proxies that it is told of, and to any that asks. */
function announce(
  core: CoreParts,
  { httpAddress, events, tokenizer }: Extract<ToCore, { readonly type: 'serve' }>,
): void {
  const { proxy, registry, role, transfer, pingIntervalMs, promptIdsFrom, access } = config;
  const { fingerprint, kvAddress } = core.info;
  if (role === 'both' || kvAddress === undefined || transfer.rank !== 0) return;
  const said = {
    type: role === 'producer' ? 'P' : 'D',
    httpAddress,
    features: [
      OVERLAP_FEATURE,
      ...(core.handOver ? [NATIVE_FEATURE] : []),
      ...(access.tlsCert === undefined ? [] : [TLS_FEATURE]),
      ...(promptIdsFrom || access.apiKeyFile !== undefined ? [PROMPT_IDS_FEATURE] : []),
    ],
    tokenizer,
    started: Date.now(),
    ...(events && { events }),
  } as const;
  ping = pingOf({ fingerprint, sendType: transfer.sendType }, kvAddress, said);
  if (proxy.length === 0 && !registry) return;
  core.engine?.startPing({
    ...said,
    proxies: proxy,
    ...(registry && { registry }),
    intervalMs: pingIntervalMs,
  });
}
