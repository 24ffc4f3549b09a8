import { connect } from 'node:net';
import { text } from 'node:stream/consumers';
import type { HostPort } from '../../src/net/address.ts';

/** What a client gets that sends all of a body before it reads, then one more request on the same connection: the status of each answer. */
export async function statusesAfterBody(
  { host, port }: HostPort,
  path: string,
  bytes: number,
): Promise<readonly string[]> {
  const socket = connect(port, host);
  try {
    await new Promise<void>((resolve, reject) => {
      socket.on('error', reject);
      socket.write(
        `POST ${path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${bytes}\r\n\r\n`,
      );
      socket.write(Buffer.alloc(bytes, ' '), (error) => (error ? reject(error) : resolve()));
    });
    socket.end('GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n');
    const answers = await text(socket);
    return [...answers.matchAll(/HTTP\/1\.1 (\d+)/g)].map(([, status]) => status!);
  } finally {
    socket.destroy();
  }
}
