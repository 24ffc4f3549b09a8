/** What a run leaves behind is put together whatever its parts did. */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeEach, expect, test } from 'vitest';
import { isSound, readReport, renderSummary, writeReport } from '../../../bench/transfer/report.ts';
import type { PartResult } from '../../../bench/transfer/result.ts';
import { DEFAULT_TRANSFER, type TransferRow } from '../../../bench/transfer/transfer.ts';
import { tempDir } from '../../support/temp-dir.ts';

let folder: string;
beforeEach(async () => {
  folder = await tempDir();
});

const row = (over: Partial<TransferRow> = {}): TransferRow => ({
  sendType: 'PUT_ASYNC',
  source: 'paged',
  tokens: 1_024,
  bytes: 134_217_728,
  milliseconds: [2, 1, 3],
  bestMs: 1,
  medianMs: 2,
  bestGbps: 134,
  medianGbps: 67,
  sentMs: 1,
  checkedBytes: 1e9,
  ...over,
});

function result(part: PartResult['part'], over: Partial<PartResult> = {}): PartResult {
  return {
    part,
    ok: true,
    startedAt: '2026-01-02T03:04:05.000Z',
    seconds: 1,
    command: `pd-bench ${part}`,
    devices: ['cuda:0', 'cuda:1'],
    options: { shape: { model: 'llama-3-8b' } },
    machine: { program: 'pd-worker', node: '20', cpu: 'c', cores: 2, memoryGib: 1, driver: '580' },
    environment: {
      libraries: ['nccl 2.28.9'],
      gpus: ['cuda:0 NVIDIA H200, 141 GB', 'cuda:1 NVIDIA H200, 141 GB'],
    },
    clock: { withinMs: 0.1, agrees: true },
    ...over,
  };
}

function leave(name: string, content: string): void {
  writeFileSync(join(folder, name), content);
}

const transfer = (rows: readonly TransferRow[]) => ({
  transfer: { settings: DEFAULT_TRANSFER, rows, ceilings: [], ceilingErrors: [] },
});

test('names the file by date and GPUs; says hardware, driver, NCCL and command', () => {
  leave('transfer.json', JSON.stringify(result('transfer', transfer([row()]))));
  leave('transfer.step', '0 12');
  const report = readReport(folder, './run --all');
  expect(isSound(report)).toBe(true);
  const base = writeReport(report, join(folder, 'out'));
  expect(base).toBe(join(folder, 'out', '2026-01-02-2x-nvidia-h200-transfer'));
  const text = readFileSync(`${base}.md`, 'utf8');
  for (const part of ['NVIDIA H200', 'driver 580', 'nccl 2.28.9', './run --all', '8.00 ms, 8.0x']) {
    expect(text).toContain(part);
  }
  expect(JSON.parse(readFileSync(`${base}.json`, 'utf8'))).toEqual(report);
});

test('a part that failed, one that was cut off and one that never ended are results too', () => {
  leave(
    'transfer.json',
    JSON.stringify(result('transfer', { ok: false, ...transfer([row({ error: 'PEER_LOST: gone' })]) })),
  );
  leave('transfer.step', '1 3');
  leave('soak.json', '{"part": "so');
  leave('soak.step', '124 60');
  leave('soak.log', 'first\nlast words');
  leave('faults.step', '1 2');
  const report = readReport(folder, 'run');
  expect(isSound(report)).toBe(false);
  const summary = renderSummary(report);
  expect(summary).toContain('soak: FAILED: timed out after 60 s');
  expect(summary).toContain('faults: FAILED, status 1');
  const text = readFileSync(`${writeReport(report, folder)}.md`, 'utf8');
  expect(text).toContain('last words');
  expect(text).toContain('PEER_LOST: gone');
});

test("rows slower than vLLM's engine are named, on the GPUs it was measured on and for the KV it was measured with", () => {
  const slow = row({ bestMs: 9 });
  leave('transfer.json', JSON.stringify(result('transfer', transfer([slow, row({ sendType: 'GET' })]))));
  expect(renderSummary(readReport(folder, 'run'))).toContain(
    'slower than vLLM: PUT_ASYNC, paged, 1024 tokens: 9.00 ms',
  );
  const other = { environment: { libraries: [], gpus: ['cuda:0 NVIDIA L4, 24 GB'] } };
  leave('transfer.json', JSON.stringify(result('transfer', { ...transfer([slow]), ...other })));
  expect(renderSummary(readReport(folder, 'run'))).not.toContain('vLLM');
});
