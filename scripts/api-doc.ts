/** Writes the table of fields in docs/api.md from the schemas of the server: `npx tsx scripts/api-doc.ts`. A test checks that it is current. */
import { readFileSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import {
  type FieldStatus,
  fieldsOf,
  GENERATION_PATHS,
  type GenerationPath,
} from '../src/worker/server/openapi.ts';

export const API_DOC = fileURLToPath(new URL('../docs/api.md', import.meta.url));
const HEAD = '| field | chat/completions | completions | responses |';

/** What OpenAI's API and vLLM take: of all three routes, then of each. */
const BOTH =
  'allowed_token_ids bad_words cache_salt frequency_penalty ignore_eos include_stop_str_in_output kv_transfer_params length_penalty logit_bias ' +
  'logits_processors max_tokens metadata min_p min_tokens model n presence_penalty priority prompt_logprobs repetition_penalty request_id ' +
  'return_token_ids return_tokens_as_token_ids seed service_tier skip_special_tokens spaces_between_special_tokens stop stop_token_ids stream ' +
  'stream_options structured_outputs temperature top_k top_p truncate_prompt_tokens use_beam_search user vllm_xargs';
const FIELDS: Readonly<Record<GenerationPath, string>> = {
  '/v1/chat/completions':
    `${BOTH} add_generation_prompt add_special_tokens audio best_of chat_template chat_template_kwargs continue_final_message documents echo ` +
    'function_call functions guided_choice guided_grammar guided_json guided_regex guided_whitespace_pattern include_reasoning logprobs ' +
    'max_completion_tokens messages mm_processor_kwargs modalities parallel_tool_calls prediction prompt_cache_key prompt_cache_retention reasoning_effort response_format ' +
    'safety_identifier store tool_choice tools top_logprobs verbosity web_search_options',
  '/v1/completions':
    `${BOTH} add_special_tokens best_of echo guided_choice guided_grammar guided_json guided_regex guided_whitespace_pattern logprobs prompt ` +
    'prompt_embeds response_format suffix',
  '/v1/responses':
    'background cache_salt conversation include input instructions max_output_tokens max_tool_calls metadata model parallel_tool_calls ' +
    'previous_response_id priority prompt prompt_cache_key prompt_cache_retention reasoning safety_identifier seed service_tier store stream ' +
    'stream_options temperature text tool_choice tools top_k top_logprobs top_p truncation user',
};

/** Where one word is not all. */
const NOTES: Readonly<Record<string, string>> = {
  best_of: 'refused, but for the value of `n`',
};

/** Fields of OpenAI and vLLM that nothing is decided of, as `path field`. */
export function undecided(): string[] {
  return GENERATION_PATHS.flatMap((path) => {
    const known = fieldsOf(path);
    return FIELDS[path]
      .split(' ')
      .filter((field) => !known.has(field))
      .map((field) => `${path} ${field}`);
  });
}

export function renderFields(): string {
  const byPath = GENERATION_PATHS.map((path) => ({
    known: fieldsOf(path),
    asked: new Set(FIELDS[path].split(' ')),
  }));
  const names = new Set(byPath.flatMap(({ known, asked }) => [...known.keys(), ...asked]));
  const rows = [...names].sort().map((name) => {
    const cells = byPath.map(({ known, asked }) => {
      const cell = cellOf(known.get(name), asked.has(name));
      return cell === 'done' ? (NOTES[name] ?? cell) : cell;
    });
    return cells.some((cell) => cell !== '') ? `| \`${name}\` | ${cells.join(' | ')} |` : '';
  });
  return [HEAD, '|---|---|---|---|', ...rows.filter((row) => row !== '')].join('\n');
}

/** A field of another route, which here has no meaning, is left out. */
function cellOf(status: FieldStatus | undefined, asked: boolean): string {
  if (!status || (status.is !== 'done' && !asked)) return '';
  if (status.is !== 'refused') return status.is;
  const but = status.but.map((value) => `\`${JSON.stringify(value)}\``);
  return but.length > 0 ? `refused, but for ${but.join(', ')}` : 'refused';
}

/** The page with the table in the place of the one that it has. */
export function renderPage(page: string): string {
  const from = page.indexOf(HEAD);
  const to = page.indexOf('\n\n', from);
  return page.slice(0, from) + renderFields() + (to < 0 ? '\n' : page.slice(to));
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  writeFileSync(API_DOC, renderPage(readFileSync(API_DOC, 'utf8')));
}
