/** The demo model's tokenizer, padded for a checkpoint of random weights (scripts/model-reference/padded_tokenizer.py). */
import { execFileSync } from 'node:child_process';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { PROMPTS } from '../../../scripts/demo-checks.ts';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import { Tokenizer } from '../../../src/model/tokenizer.ts';
import { pythonWith } from '../../../support/python-peer.ts';
import { tempDir } from '../../support/temp-dir.ts';

const SCRIPTS = fileURLToPath(new URL('../../../scripts/model-reference', import.meta.url));
const PAD = `
import sys
from pathlib import Path
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
from padded_tokenizer import write_tokenizer
write_tokenizer(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
`;
const python = pythonWith('json');

test.skipIf(python === undefined)(
  'encodes as before, and every further id has a text of its own',
  async () => {
    const dir = await tempDir();
    const vocab = 128_256; // of a Llama 3
    execFileSync(python!, ['-c', PAD, SCRIPTS, demoModelDir(), dir, String(vocab)]);
    const config = JSON.parse(await readFile(join(demoModelDir(), 'config.json'), 'utf8')) as object;
    await writeFile(join(dir, 'config.json'), JSON.stringify({ ...config, vocab_size: vocab }));

    const demo = await Tokenizer.load(demoModelDir());
    const padded = await Tokenizer.load(dir);
    for (const text of [...PROMPTS.map(({ prompt }) => prompt), ' pad2048 and pad128255']) {
      expect(padded.encode(text)).toEqual(demo.encode(text));
    }
    const ids = Array.from({ length: vocab }, (_, id) => id);
    const [known, further] = [ids.slice(0, 2_048), ids.slice(2_048)];
    expect(known.map((id) => padded.decode([id]))).toEqual(known.map((id) => demo.decode([id])));
    const texts = new Set(further.map((id) => padded.decode([id])));
    expect(texts.size).toBe(further.length);
    expect(texts).not.toContain('');
    expect(padded.chatTemplate).toBeDefined();
  },
);
