import { describe, expect, it } from 'vitest';
import { LoadProgress, type ProgressOutput } from '../../../../src/model/cuda/load-progress.ts';
import type { Logger } from '../../../../src/observability/log.ts';

describe('the progress of weights', () => {
  const setUp = (output: Partial<ProgressOutput>) => {
    const said: string[] = [];
    let now = 0;
    const log = { info: (_: object, line: string) => void said.push(line) } as Pick<Logger, 'info'>;
    const progress = new LoadProgress('llama', 8e9, log, { logSteps: true, ...output }, () => now);
    /** 4 GB/s, a piece every 50 ms. */
    const load = (bytes: number) => {
      for (let arrived = 0; arrived < bytes; arrived += 2e8) {
        now += 50;
        progress.add(2e8);
      }
    };
    return { said, load, progress };
  };

  it('is a line with a bar about once a second, and a last one', () => {
    const { said, load } = setUp({});
    load(8e9);
    expect(said).toEqual([
      `weights of llama: ${'█'.repeat(12)}${'░'.repeat(12)} 50 % (3.73 GiB of 7.45 GiB, 4.00 GB/s)`,
      `weights of llama: ${'█'.repeat(24)} 100 % (7.45 GiB of 7.45 GiB, 4.00 GB/s)`,
    ]);
  });

  it('is redrawn on a terminal, gone in the end, and only its last state is logged', () => {
    const drawn: string[] = [];
    const { said, load } = setUp({ draw: (text) => void drawn.push(text), logSteps: false });
    load(8e9);
    expect(said).toHaveLength(1);
    expect(drawn.length).toBeGreaterThan(10);
    expect(drawn[0]).toContain('░ 2 % (');
    expect(drawn.at(-1)).toBe('\r\x1b[K');
  });

  it('is taken off the terminal where loading fails', () => {
    const drawn: string[] = [];
    const { load, progress } = setUp({ draw: (text) => void drawn.push(text) });
    load(1e9);
    progress.end();
    progress.end();
    expect(drawn.filter((text) => text === '\r\x1b[K')).toHaveLength(1);
  });
});
