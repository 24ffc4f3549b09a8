/** Two proxies, two producers and two consumers, however they find each other, under load, and what becomes of it as one after the other is killed. */
import { expect } from 'vitest';
import type { ProxyHandle, WorkerHandle } from './cluster.ts';

const ROLES = ['producer', 'consumer', 'producer', 'consumer'] as const;
const BODY = JSON.stringify({
  ...{ model: 'demo', prompt: 'What is the capital of France?', max_tokens: 8, temperature: 0 },
});

export interface FleetPrograms {
  readonly proxies: readonly ProxyHandle[];
  /** In this order: producer, consumer, producer, consumer. */
  readonly workers: readonly WorkerHandle[];
}

/** Starts four workers, of each role two. */
export function startWorkers(
  start: (role: WorkerHandle['role']) => Promise<WorkerHandle>,
): Promise<WorkerHandle[]> {
  return Promise.all(ROLES.map(start));
}

export async function countsOf({ url }: ProxyHandle): Promise<{ producer: number; consumer: number }> {
  const health = (await (await fetch(`${url}/health`)).json()) as {
    counts: { producer: number; consumer: number };
  };
  return health.counts;
}

/** Asks through the first of the proxies that is there: one that is gone has not taken the request. Throws where none is. */
export async function askThrough(proxies: readonly ProxyHandle[]): Promise<string> {
  for (const { url, program } of proxies) {
    try {
      const response = await fetch(`${url}/v1/completions`, { method: 'POST', body: BODY });
      return `${response.status} ${await response.text()}`;
    } catch (error) {
      if (!program.exited && !program.child.killed) throw error;
    }
  }
  throw new Error('no proxy is left');
}

export const RIGHT = /^200 .*Paris/;

/** A client of each proxy that asks one request after the other, and goes to the other proxy where its own is gone, until it is told to end. */
export function load(proxies: readonly ProxyHandle[]) {
  let loading = true;
  let answered = 0;
  let wake = () => {};
  const clients = proxies.map(async (_, first) => {
    const order = [...proxies.slice(first), ...proxies.slice(0, first)];
    const answers: string[] = [];
    while (loading) {
      answers.push(await askThrough(order));
      answered++;
      wake();
    }
    return answers;
  });
  return {
    /** So many more answers, so that something has gone through whatever has just happened. */
    async more(count: number): Promise<void> {
      const until = answered + count;
      while (answered < until)
        await Promise.race([
          new Promise<void>((resolve) => {
            wake = resolve;
          }),
          Promise.all(clients), // rejects with the first that fails
        ]);
    },
    /** Ends it: every answer was right. */
    async end(): Promise<void> {
      loading = false;
      for (const answer of (await Promise.all(clients)).flat()) expect(answer).toMatch(RIGHT);
    },
  };
}
