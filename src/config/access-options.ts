/** Who may use an HTTP server, and how it is reached: the options that worker and proxy share. */
import { listOf, text } from './kinds.ts';
import { grouped, option } from './options.ts';

export interface AccessConfig {
  /** File of the keys that callers must show (access/keys.ts). Absent: anybody may call. */
  readonly apiKeyFile?: string;
  /** PEM files of the server's certificate, with its chain, and its key: both or neither. Absent: plain HTTP. */
  readonly tlsCert?: string;
  readonly tlsKey?: string;
  /** PEM file of the authorities whose certificates clients must show. Absent: they show none. */
  readonly tlsClientCa?: string;
  /** Origins whose pages may call from a browser; `*`: any. */
  readonly corsOrigins: readonly string[];
}

const file = text('file');

export const ACCESS_OPTIONS = grouped('Keys and TLS', {
  apiKeyFile: option({
    field: 'access.apiKeyFile',
    kind: file,
    help: 'keys that callers must show, a line each: NAME KEY [admin] [until=DATE]; read again when it changes',
    defaultText: 'no key is needed',
  }),
  tlsCert: option({
    field: 'access.tlsCert',
    kind: file,
    help: 'certificate of this server, with its chain (PEM); read again when it changes',
    defaultText: 'plain HTTP',
  }),
  tlsKey: option({ field: 'access.tlsKey', kind: file, help: 'its private key (PEM)' }),
  tlsClientCa: option({
    field: 'access.tlsClientCa',
    kind: file,
    help: 'clients must show a certificate of one of these authorities (PEM)',
    defaultText: 'none is asked for',
  }),
  corsOrigins: option({
    field: 'access.corsOrigins',
    kind: listOf(text('origin')),
    help: 'origins whose web pages may call, such as https://chat.example, or *',
    default: [],
    defaultText: 'none',
  }),
});
