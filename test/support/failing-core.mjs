/** Preloaded (`node --import`) into a worker: its core fails in the first step, as with a broken GPU, or with what nobody catches. */
import { isMainThread, workerData } from 'node:worker_threads';

if (!isMainThread && workerData?.config) {
  const { CoreLoop } = await import('../../dist/src/worker/core.js');
  const run = CoreLoop.prototype.run;
  CoreLoop.prototype.run = async function () {
    if (process.env.PD_TEST_CORE === 'fails') throw new Error('the bus fell off');
    setImmediate(() => {
      throw new Error('the bus fell off');
    });
    return await run.call(this);
  };
}
