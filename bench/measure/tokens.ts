/** Vocabularies to measure grammars over. */
import { readFileSync } from 'node:fs';
import { byteLevelBytes } from '../../src/model/byte-level.ts';

const MADE_UP_TOKENS = 128_000;

/** By id; undefined: special. `file`: the tokenizer.json of a byte-level BPE. */
export function tokensOf(file: string): (Uint8Array | undefined)[] {
  const { model } = JSON.parse(readFileSync(file, 'utf8')) as { model: { vocab: Record<string, number> } };
  const found: (Uint8Array | undefined)[] = [];
  for (const [token, id] of Object.entries(model.vocab)) found[id] = byteLevelBytes(token);
  return Array.from(found, (bytes) => bytes);
}

/** Words with and without marks around them, and all bytes. */
export function madeUpTokens(): Uint8Array[] {
  const found = Array.from({ length: 256 }, (_, byte) => Uint8Array.of(byte));
  const syllables = [
    'a',
    'be',
    'cor',
    'di',
    'en',
    'fra',
    'go',
    'hu',
    'il',
    'ju',
    'ka',
    'lo',
    'mi',
    'ne',
    'os',
    'pre',
    'qu',
    'ra',
    'st',
    'tion',
    'un',
    'ver',
    'wi',
    'é',
    '你',
    'ß',
  ];
  const around = ['', ' ', ' "', '"', '."', '",', '":', ')', ',', '\n', '  ', '_', '-', '1', '000'];
  const encoder = new TextEncoder();
  for (const mark of [...around, '{"', '"}', '"},', '[{"', '":"', '": "', '", "'])
    found.push(encoder.encode(mark));
  for (const one of syllables) {
    for (const two of ['', ...syllables]) {
      for (const three of ['', ...syllables]) {
        for (const mark of around) {
          if (found.length >= MADE_UP_TOKENS) return found;
          found.push(
            encoder.encode(
              mark === ' ' || mark === ' "' ? mark + one + two + three : one + two + three + mark,
            ),
          );
        }
      }
    }
  }
  return found;
}
