import { copyFile, readFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import { readPieces } from '../../../src/model/token-pieces.ts';
import { type Decoding, IncrementalDecoder, Tokenizer } from '../../../src/model/tokenizer.ts';
import { demoReference } from '../../support/references.ts';
import { tempDir } from '../../support/temp-dir.ts';

let tokenizer: Tokenizer;
beforeAll(async () => {
  tokenizer = await Tokenizer.load(demoModelDir());
});

const reference = demoReference();

describe('tokenizer', () => {
  it.each(reference.tokenization)(
    'encodes and decodes $text as transformers does',
    ({ text, ids, plain, decoded }) => {
      expect(tokenizer.encode(text)).toEqual(ids);
      expect(tokenizer.encode(text, { addSpecialTokens: false })).toEqual(plain);
      expect(tokenizer.decode(ids)).toBe(decoded);
    },
  );

  it.each(reference.chats)('renders chats as transformers does', ({ messages, rendered, ids }) => {
    expect(tokenizer.applyChatTemplate(messages)).toBe(rendered);
    expect(tokenizer.encode(rendered, { addSpecialTokens: false })).toEqual(ids);
  });

  it('shows a chat tools, and leaves its last message open where it is to be gone on with', () => {
    const messages = [
      { role: 'user', content: 'Hi' },
      { role: 'assistant', content: ' The capital ' },
    ];
    const open = tokenizer.applyChatTemplate(messages, { continueFinalMessage: true });
    expect(open).toBe('<|begin|><|user|>Hi<|eot|><|assistant|>The capital');
    expect(() =>
      tokenizer.applyChatTemplate([{ role: 'user', content: '' }], { continueFinalMessage: true }),
    ).toThrow(expect.objectContaining({ code: 'REQUEST_INVALID' }));
    const tools = [{ type: 'function', function: { name: 'f' } }];
    expect(tokenizer.applyChatTemplate(messages, { tools })).toContain(`<tools>\n${'{"type": "function"'}`);
  });

  it('decodes special tokens where it is told to', () => {
    const text = (options?: Decoding) => {
      const decoder = tokenizer.decoder(options);
      return [...tokenizer.encode('<|user|>a<|eot|>')].map((id) => decoder.push(id)).join('');
    };
    expect(text()).toBe('a');
    expect(text({ keep: ['<|eot|>', '<tool_call>'] })).toBe('a<|eot|>');
    expect(text({ skipSpecialTokens: false })).toBe('<|begin|><|user|>a<|eot|>');
  });

  it('gives back any text', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'binary' }), (text) => {
        expect(tokenizer.decode(tokenizer.encode(text), { skipSpecialTokens: false })).toBe(
          `<|begin|>${text}`,
        );
      }),
    );
  });

  it('knows its special tokens', () => {
    expect(tokenizer).toMatchObject({
      eosTokenIds: [1, 2],
      eosTokenId: 1,
      chatTemplate: expect.stringContaining('<tool_call>'),
    });
    expect(tokenizer.tokenString(2)).toBe('<|eot|>');
    expect(tokenizer.decode([2])).toBe('');
    expect(tokenizer.isSpecial(2)).toBe(true);
    expect(tokenizer.isSpecial(300)).toBe(false);
  });

  it('shows the tokens around a call of a tool, which are not special', () => {
    const text = '<tool_call>\n{}\n</tool_call>\n<tool_response>\n</tool_response>';
    const ids = tokenizer.encode(text, { addSpecialTokens: false });
    expect(ids.filter((id) => id >= 2044).map((id) => tokenizer.tokenString(id))).toEqual(
      text.match(/<.*?>/g),
    );
    expect(tokenizer.decode(ids, { skipSpecialTokens: true })).toBe(text);
  });

  it('shows a token that is part of a character by its bytes', () => {
    const [first] = tokenizer.encode('🦖', { addSpecialTokens: false });
    expect(tokenizer.tokenBytes(first!)?.[0]).toBe(0xf0);
    expect(tokenizer.tokenString(first!)).toContain('\ufffd');
  });

  it('has no text for ids outside of the vocabulary', () => {
    expect(tokenizer.decode([5000, -1, 2048])).toBe('');
    expect(tokenizer.tokenBytes(5000)).toBeUndefined();
    expect(tokenizer.decode([])).toBe('');
  });
});

describe('incremental decoding', () => {
  // Random tokens of a byte-level vocabulary: most sequences are broken UTF-8 somewhere.
  const anyIds = fc.array(fc.oneof(fc.nat(2047), fc.integer({ min: 7, max: 262 })), { maxLength: 60 });

  it('joined equals the decoding of the whole, for any tokens', () => {
    fc.assert(
      fc.property(anyIds, fc.boolean(), (ids, skipSpecialTokens) => {
        const decoder = new IncrementalDecoder(tokenizer, { skipSpecialTokens });
        const streamed = ids.map((id) => decoder.push(id)).join('') + decoder.flush();
        expect(streamed).toBe(tokenizer.decode(ids, { skipSpecialTokens }));
      }),
    );
  });

  it('equals what the bytes say, where all tokens are bytes', () => {
    fc.assert(
      fc.property(anyIds, (ids) => {
        const bytes = ids.filter((id) => !tokenizer.isSpecial(id)).map((id) => tokenizer.tokenBytes(id)!);
        const whole = new TextDecoder('utf-8', { ignoreBOM: true }).decode(Buffer.concat(bytes));
        expect(tokenizer.decode(ids)).toBe(whole);
      }),
    );
  });

  it('never breaks a character: each delta of a sound text is itself sound', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'grapheme' }), (text) => {
        const decoder = new IncrementalDecoder(tokenizer);
        const deltas = tokenizer.encode(text, { addSpecialTokens: false }).map((id) => decoder.push(id));
        if (!text.includes('\ufffd')) for (const delta of deltas) expect(delta).not.toContain('\ufffd');
        expect(deltas.join('')).toBe(text);
        expect(decoder.flush()).toBe('');
      }),
    );
  });

  it('holds an emoji back until its last token', () => {
    const ids = tokenizer.encode('🦖', { addSpecialTokens: false });
    expect(ids.length).toBeGreaterThan(1);
    const decoder = new IncrementalDecoder(tokenizer);
    expect(ids.map((id) => decoder.push(id))).toEqual([...new Array(ids.length - 1).fill(''), '🦖']);
  });

  it('gives up on a broken character at the end', () => {
    const ids = tokenizer.encode('🦖', { addSpecialTokens: false });
    const decoder = new IncrementalDecoder(tokenizer);
    expect(
      ids
        .slice(0, -1)
        .map((id) => decoder.push(id))
        .join(''),
    ).toBe('');
    expect(decoder.flush()).toBe('\ufffd');
  });
});

describe('decoders of other families', () => {
  const sentencePiece = readPieces(
    {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        { type: 'Strip', content: ' ', start: 1, stop: 0 },
      ],
    },
    'tokenizer.json',
  );
  const text = (tokens: readonly string[]) => {
    const decoder = new IncrementalDecoder({
      leadingSpaces: sentencePiece.leadingSpaces,
      piece: (id) => sentencePiece.piece(tokens[id]!),
    });
    return tokens.map((_, id) => decoder.push(id)).join('') + decoder.flush();
  };

  it('joins byte tokens of a SentencePiece vocabulary and cuts the first space', () => {
    expect(text(['▁Hello', '▁▁wor', 'ld', '<0xF0>', '<0x9F>', '<0xA6>', '<0x96>', '!'])).toBe(
      'Hello  world🦖!',
    );
    expect(text(['▁', '▁x'])).toBe(' x');
    expect(text(['<0xE2>', 'a'])).toBe('\ufffda');
  });

  it('refuses what it does not know', () => {
    expect(() => readPieces({ type: 'WordPiece' }, 'tokenizer.json')).toThrow(
      /decoder WordPiece is not supported/,
    );
    expect(() => readPieces(null, 'tokenizer.json')).toThrow(/no decoder/);
  });
});

describe('chat templates', () => {
  async function demoCopy(): Promise<string> {
    const dir = await tempDir();
    for (const file of ['config.json', 'tokenizer.json', 'tokenizer_config.json']) {
      await copyFile(join(demoModelDir(), file), join(dir, file));
    }
    return dir;
  }

  it('reads a template from tokenizer_config.json, and special tokens written as objects', async () => {
    const dir = await demoCopy();
    const path = join(dir, 'tokenizer_config.json');
    const settings = JSON.parse(await readFile(path, 'utf8'));
    const chat_template = [{ name: 'default', template: "{{ bos_token }}{{ messages[0]['content'] }}" }];
    await writeFile(path, JSON.stringify({ ...settings, bos_token: { content: '<s>' }, chat_template }));
    expect((await Tokenizer.load(dir)).applyChatTemplate([{ role: 'user', content: 'Hi' }])).toBe('<s>Hi');
  });

  it('says so where the model has none', async () => {
    const plain = await Tokenizer.load(await demoCopy());
    expect(plain.chatTemplate).toBeUndefined();
    expect(() => plain.applyChatTemplate([])).toThrow(/no chat template/);
  });

  it("passes a template's own refusal on as a bad request", async () => {
    const dir = await demoCopy();
    await writeFile(join(dir, 'chat_template.jinja'), "{{ raise_exception('roles must alternate') }}");
    const strict = await Tokenizer.load(dir);
    expect(() => strict.applyChatTemplate([])).toThrow(
      expect.objectContaining({
        code: 'REQUEST_INVALID',
        message: expect.stringContaining('roles must alternate'),
      }),
    );
  });

  it('refuses a broken template and a missing tokenizer at start', async () => {
    const dir = await demoCopy();
    await writeFile(join(dir, 'chat_template.jinja'), '{% for x in %}');
    await expect(Tokenizer.load(dir)).rejects.toMatchObject({ code: 'CHECKPOINT_INVALID' });
    await rm(join(dir, 'tokenizer.json'));
    await expect(Tokenizer.load(dir)).rejects.toMatchObject({
      code: 'CHECKPOINT_INVALID',
      message: expect.stringContaining('tokenizer.json'),
    });
  });
});
