/** A proxy in this process, on free ports, that says nothing and forgets no instance; with fake-upstream.ts on either side of it. */
import type { ProxyConfig } from '../../src/config/proxy-config.ts';
import { PdProxy, type ProxyParts } from '../../src/proxy/proxy.ts';

interface QuietSettings {
  readonly host?: string;
  readonly overlap?: number;
  readonly prefillTimeoutMs?: number;
  readonly decodeIdleTimeoutMs?: number;
}

/** The caller closes it. */
export function startQuietProxy(
  { host = '127.0.0.1', ...settings }: QuietSettings = {},
  parts?: ProxyParts,
): Promise<PdProxy> {
  const config: ProxyConfig = {
    http: { host, port: 0 },
    discovery: { host, port: 0 },
    instanceTimeoutMs: 60_000,
    prefillTimeoutMs: 60_000,
    decodeIdleTimeoutMs: 60_000,
    overlap: 4,
    drainTimeoutMs: 60_000,
    log: { level: 'silent', format: 'json' },
    ...settings,
  };
  return PdProxy.start(config, parts);
}
