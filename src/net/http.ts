/** HTTP by name, for our own tools: every address of the name is tried. */
import { Agent, fetch, type RequestInit, type Response } from 'undici';
import { EVERY_ADDRESS } from './resolve.ts';

export type { Response } from 'undici';

let agent: Agent | undefined;

/** `fetch`, but every address of the name is tried. */
export function fetchAll(url: string, init: RequestInit = {}): Promise<Response> {
  agent ??= new Agent({ connect: EVERY_ADDRESS });
  return fetch(url, { ...init, dispatcher: agent });
}

/** A GET, with a deadline for the whole of it, body included. */
export function ask(url: string, timeoutMs: number): Promise<Response> {
  return fetchAll(url, { signal: AbortSignal.timeout(timeoutMs) });
}
