import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Command } from 'commander';
import { describe, expect, it } from 'vitest';
import {
  bytes,
  duration,
  hostPort,
  integer,
  type Kind,
  listOf,
  oneOf,
  port,
  text,
  toggle,
} from '../../../src/config/kinds.ts';
import {
  addOptions,
  defineOptions,
  type OptionLayer,
  option,
  resolveOptions,
} from '../../../src/config/options.ts';
import { sharedTempDir } from '../../support/temp-dir.ts';

const TABLE = defineOptions({
  config: option({ kind: text('file'), help: 'config file' }),
  kvPort: option({ kind: port(), help: 'KV port', group: 'KV', default: 14_579 }),
  proxy: option({ kind: hostPort(), help: 'discovery address' }),
  sendType: option({ kind: oneOf(['PUT', 'GET']), help: 'send type', default: 'PUT' }),
  servedModelName: option({ kind: listOf(text('name')), help: 'names', default: ['demo'] }),
  enablePrefixCaching: option({ kind: toggle(), help: 'prefix cache', default: true }),
  maxNumSeqs: option({ kind: integer(1, 1024), help: 'batch', default: 8 }),
});

function resolve(args: string[], env: Record<string, string> = {}, layers: OptionLayer[] = []) {
  const command = addOptions(new Command('test').exitOverride(), TABLE);
  command.parse(args, { from: 'user' });
  return resolveOptions(TABLE, command, env, () => layers);
}

const folder = sharedTempDir();
let files = 0;

function file(content: unknown): string {
  const path = join(folder, `${++files}.json`);
  writeFileSync(path, typeof content === 'string' ? content : JSON.stringify(content));
  return path;
}

describe('options', () => {
  it('ranks flags over environment over file over layers over defaults', () => {
    const config = file({ 'kv-port': '3', max_num_seqs: 30, sendType: 'GET' });
    const layer: OptionLayer = {
      values: { kvPort: { value: 4, label: 'kv_port' }, proxy: { value: '[::1]:9', label: 'proxy' } },
    };
    const all = resolve(['--kv-port', '1', '--config', config], { PD_KV_PORT: '2' }, [layer]);
    expect(all.kvPort).toBe(1);
    expect(resolve(['--config', config], { PD_KV_PORT: '2' }, [layer]).kvPort).toBe(2);
    const fromFile = resolve([], { PD_CONFIG: config }, [layer]);
    expect(fromFile.kvPort).toBe(3);
    expect(fromFile.maxNumSeqs).toBe(30);
    expect(fromFile.sendType).toBe('GET');
    expect(fromFile.proxy).toEqual({ host: '::1', port: 9 });
    expect(resolve([], {}, [layer]).kvPort).toBe(4);
    const none = resolve([]);
    expect(none.kvPort).toBe(14_579);
    expect(none.proxy).toBeUndefined();
  });

  it('takes a switch both ways from every place', () => {
    expect(resolve([]).enablePrefixCaching).toBe(true);
    expect(resolve(['--no-enable-prefix-caching']).enablePrefixCaching).toBe(false);
    const env = { PD_ENABLE_PREFIX_CACHING: '0' };
    expect(resolve([], env).enablePrefixCaching).toBe(false);
    expect(resolve(['--enable-prefix-caching'], env).enablePrefixCaching).toBe(true);
    expect(resolve(['--config', file({ enable_prefix_caching: false })]).enablePrefixCaching).toBe(false);
  });

  it('takes lists repeated, together, and by commas in the environment', () => {
    const names = ['a', 'b'];
    const repeated = ['--served-model-name', 'a', '--served-model-name', 'b'];
    expect(resolve(repeated).servedModelName).toEqual(names);
    expect(resolve(['--served-model-name', 'a', 'b']).servedModelName).toEqual(names);
    expect(resolve([], { PD_SERVED_MODEL_NAME: 'a,b' }).servedModelName).toEqual(names);
    expect(resolve(['--config', file({ 'served-model-name': 'a' })]).servedModelName).toEqual(['a']);
  });

  it.each([
    [() => resolve(['--kv-port', '70000']), /^--kv-port: "70000" is not allowed; expected a port from 0/],
    [() => resolve([], { PD_SEND_TYPE: 'POST' }), /^PD_SEND_TYPE.*"POST".*one of PUT, GET/],
    [() => resolve(['--config', file({ 'max-num-seqs': 0 })]), /^"max-num-seqs" in .*json: 0 .*1 to 1024/],
    [
      () => resolve(['--config', file({ sendtyp: 'PUT' })]),
      /^"sendtyp" in .* is not an option; known are .*send-type/,
    ],
    [() => resolve(['--config', file('{nonsense')]), /is not JSON/],
    [() => resolve(['--config', file([1])]), /must hold one JSON object/],
    [() => resolve(['--config', '/nonexistent/x.json']), /cannot read the config file \/nonexistent\/x.json/],
    [() => resolve(['--proxy', 'localhost']), /^--proxy: "localhost".*HOST:PORT/],
    [() => resolve(['--served-model-name', 'a', '']), /^--served-model-name: "a" "" is not allowed/],
    [
      () => resolve([], {}, [{ values: { kvPort: { value: 'x', label: 'kv_port of the JSON' } } }]),
      /^kv_port of the JSON: "x"/,
    ],
  ])('names the place of a bad value and what is allowed (%#)', (act, message) => {
    expect(act).toThrow(
      expect.objectContaining({ code: 'CONFIG_INVALID', message: expect.stringMatching(message) }),
    );
  });

  it('writes help in groups, with defaults', () => {
    const help = addOptions(new Command('test'), TABLE).helpInformation();
    expect(help).toMatch(/KV:\n\s+--kv-port <port>\s+KV port \(default: 14579\)/);
    expect(help).toContain('--no-enable-prefix-caching');
    expect(help).not.toMatch(/ --enable-prefix-caching/);
  });

  it('says how a flag is written elsewhere, where nobody would guess it', () => {
    let help = '';
    const command = addOptions(new Command('test'), TABLE).configureOutput({
      writeOut: (text) => (help += text),
    });
    command.outputHelp();
    expect(help).toContain('--kv-port as PD_KV_PORT');
    expect(help).toContain('--no-enable-prefix-caching as PD_ENABLE_PREFIX_CACHING=false');
    expect(help).toContain('several values with commas between them');
    expect(help).toContain('{"kv-port": 14579}');
  });
});

describe('kinds', () => {
  const read = <T>(kind: Kind<T>, value: unknown) => kind.schema.safeParse(value).data;

  it.each([
    ['1e9', 1e9],
    [1e9, 1e9],
    ['512MiB', 512 * 2 ** 20],
    ['2GB', 2e9],
    ['1.5 gib', 1.5 * 2 ** 30],
    ['0', 0],
    ['', undefined],
    ['-1', undefined],
    ['lots', undefined],
    ['1e400', undefined],
    [null, undefined],
  ])('bytes %j', (written, value) => expect(read(bytes(), written)).toBe(value));

  it.each([
    ['60', 60_000],
    [2.5, 2_500],
    ['60s', 60_000],
    ['500ms', 500],
    ['2m', 120_000],
    ['1h', 3_600_000],
    ['-1', undefined],
    ['soon', undefined],
    ['1000h', undefined],
  ])('duration %j', (written, value) => expect(read(duration(), written)).toBe(value));

  it.each(['', ' ', 'NaN', '1.5', 'Infinity', '0x', true])('integer refuses %j', (written) =>
    expect(read(integer(0, 10), written)).toBeUndefined(),
  );
});
