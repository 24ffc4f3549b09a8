/** Renders chat messages as the text that a model was trained on, by the template that comes with its checkpoint. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Template } from '@huggingface/jinja';
import { PdError } from '../errors.ts';
import { z } from '../zod.ts';
import { invalid, readJson } from './checked.ts';

export interface ChatMessage {
  readonly role: string;
  readonly content: string;
  readonly [key: string]: unknown;
}

export interface RenderOptions {
  /** Begin the model's answer; the default. */
  readonly addGenerationPrompt?: boolean;
  /** Continue the last message, which stays open. */
  readonly continueFinalMessage?: boolean;
  /** As OpenAI's API takes them. */
  readonly tools?: readonly unknown[];
  /** Further variables of the template (`chat_template_kwargs`). */
  readonly variables?: Readonly<Record<string, unknown>>;
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
  readonly source: string;
  readonly #template: Template;
  readonly #tokens: Readonly<Record<string, string>>;

  /** `tokens`: texts of special tokens, by the names templates use: `bos_token`, `eos_token`, ... */
  constructor(source: string, tokens: Readonly<Record<string, string>>, dir: string) {
    try {
      this.#template = new Template(source);
    } catch (cause) {
      throw invalid(`${dir}: the chat template cannot be parsed`, cause);
    }
    this.source = source;
    this.#tokens = tokens;
  }

  /** The library brings `raise_exception` and `strftime_now`. Throws REQUEST_INVALID where the template refuses the messages (most do for unknown roles or a wrong order). */
  render(
    messages: readonly ChatMessage[],
    { addGenerationPrompt = true, continueFinalMessage = false, tools, variables }: RenderOptions = {},
  ): string {
    let text: string;
    try {
      text = this.#template.render({
        ...this.#tokens,
        ...variables,
        messages,
        tools: tools ?? null,
        add_generation_prompt: addGenerationPrompt && !continueFinalMessage,
      });
    } catch (cause) {
      throw PdError.because('REQUEST_INVALID', 'messages do not fit the chat template', cause);
    }
    return continueFinalMessage ? openEnded(text, messages.at(-1)?.content ?? '') : text;
  }
}

/** Without what the template writes after the last message. Throws REQUEST_INVALID if that message is not in the text. */
function openEnded(text: string, last: string): string {
  const trimmed = last.trim();
  const at = text.lastIndexOf(trimmed);
  if (trimmed === '' || at < 0) {
    const why = 'the chat template does not write the last message as it is, so it cannot be gone on with';
    throw new PdError('REQUEST_INVALID', why);
  }
  // Many templates trim what they write.
  const kept = last.trimStart();
  return text.slice(0, at + (text.startsWith(kept, at) ? kept : trimmed).length);
}
