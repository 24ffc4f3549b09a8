/** A result as text for a terminal. */

import type { Spread } from '../measure/statistics.ts';
import { plainTable } from '../measure/table.ts';
import type { ServeResult } from './serve.ts';
import type { ServeSummary } from './summary.ts';

export function renderServe({ summary, interrupted, sizedBy }: ServeResult): string {
  const { requests, failures, durationMs, goodput } = summary;
  const lines = [
    `${requests.done} of ${requests.planned} requests answered in ${(durationMs / 1_000).toFixed(2)} s, at most ${summary.mostRunning} at once` +
      (requests.failed > 0 ? `; ${requests.failed} failed` : '') +
      (requests.interrupted > 0 ? `; ${requests.interrupted} interrupted` : ''),
    '',
    plainTable({
      head: ['milliseconds', 'mean', 'p50', 'p90', 'p99', 'max'],
      rows: [
        row('time to first token', summary.ttftMs),
        row('inter-token latency', summary.itlMs),
        row('per output token', summary.tpotMs),
        row('end to end', summary.e2eMs),
        ...(summary.lateMs ? [row('sent late by', summary.lateMs)] : []),
      ],
    }),
    '',
    plainTable({
      head: ['throughput', 'per second', 'in all'],
      rows: [
        ['requests', rate(summary.requestsPerSecond), String(requests.done)],
        ['output tokens', rate(summary.outputTokensPerSecond), String(summary.outputTokens)],
        [
          'prompt and output tokens',
          rate(summary.totalTokensPerSecond),
          String(summary.promptTokens + summary.outputTokens),
        ],
        ...(goodput ? [[goodputTitle(summary), rate(goodput.requestsPerSecond), String(goodput.good)]] : []),
      ],
    }),
    '',
    ...failures.map(({ code, count, message }) => `failed  ${count} x ${code}: ${message}`),
    ...remarks(summary, sizedBy),
    ...(interrupted ? ['interrupted: these are the numbers up to then'] : []),
  ];
  return `${lines.join('\n').trimEnd()}\n`;
}

/** What a reader must know to interpret the numbers. */
function remarks(summary: ServeSummary, sizedBy: ServeResult['sizedBy']): string[] {
  const { requests, lateMs, ttftMs } = summary;
  const lines: string[] = [];
  const note = (condition: boolean, text: string) => {
    if (condition) lines.push(`note    ${text}`);
  };
  note(sizedBy === 'estimate', 'no /tokenize there (--tokenize-url): prompt lengths are approximate');
  note(
    sizedBy === 'tokenizer' && summary.otherPromptLength > 0,
    `${summary.otherPromptLength} prompts had a different length than counted`,
  );
  note(
    summary.otherOutputLength > 0,
    `${summary.otherOutputLength} of ${requests.done} answers had a different length than requested`,
  );
  note(summary.withoutText > 0, `${summary.withoutText} answers had no text, and so no time to first token`);
  note(!summary.countedByServer, 'the server reports no usage: each event with text counts as a token');
  note(
    (summary.tokensPerEvent ?? 1) > 1.05,
    `an event carries ${summary.tokensPerEvent?.toFixed(2)} tokens on average: inter-token latency is the time between events`,
  );
  note(
    (lateMs?.p99 ?? 0) > Math.max(5, (ttftMs?.p50 ?? 0) / 10),
    'requests were sent late: this machine was too busy to keep the rate',
  );
  return lines;
}

function goodputTitle({ goodput }: ServeSummary): string {
  const { ttftMs, itlMs } = goodput!.objectives;
  const bounds = [
    ...(ttftMs === undefined ? [] : [`first token in ${ttftMs} ms`]),
    ...(itlMs === undefined ? [] : [`${itlMs} ms per token`]),
  ];
  return `good (${bounds.join(', ')})`;
}

function row(title: string, spread: Spread | undefined): string[] {
  if (!spread) return [title, '-', '-', '-', '-', '-'];
  return [title, ...[spread.mean, spread.p50, spread.p90, spread.p99, spread.max].map((ms) => ms.toFixed(2))];
}

function rate(value: number): string {
  return value >= 100 ? value.toFixed(1) : value.toFixed(2);
}
