/** The tables of pd-bench's parts. */
import type { SendType } from '../../src/wire/messages.ts';
import type { Table } from '../measure/table.ts';
import type { CheckRow } from './bench.ts';
import { CEILINGS, type Ceiling, type CeilingKind } from './ceilings.ts';
import { sizeOf } from './exchange.ts';
import type { PartResult } from './result.ts';
import type { TransferResult, TransferRow } from './transfer.ts';

/**
 * vLLM's own P2P NCCL engine on two H200s (NVLink, NCCL 2.28.9): 32 layers of Llama-3-8B KV, first send to last tensor received, 16
 * channels, a buffer from which nothing spills, contiguous tensors without gather and scatter, best of 3 warm rounds. Milliseconds.
 */
const VLLM_MS: Readonly<Record<SendType, Readonly<Record<number, number>>>> = {
  PUT_ASYNC: { 16: 6.5, 256: 7.9, 1024: 8.0, 4096: 13.3, 16384: 20.3 },
  PUT: { 16: 6.1, 256: 10.1, 1024: 8.5, 4096: 11.1, 16384: 25.8 },
  GET: { 16: 4.4, 256: 5.2, 1024: 6.1, 4096: 8.3, 16384: 18.8 },
};

const BASELINE_MODEL = 'llama-3-8b';
const BASELINE_GPU = /\bH200\b/;

/** One line per send type, source and size. With vLLM's time if it was measured on the same GPUs with the same KV. */
export function transferTable(result: PartResult, transfer: TransferResult): Table {
  const compared = isComparable(result);
  const head = ['send type', 'source', 'tokens', 'bytes', 'best', 'median', 'GB/s', 'of raw', 'checked'];
  return {
    head: compared ? [...head, 'vLLM'] : head,
    rows: transfer.rows.map((row) => {
      const grouped = ceilingOf(transfer.ceilings, 'raw-grouped', row.tokens);
      const cells =
        row.error === undefined
          ? [
              ms(row.bestMs),
              ms(row.medianMs),
              rate(row.bestGbps),
              grouped ? `${((100 * row.bestGbps) / grouped.bestGbps).toFixed(0)} %` : '',
              megabytes(row.checkedBytes),
            ]
          : ['FAILED', '', '', '', ''];
      const key = [row.sendType, row.source, String(row.tokens), megabytes(row.bytes)];
      return [...key, ...cells, ...(compared ? [baseline(row)] : [])];
    }),
  };
}

/** One line per row of the product's hand-over. */
export function nativeTable({ native = [], ceilings }: TransferResult): Table {
  const kinds = { direct: 'kernel', nccl: 'raw-grouped', host: 'raw-grouped' } as const;
  return {
    head: [
      ...['transport', 'path', 'beside', 'requests', 'tokens', 'bytes', 'best', 'median', 'GB/s'],
      ...['ceiling', 'GPU: write', 'GPU: KV known', 'GPU: token known', 'from the call', 'step keeps'],
    ],
    rows: native.map((row) => {
      const ceiling =
        row.path === 'kept' && row.inFlight === 1
          ? ceilingOf(ceilings, kinds[row.transport], row.tokens)
          : undefined;
      const key = [row.transport, row.path, row.beside, String(row.inFlight), String(row.tokens)];
      if (row.error !== undefined) return [...key, megabytes(row.bytes), 'FAILED'];
      return [
        ...key,
        megabytes(row.bytes),
        ms(row.bestMs),
        ms(row.medianMs),
        row.path === 'kept' ? rate(row.bytes / row.medianMs / 1e6) : '',
        ceiling ? ms(ceiling.medianMs) : '',
        ...[row.stamped?.writeMs, row.stamped?.kvMs, row.stamped?.knownMs].map((time) =>
          time === undefined ? '' : ms(time),
        ),
        ms(row.wantedMs),
        row.keeps === undefined ? '' : `${(100 * row.keeps).toFixed(1)} %`,
      ];
    }),
  };
}

export function ceilingTable({ ceilings }: TransferResult, onHost: boolean): Table {
  const titles: Record<CeilingKind, string> = onHost
    ? {
        'raw-flat': 'raw TCP, flat',
        'raw-grouped': 'raw TCP, a region per layer',
        'device-copy': 'memcpy',
        kernel: '',
      }
    : {
        'raw-flat': 'raw NCCL, flat',
        'raw-grouped': 'raw NCCL, a region per layer, grouped',
        'device-copy': 'cudaMemcpyPeerAsync',
        kernel: 'one kernel, paged to paged, all layers',
      };
  const tokens = [...new Set(ceilings.map((ceiling) => ceiling.tokens))];
  return {
    head: ['ceiling', ...tokens.map((count) => `${count} tokens`)],
    rows: CEILINGS.filter((kind) => ceilings.some((one) => one.kind === kind)).map((kind) => [
      titles[kind],
      ...tokens.map((count) => {
        const ceiling = ceilingOf(ceilings, kind, count);
        return ceiling ? `${ms(ceiling.bestMs)}, ${rate(ceiling.bestGbps)} GB/s` : '';
      }),
    ]),
  };
}

export function checkTable(rows: readonly CheckRow[]): Table {
  return {
    head: ['', 'check', 'result'],
    prose: true,
    rows: rows.map((row) => [row.ok ? 'ok' : 'FAILED', row.name, row.value]),
  };
}

/** For a terminal: left-aligned, since values are sentences. */
export function checkLines(rows: readonly CheckRow[]): string {
  return rows.map((row) => `${row.ok ? 'ok    ' : 'FAILED'}  ${row.name}\n          ${row.value}`).join('\n');
}

/** Rows slower than vLLM's engine; empty if there is nothing to compare with. */
export function slowerThanVllm(result: PartResult): readonly TransferRow[] {
  if (!result.transfer || !isComparable(result)) return [];
  return result.transfer.rows.filter((row) => {
    const theirs = VLLM_MS[row.sendType][row.tokens];
    return theirs !== undefined && row.error === undefined && row.bestMs > theirs;
  });
}

function isComparable(result: PartResult): boolean {
  const { shape } = result.options as { shape?: { model?: string } };
  return shape?.model === BASELINE_MODEL && result.environment.gpus.some((gpu) => BASELINE_GPU.test(gpu));
}

function baseline(row: TransferRow): string {
  const theirs = VLLM_MS[row.sendType][row.tokens];
  if (theirs === undefined) return '';
  return row.error === undefined ? `${ms(theirs)}, ${(theirs / row.bestMs).toFixed(1)}x` : ms(theirs);
}

function ceilingOf(ceilings: readonly Ceiling[], kind: CeilingKind, tokens: number): Ceiling | undefined {
  return ceilings.find((ceiling) => ceiling.kind === kind && ceiling.tokens === tokens);
}

export function ms(value: number): string {
  return `${value.toFixed(value < 10 ? 2 : 1)} ms`;
}

/** 10^9 bytes per second, three digits. */
function rate(gbps: number): string {
  return gbps >= 100 ? gbps.toFixed(0) : gbps.toPrecision(3);
}

function megabytes(bytes: number): string {
  if (bytes < 1e6) return sizeOf(bytes);
  return bytes < 1e10 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}
