/** A reader thread that says what a test tells it to. */
import type { Transferable } from 'node:worker_threads';
import type { FromReader, ReaderPort, ReadingJob } from '../../src/reading-thread.ts';
import type { Readings, Route, ToReader } from '../../src/worker/request-body-reader.ts';

export class ScriptedReader<Job extends ReadingJob, Reading> implements ReaderPort<Job, Reading> {
  readonly received: Job[] = [];
  terminated = false;
  #heard: () => void = () => {};
  emit: (message: FromReader<Reading>) => void = () => {};
  exit: (error: Error | undefined) => void = () => {};

  post(message: Job, transfer: readonly Transferable[] = []): void {
    this.received.push(structuredClone(message, { transfer: [...transfer] }));
    this.#heard();
  }

  /** Resolves when it has been given so many bodies. */
  async until(count: number): Promise<void> {
    while (this.received.length < count) {
      await new Promise<void>((resolve) => {
        this.#heard = resolve;
      });
    }
  }

  onMessage(listener: (message: FromReader<Reading>) => void): void {
    this.emit = listener;
  }

  onExit(listener: (error: Error | undefined) => void): void {
    this.exit = listener;
  }

  async terminate(): Promise<void> {
    this.terminated = true;
  }

  get texts(): string[] {
    return this.received.map(({ body }) => new TextDecoder().decode(body));
  }
}

/** A worker's. */
export class FakeReaderThread extends ScriptedReader<ToReader, Readings[Route]> {
  /** Answers what it is reading with its text. */
  answer(): void {
    this.emit({ type: 'read', reading: this.received.at(-1)!.body });
  }
}
