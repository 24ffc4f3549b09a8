/** Headers that belong to one connection (RFC 9110, 7.6.1): who passes a message on leaves them out, and frames its body anew. Lower case. */
export const HOP_HEADERS: ReadonlySet<string> = new Set([
  'connection',
  'keep-alive',
  'proxy-authenticate',
  'proxy-authorization',
  'te',
  'trailer',
  'transfer-encoding',
  'upgrade',
]);
