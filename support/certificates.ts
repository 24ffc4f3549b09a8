/** Certificates for tests, made by openssl: an authority, and what it signs for 127.0.0.1, ::1 and localhost. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

/** Paths of PEM files. */
export interface Certificate {
  readonly cert: string;
  readonly key: string;
}

export class Authority {
  readonly #dir: string;
  /** Its own certificate: what others trust. */
  readonly ca: string;
  readonly #key: string;
  #count = 0;

  constructor(dir: string, name = 'authority') {
    this.#dir = join(dir, name);
    mkdirSync(this.#dir, { recursive: true });
    this.ca = join(this.#dir, 'ca.pem');
    this.#key = join(this.#dir, 'ca-key.pem');
    openssl([
      'req',
      '-x509',
      ...NEW_KEY,
      '-subj',
      `/CN=${name}`,
      '-days',
      '2',
      '-keyout',
      this.#key,
      '-out',
      this.ca,
    ]);
  }

  /** `expired`: since 2020. */
  sign(subject: string, { expired = false } = {}): Certificate {
    const at = join(this.#dir, `${++this.#count}`);
    const [cert, key, request, config, index] = ['.pem', '-key.pem', '.csr', '.cnf', '.txt'].map(
      (end) => at + end,
    );
    const serial = `${at}.serial`;
    openssl(['req', '-new', ...NEW_KEY, '-subj', `/CN=${subject}`, '-keyout', key!, '-out', request!]);
    writeFileSync(index!, '');
    writeFileSync(serial, `0${this.#count}`);
    writeFileSync(
      config!,
      `[ca]\ndefault_ca=it\n[it]\ndatabase=${index}\nserial=${serial}\nnew_certs_dir=${this.#dir}\ndefault_md=sha256\n` +
        `policy=any\nx509_extensions=names\n[any]\ncommonName=supplied\n` +
        `[names]\nsubjectAltName=IP:127.0.0.1,IP:::1,DNS:localhost,DNS:${subject}\n`,
    );
    const [from, until] = expired
      ? ['20200101000000Z', '20200201000000Z']
      : ['20200101000000Z', '20990101000000Z'];
    const signer = ['-cert', this.ca, '-keyfile', this.#key, '-startdate', from!, '-enddate', until!];
    openssl(['ca', '-batch', '-notext', '-config', config!, ...signer, '-in', request!, '-out', cert!]);
    return { cert: cert!, key: key! };
  }
}

const NEW_KEY = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes'];

function openssl(argv: readonly string[]): void {
  execFileSync('openssl', argv, { stdio: ['ignore', 'ignore', 'pipe'] });
}
