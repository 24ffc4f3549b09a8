/** A stop that comes while a program starts, or at the moment it serves, is neither lost nor a crash. */
import { execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { cpSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { afterEach, expect, it } from 'vitest';
import { demoModelDir } from '../../src/config/demo-model.ts';
import { Program } from '../support/process.ts';
import { rows, withTheOthers } from '../support/rows.ts';
import { tempDir } from '../support/temp-dir.ts';

const programs: Program[] = [];
afterEach(async () => {
  await Promise.all(programs.splice(0).map((program) => program.stop('SIGKILL')));
});

const LOCAL = ['--host', '127.0.0.1', '--port', '0', '--log-format', 'json'];

function start(name: string, args: readonly string[]): Program {
  const program = new Program(name, [...LOCAL, ...args]);
  programs.push(program);
  return program;
}

const startConsumer = (...args: readonly string[]) =>
  start('pd-worker', ['--role', 'consumer', '--device', 'host', '--kv-port', '0', ...args]);

/** A worker that is loading a checkpoint whose index never comes. */
async function loadForEver(): Promise<Program> {
  const model = join(await tempDir(), 'model');
  cpSync(demoModelDir(), model, { recursive: true });
  const index = join(model, 'model.safetensors.index.json');
  execFileSync('mkfifo', [index]);
  const program = startConsumer('--model', model);
  const writer = await open(index, 'w'); // there once the worker reads
  program.child.once('exit', () => void writer.close());
  return program;
}

it.each(
  rows<[string, RegExp]>(
    [['as the transfer thread begins', /P2pNcclEngine init/]],
    [
      ['with the core ready', /Serving demo/],
      ['once it serves', /Running on/],
    ],
  ),
)('a worker that is told to stop %s exits 0', async (_, line) => {
  const program = startConsumer();
  await program.line(line);
  expect(await program.stop('SIGTERM')).toBe(0);
  expect(program.tail()).not.toMatch(/terminate called|fatal/i);
});

it.skipIf(withTheOthers)('a worker that cannot end its start in time exits 0 all the same', async () => {
  const program = await loadForEver();
  expect(await program.stop('SIGTERM')).toBe(0);
});

it.skipIf(withTheOthers)('a second signal ends a worker that starts at once', async () => {
  const program = await loadForEver();
  program.child.kill('SIGTERM');
  await program.line(/during startup: exiting/);
  const ended = once(program.child, 'exit');
  program.child.kill('SIGINT');
  expect(await ended).toEqual([0, null]);
});

it.skipIf(withTheOthers)('a proxy that is told to stop once it listens exits 0', async () => {
  const program = start('pd-proxy', ['--discovery-port', '0']);
  await program.line(/http:\/\//);
  expect(await program.stop('SIGTERM')).toBe(0);
});
