import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { meanOf, percentile, spreadOf } from '../../../../bench/measure/statistics.ts';
import {
  arrivalTimes,
  drawLength,
  formatLength,
  lengthKind,
  parseLength,
} from '../../../../bench/serve/lengths.ts';

describe('lengths', () => {
  it.each(['1', '512', '128-1024', '7-7', 'lognormal:256,0.6,4096', 'lognormal:10,0,10'])(
    '%s is read and written back',
    (text) => {
      expect(formatLength(parseLength(text)!)).toBe(text);
    },
  );

  it.each(['0', '-5', '9-3', '0-4', '1.5', '', 'lognormal:0,1', 'lognormal:9,1,8', 'lognormal:9', 'many'])(
    '%s is refused with what is allowed',
    (text) => {
      expect(parseLength(text)).toBeUndefined();
      expect(lengthKind().schema.safeParse(text).error?.issues[0]?.message).toContain('128-1024');
    },
  );

  it('draws the same numbers for the same seed, within bounds, spread as said', () => {
    const draw = (text: string, seed = 1) =>
      Array.from({ length: 4_000 }, (_, i) => drawLength(parseLength(text)!, seed, 'prompt-length', i));
    expect(draw('10-29')).toEqual(draw('10-29'));
    expect(draw('10-29')).not.toEqual(draw('10-29', 2));
    expect(new Set(draw('10-29')).size).toBe(20);
    expect(meanOf(draw('10-29'))).toBeCloseTo(19.5, 0);
    expect(Math.min(...draw('10-29'))).toBe(10);

    const lengths = draw('lognormal:1000,0.5,100000');
    const logs = lengths.map(Math.log);
    expect(meanOf(logs)).toBeCloseTo(Math.log(1_000), 1);
    expect(Math.sqrt(meanOf(logs.map((x) => (x - meanOf(logs)) ** 2)))).toBeCloseTo(0.5, 1);
    expect(Math.max(...draw('lognormal:1000,0.5,1200'))).toBe(1_200);
  });

  it('leaves the lengths of prompts alone when those of answers are drawn', () => {
    const length = parseLength('1-1000')!;
    const draws = (draw: 'prompt-length' | 'output-length') =>
      Array.from({ length: 50 }, (_, i) => drawLength(length, 3, draw, i));
    expect(draws('prompt-length')).not.toEqual(draws('output-length'));
  });
});

describe('arrivals', () => {
  it('are a Poisson process: gaps of the right mean, and as wide in spread', () => {
    const times = arrivalTimes(20, 5_001, 9);
    const gaps = times.slice(1).map((at, i) => at - times[i]!);
    expect(times[0]).toBe(0);
    expect(Math.min(...gaps)).toBeGreaterThanOrEqual(0);
    expect(meanOf(gaps) / 50).toBeCloseTo(1, 1);
    expect(Math.sqrt(meanOf(gaps.map((gap) => (gap - meanOf(gaps)) ** 2))) / 50).toBeCloseTo(1, 1);
    expect(arrivalTimes(20, 5_001, 9)).toEqual(times);
    // twice the rate: the same arrivals in half the time
    expect(arrivalTimes(40, 10, 9)).toEqual(times.slice(0, 10).map((at) => at / 2));
  });
});

describe('percentiles', () => {
  it("are numpy's: on the line between the two nearest ranks", () => {
    const values = [1, 2, 3, 4];
    expect(percentile(values, 0)).toBe(1);
    expect(percentile(values, 50)).toBe(2.5);
    expect(percentile(values, 90)).toBeCloseTo(3.7, 12);
    expect(percentile(values, 99)).toBeCloseTo(3.97, 12);
    expect(percentile(values, 100)).toBe(4);
    expect(percentile([7], 99)).toBe(7);
  });

  it('lie between least and most, in order, whatever the order of the values', () => {
    fc.assert(
      fc.property(fc.array(fc.double({ min: 0, max: 1e6, noNaN: true }), { minLength: 1 }), (values) => {
        const { p50, p90, p99, max, count } = spreadOf(values)!;
        const ordered = [Math.min(...values), p50, p90, p99, Math.max(...values)];
        expect(ordered).toEqual([...ordered].sort((a, b) => a - b));
        expect(max).toBe(Math.max(...values));
        expect(count).toBe(values.length);
        expect(spreadOf([...values].reverse())!.p90).toBe(p90);
      }),
    );
    expect(spreadOf([])).toBeUndefined();
  });
});
