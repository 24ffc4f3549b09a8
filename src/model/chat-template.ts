/** Chat messages into the text a model was trained on, by the template that comes with its checkpoint. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Template } from '@huggingface/jinja';
import { PdError } from '../errors.ts';
import { z } from '../zod.ts';
import { invalid } from './checked.ts';
import { readJson } from './json-file.ts';

export interface ChatMessage {
  readonly role: string;
  readonly content: string;
  readonly [key: string]: unknown;
}

/** A checkpoint may name several templates; the one for plain chats is called `default`. */
const namedTemplates = z.array(z.looseObject({ name: z.string(), template: z.string() }));

/** The template's source: from chat_template.jinja, chat_template.json or tokenizer_config.json; undefined where there is none. */
export async function readChatTemplate(dir: string, tokenizerConfig: unknown): Promise<string | undefined> {
  try {
    return await readFile(join(dir, 'chat_template.jinja'), 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') {
      throw PdError.from(error, 'CHECKPOINT_INVALID');
    }
  }
  return templateIn(await readJson(join(dir, 'chat_template.json'))) ?? templateIn(tokenizerConfig);
}

function templateIn(json: unknown): string | undefined {
  const parsed = z.looseObject({ chat_template: z.unknown() }).safeParse(json);
  const value = parsed.success ? parsed.data.chat_template : undefined;
  if (typeof value === 'string') return value;
  const named = namedTemplates.safeParse(value);
  if (!named.success) return undefined;
  return (named.data.find(({ name }) => name === 'default') ?? named.data[0])?.template;
}

/** A template ready to use. Throws CHECKPOINT_INVALID where its syntax is broken. */
export class ChatTemplate {
  readonly #template: Template;
  readonly #tokens: Readonly<Record<string, string>>;

  /** `tokens`: texts of special tokens, by the names templates use: `bos_token`, `eos_token`, ... */
  constructor(source: string, tokens: Readonly<Record<string, string>>, dir: string) {
    try {
      this.#template = new Template(source);
    } catch (cause) {
      throw invalid(`${dir}: the chat template cannot be parsed`, cause);
    }
    this.#tokens = tokens;
  }

  /** The library brings `raise_exception` and `strftime_now`. Throws REQUEST_INVALID where the template refuses the messages (most do for unknown roles or a wrong order). */
  render(messages: readonly ChatMessage[], addGenerationPrompt: boolean): string {
    try {
      return this.#template.render({
        ...this.#tokens,
        messages,
        add_generation_prompt: addGenerationPrompt,
      });
    } catch (cause) {
      throw new PdError(
        'REQUEST_INVALID',
        `messages do not fit the chat template: ${PdError.from(cause).message}`,
        {},
        { cause },
      );
    }
  }
}
