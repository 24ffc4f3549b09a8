import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { engineRequestId } from '../../../src/wire/ids.ts';
import { Choice, StopMatcher, stopString } from '../../../src/worker/server/choice.ts';
import type { TextOptions } from '../../../src/worker/server/fields.ts';
import { BYTE_MODEL, bytesOf, EOS } from '../../support/fake-core.ts';

const requestId = engineRequestId('cmpl-1-0');
const piece = fc.constantFrom('a', 'b', 'ab', 'END', 'EN', 'é', '🐉', '👩‍👩‍👧', '\n', ' ');
const texts = fc.array(piece, { maxLength: 20 }).map((pieces) => pieces.join(''));
const stops = fc.array(fc.constantFrom('END', 'ND', 'ENEN', 'ab', 'abab', '🐉', 'bb', '\n\n'), {
  maxLength: 3,
});
const cuts = fc.array(fc.integer({ min: 1, max: 5 }), { minLength: 1 });

/** `items` in runs of the given lengths. */
function split<T>(items: readonly T[], lengths: readonly number[]): T[][] {
  const runs: T[][] = [];
  for (let at = 0, i = 0; at < items.length; i++) {
    const length = lengths[i % lengths.length]!;
    runs.push(items.slice(at, at + length));
    at += length;
  }
  return runs;
}

/** What the text is up to the stop string that ends first. */
function expected(text: string, stopStrings: readonly string[]): { text: string; stop?: string } {
  for (let end = 1; end <= text.length; end++) {
    const ending = stopStrings.filter((stop) => text.slice(0, end).endsWith(stop));
    const [stop] = ending.sort((a, b) => b.length - a.length);
    if (stop !== undefined) return { text: text.slice(0, end - stop.length), stop };
  }
  return { text };
}

describe('StopMatcher', () => {
  it('lets out the text before the first stop string, however it is cut', () => {
    fc.assert(
      fc.property(texts, stops, cuts, (text, stopStrings, lengths) => {
        const matcher = new StopMatcher(stopStrings.map(stopString));
        let out = '';
        for (const run of split([...text], lengths)) {
          out += matcher.push(run.join(''));
          if (matcher.matched !== undefined) break;
        }
        if (matcher.matched === undefined) out += matcher.flush();
        expect({ text: out, stop: matcher.matched }).toEqual(expected(text, stopStrings));
      }),
    );
  });

  it('holds back no more than what may become a stop string', () => {
    const matcher = new StopMatcher(['END', 'STOP'].map(stopString));
    expect(matcher.push('the E')).toBe('the ');
    expect(matcher.push('N')).toBe('');
    expect(matcher.push('ough')).toBe('ENough');
    expect(matcher.push('S')).toBe('');
    expect(matcher.flush()).toBe('S');
  });
});

describe('Choice', () => {
  it('streams the same text as it gives whole, with characters and stop strings split over tokens', () => {
    fc.assert(
      fc.property(texts, stops, cuts, (text, stopStrings, lengths) => {
        const run = (lengthsOfOutputs: readonly number[]) => {
          const choice = new Choice(BYTE_MODEL, stopStrings.map(stopString), 0);
          const deltas: string[] = [];
          const ids: number[] = [];
          let reason: string | undefined;
          for (const tokens of split([...bytesOf(text), EOS], lengthsOfOutputs)) {
            const last = tokens.at(-1) === EOS;
            const delta = choice.push({
              requestId,
              index: 0,
              tokens,
              ...(last ? { finishReason: 'stop' as const } : {}),
            });
            deltas.push(delta.text);
            ids.push(...delta.tokens);
            reason = delta.finishReason ?? reason;
            if (choice.stopped) break;
          }
          expect(ids).toHaveLength(choice.tokens);
          return { deltas, reason, ids };
        };
        const streamed = run(lengths);
        const whole = run([1e9]);
        expect(streamed.deltas.join('')).toBe(whole.deltas.join(''));
        expect(streamed.reason).toBe('stop');
        expect(streamed.ids).toEqual(whole.ids);
        expect([...bytesOf(text), EOS].slice(0, whole.ids.length)).toEqual(whole.ids);
        for (const delta of streamed.deltas) expect(delta).not.toContain('\ufffd');
        expect(whole.deltas.join('')).toBe(expected(text, stopStrings).text);
      }),
    );
  });

  it('leaves the token that ended it out of the text, and counts it', () => {
    const choice = new Choice(BYTE_MODEL, [], 0);
    const delta = choice.push({ requestId, index: 0, tokens: [...bytesOf('hi'), 46], finishReason: 'stop' });
    const tokens = [...bytesOf('hi'), 46];
    expect(delta).toMatchObject({ text: 'hi', tokens, logprobs: [], finishReason: 'stop', stopReason: 46 });
    expect(choice.tokens).toBe(3);
  });

  it('tells the stop string or token that ended it, and nothing where its text just ended', () => {
    const ended = (tokens: number[], options: TextOptions = {}, grammarEnded = false) => {
      const choice = new Choice(BYTE_MODEL, ['END', 'ND'].map(stopString), 0, 0, options);
      return choice.push({ requestId, index: 0, tokens, finishReason: 'stop', grammarEnded });
    };
    expect(ended(bytesOf('the END.'))).toMatchObject({ text: 'the ', stopReason: 'END' });
    expect(ended([97, EOS], { eos: EOS })).not.toHaveProperty('stopReason');
    // Asked for in place of the end of text.
    expect(ended([97, EOS])).toMatchObject({ stopReason: EOS });
    expect(ended([97, 257], { eos: EOS })).toMatchObject({ text: 'a', stopReason: 257 });
    expect(ended(bytesOf('{}'), {}, true)).not.toHaveProperty('stopReason');
  });

  it('has what ended it in the text where that is asked for', () => {
    const include = { includeStop: true };
    const byText = new Choice(BYTE_MODEL, [stopString('END')], 0, 0, include);
    expect(byText.push({ requestId, index: 0, tokens: bytesOf('the EN') }).text).toBe('the ');
    expect(byText.push({ requestId, index: 0, tokens: bytesOf('D of') })).toMatchObject({
      text: 'END',
      finishReason: 'stop',
    });
    const byToken = new Choice(BYTE_MODEL, [], 0, 0, include);
    expect(byToken.push({ requestId, index: 0, tokens: bytesOf('hi.'), finishReason: 'stop' }).text).toBe(
      'hi.',
    );
  });

  it('minds no stop string before min_tokens', () => {
    const choice = new Choice(BYTE_MODEL, [stopString('a')], 2);
    const delta = choice.push({ requestId, index: 0, tokens: bytesOf('aaba') });
    expect(delta).toMatchObject({ text: 'aab', finishReason: 'stop' });
    expect(choice.tokens).toBe(4);
  });

  it('flushes an unfinished character only at the end', () => {
    const choice = new Choice(BYTE_MODEL, [], 0);
    expect(choice.push({ requestId, index: 0, tokens: [0xf0, 0x9f] }).text).toBe('');
    const delta = choice.push({ requestId, index: 0, tokens: [0x90], finishReason: 'length' });
    expect(delta).toMatchObject({ text: '\ufffd', finishReason: 'length' });
  });

  it('throws the error of an output', () => {
    const choice = new Choice(BYTE_MODEL, [], 0);
    const error = { code: 'KV_LOAD_TIMEOUT', message: 'never came', context: {} } as const;
    expect(() => choice.push({ requestId, index: 0, tokens: [], finishReason: 'error', error })).toThrow(
      expect.objectContaining({ code: 'KV_LOAD_TIMEOUT', message: 'never came' }),
    );
    expect(() => choice.push({ requestId, index: 0, tokens: [], finishReason: 'abort' })).toThrow(
      expect.objectContaining({ code: 'REQUEST_ABORTED' }),
    );
  });
});
