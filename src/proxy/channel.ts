/**
 * Messages between two processes over a socket: JSON, one line for all that a turn of the event loop has to say. A request takes five of
 * them, so under load it is the line that costs, and it is shared.
 */
import type { Socket } from 'node:net';

const LF = 0x0a;
/** Of a line: many times what the requests of one turn are. */
const MAX_LINE = 256 * 2 ** 20;

export class Channel<Out, In> {
  readonly #socket: Socket;
  readonly #onMessage: (message: In) => void;
  #outgoing: Out[] = [];
  /** Of a line that is not whole yet. */
  #held: Buffer[] = [];
  #heldBytes = 0;

  /** Both ends are ours, and believed. `onEnd`: the other process has ended. */
  constructor(socket: Socket, onMessage: (message: In) => void, onEnd: () => void) {
    this.#socket = socket;
    this.#onMessage = onMessage;
    socket.on('data', (bytes: Buffer) => this.#read(bytes));
    socket.on('error', () => socket.destroy());
    socket.once('close', onEnd);
  }

  /** Goes at the end of this turn of the loop. */
  send(message: Out): void {
    if (this.#outgoing.push(message) === 1) setImmediate(() => this.#flush());
  }

  /** Resolves once all has been written. */
  close(): Promise<void> {
    this.#flush();
    return new Promise((resolve) => this.#socket.end(resolve));
  }

  #flush(): void {
    const messages = this.#outgoing;
    if (messages.length === 0) return;
    this.#outgoing = [];
    if (this.#socket.writable) this.#socket.write(`${JSON.stringify(messages)}\n`);
  }

  #read(bytes: Buffer): void {
    let from = 0;
    for (let end = bytes.indexOf(LF); end >= 0; end = bytes.indexOf(LF, from)) {
      this.#held.push(bytes.subarray(from, end));
      const line = Buffer.concat(this.#held).toString('utf8');
      this.#held = [];
      this.#heldBytes = 0;
      from = end + 1;
      for (const message of JSON.parse(line) as In[]) this.#onMessage(message);
    }
    if (from === bytes.length) return;
    this.#held.push(bytes.subarray(from));
    this.#heldBytes += bytes.length - from;
    if (this.#heldBytes > MAX_LINE) this.#socket.destroy();
  }
}
