/** Certificates of an HTTP server and of a client: PEM files, read again when they change. */
import { readFileSync } from 'node:fs';
import { createSecureContext, type SecureContextOptions } from 'node:tls';
import { PdError } from '../errors.ts';
import type { Logger } from '../observability/log.ts';
import { watchFiles } from './watch-files.ts';

/** Paths of PEM files. */
export interface TlsFiles {
  /** A certificate with its chain, and its private key: both or neither. */
  readonly cert?: string | undefined;
  readonly key?: string | undefined;
  /** Authorities that the other end's certificate must come from. */
  readonly ca?: string | undefined;
}

/** The option that each file was given by, for messages. */
export type TlsOptionNames = Readonly<Record<keyof TlsFiles, string>>;

/** Throws CONFIG_INVALID that names the option: a certificate without a key, a file that cannot be read, or that holds something else. */
export function readTls(files: TlsFiles, names: TlsOptionNames): SecureContextOptions {
  const { cert, key } = files;
  if ((cert === undefined) !== (key === undefined)) {
    const [given, lacks] = cert === undefined ? ([names.key, names.cert] as const) : [names.cert, names.key];
    throw new PdError('CONFIG_INVALID', `${given} needs ${lacks}`);
  }
  const read = (name: keyof TlsFiles): Buffer | undefined => {
    const path = files[name];
    if (path === undefined) return undefined;
    try {
      return readFileSync(path);
    } catch (cause) {
      throw new PdError('CONFIG_INVALID', `${names[name]}: ${(cause as Error).message}`, {}, { cause });
    }
  };
  const options = { cert: read('cert'), key: read('key'), ca: read('ca') };
  try {
    createSecureContext(options);
  } catch (cause) {
    const given = (Object.keys(names) as (keyof TlsFiles)[]).filter((name) => files[name] !== undefined);
    const which = given.map((name) => `${names[name]} ${files[name]}`).join(', ');
    throw new PdError('CONFIG_INVALID', `${which}: ${(cause as Error).message}`, {}, { cause });
  }
  return options;
}

/** Calls `changed` with what the files hold whenever one of them changes; what cannot be used is logged, and changes nothing. */
export function watchTls(
  files: TlsFiles,
  names: TlsOptionNames,
  log: Logger,
  changed: (options: SecureContextOptions) => void,
): () => void {
  const look = (): void => {
    try {
      changed(readTls(files, names));
      log.info(`${names.cert} and ${names.key} have been read again`);
    } catch (error) {
      const { code, message } = PdError.from(error);
      // Certificate and key are replaced one after the other: the second change puts it right.
      log.error({ code }, `${message}. The certificate read before stays in use`);
    }
  };
  const paths = Object.values(files).filter((path) => path !== undefined);
  return watchFiles(paths, look);
}
