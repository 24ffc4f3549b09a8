/** A proxy in this process, and instances that it lists; each is gone at the end of its test. */
import { setImmediate } from 'node:timers/promises';
import { onTestFinished } from 'vitest';
import { formatHostPort } from '../../src/net/address.ts';
import type { PdProxy } from '../../src/proxy/proxy.ts';
import { type Answer, answerJson, FakeUpstream, type FakeUpstreamOptions } from './fake-upstream.ts';
import { startQuietProxy } from './quiet-proxy.ts';

export async function startProxy(settings?: Parameters<typeof startQuietProxy>[0]): Promise<PdProxy> {
  const proxy = await startQuietProxy(settings);
  onTestFinished(() => proxy.close(0));
  return proxy;
}

/** `digest`: of its fingerprint. */
export async function startUpstream(
  proxy: PdProxy,
  role: 'producer' | 'consumer',
  answer: Answer = answerJson(),
  { digest, ...options }: FakeUpstreamOptions & { readonly digest?: string | undefined } = {},
): Promise<FakeUpstream> {
  const upstream = await FakeUpstream.start(role, answer, options);
  onTestFinished(() => upstream.kill());
  await upstream.ping(proxy.discoveryAddress, digest);
  while (!proxy.instances.some((known) => known.httpAddress === upstream.httpAddress)) await setImmediate();
  return upstream;
}

export const url = (proxy: PdProxy, path = '/v1/completions') =>
  `http://${formatHostPort(proxy.httpAddress)}${path}`;
