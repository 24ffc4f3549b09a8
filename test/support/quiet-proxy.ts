/** A proxy in this process, on free ports, that says nothing and forgets no instance; with fake-upstream.ts on either side of it. */
import { type ProxyConfigInput, proxyConfig } from '../../src/config/proxy-config.ts';
import { PdProxy } from '../../src/proxy/proxy.ts';
import type { OpenBodies } from '../../src/proxy/serving.ts';

type QuietSettings = Omit<ProxyConfigInput, 'http' | 'discovery' | 'log'> & { readonly host?: string };

/** The caller closes it. */
export function startQuietProxy(
  { host = '127.0.0.1', ...settings }: QuietSettings = {},
  openBodies?: OpenBodies,
): Promise<PdProxy> {
  const config = proxyConfig({
    http: { host, port: 0 },
    discovery: { host, port: 0 },
    instanceTimeoutMs: 60_000,
    prefillTimeoutMs: 60_000,
    decodeIdleTimeoutMs: 60_000,
    drainTimeoutMs: 60_000,
    log: { level: 'silent', format: 'json' },
    ...settings,
  });
  return PdProxy.start(config, openBodies);
}
