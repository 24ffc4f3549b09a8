/** A receiver of OTLP/HTTP as JSON that keeps what comes, and answers as the test says. */
import { EventEmitter, once } from 'node:events';
import { createServer, type IncomingHttpHeaders, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { json } from 'node:stream/consumers';

interface Attribute {
  readonly key: string;
  readonly value: {
    readonly stringValue?: string;
    readonly intValue?: string;
    readonly doubleValue?: number;
    readonly boolValue?: boolean;
  };
}

interface SentSpan {
  readonly traceId: string;
  readonly spanId: string;
  readonly parentSpanId?: string;
  readonly traceState?: string;
  readonly name: string;
  readonly kind: number;
  readonly startTimeUnixNano: string;
  readonly endTimeUnixNano: string;
  readonly attributes: readonly Attribute[];
  readonly status?: { readonly code: number; readonly message: string };
}

interface Sent {
  readonly resourceSpans: readonly {
    readonly resource: { readonly attributes: readonly Attribute[] };
    readonly scopeSpans: readonly { readonly spans: readonly SentSpan[] }[];
  }[];
}

export interface ReceivedSpan extends Omit<SentSpan, 'attributes'> {
  /** `service.name` of whoever sent it. */
  readonly service: string;
  readonly attributes: Readonly<Record<string, string | number | boolean | undefined>>;
}

export class OtlpReceiver {
  readonly spans: ReceivedSpan[] = [];
  readonly asked: { readonly path: string | undefined; readonly headers: IncomingHttpHeaders }[] = [];
  /** `post` after each that has been read. */
  readonly events = new EventEmitter<{ post: [] }>();
  /** Absent: no answer. */
  status: number | undefined = 200;
  readonly #server: Server;

  private constructor() {
    this.#server = createServer(async (request, out) => {
      const sent = (await json(request).catch(() => undefined)) as Sent | undefined;
      if (!sent) return; // whoever sent it has given up
      this.asked.push({ path: request.url, headers: request.headers });
      for (const { resource, scopeSpans } of sent.resourceSpans) {
        const service = String(valuesOf(resource.attributes)['service.name']);
        for (const { spans } of scopeSpans)
          for (const { attributes, ...span } of spans)
            this.spans.push({ ...span, service, attributes: valuesOf(attributes) });
      }
      this.events.emit('post');
      if (this.status !== undefined) out.writeHead(this.status).end('{}');
    });
  }

  static async start(): Promise<OtlpReceiver> {
    const receiver = new OtlpReceiver();
    receiver.#server.listen(0, '127.0.0.1');
    await once(receiver.#server, 'listening');
    return receiver;
  }

  get url(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  traceOf(traceId: string): readonly ReceivedSpan[] {
    return this.spans.filter((span) => span.traceId === traceId);
  }

  async close(): Promise<void> {
    this.#server.closeAllConnections();
    this.#server.close();
    await once(this.#server, 'close');
  }
}

function valuesOf(attributes: readonly Attribute[]) {
  return Object.fromEntries(
    attributes.map(({ key, value: { stringValue, intValue, doubleValue, boolValue } }) => [
      key,
      stringValue ?? (intValue === undefined ? undefined : Number(intValue)) ?? doubleValue ?? boolValue,
    ]),
  );
}
