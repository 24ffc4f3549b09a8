/** `format`: texts of each, perhaps not all of them. */
import type { Expression } from './expression.ts';
import { regexExpression } from './regex.ts';

const OCTET = '(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)';
const IPV4 = `${OCTET}(?:\\.${OCTET}){3}`;
const GROUP = '[0-9a-fA-F]{1,4}';
const IPV6 = [
  `(?:${GROUP}:){7}${GROUP}`,
  `(?:${GROUP}:){1,7}:`,
  ...[1, 2, 3, 4, 5, 6].map((after) => `(?:${GROUP}:){1,${7 - after}}(?::${GROUP}){${after}}`),
  `:(?::${GROUP}){1,7}`,
  '::',
].join('|');
const LEAP_YEAR = '(?:\\d\\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)';
const DATE = `(?:\\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\\d|30)|02-(?:0[1-9]|1\\d|2[0-8]))|${LEAP_YEAR}-02-29)`;
const CLOCK = '(?:[01]\\d|2[0-3]):[0-5]\\d';
const TIME = `${CLOCK}:[0-5]\\d(?:\\.\\d{1,9})?(?:Z|[+-]${CLOCK})`;
/** Loops rather than counts where a format allows any length: each count is a state, with masks of its own. */
const LABEL = '[A-Za-z0-9]+(?:-+[A-Za-z0-9]+)*';
const HOST = `${LABEL}(?:\\.${LABEL})*`;
const SHORT_LABEL = '[A-Za-z0-9](?:[A-Za-z0-9-]{0,22}[A-Za-z0-9])?';
const ATOM = '[A-Za-z0-9_+-]+';
const UNRESERVED = "(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})";
const PATH = `(?:/${UNRESERVED}*)*`;
const TAIL = `(?:\\?(?:${UNRESERVED}|[/?])*)?(?:#(?:${UNRESERVED}|[/?])*)?`;
const URI = `[A-Za-z][A-Za-z0-9+.-]{1,15}://${HOST}(?::\\d{1,4})?${PATH}${TAIL}`;
const HMS = 'T(?:\\d{1,9}H(?:\\d{1,9}M(?:\\d{1,9}S)?)?|\\d{1,9}M(?:\\d{1,9}S)?|\\d{1,9}S)';
const YMD = '(?:\\d{1,9}Y(?:\\d{1,9}M(?:\\d{1,9}D)?)?|\\d{1,9}M(?:\\d{1,9}D)?|\\d{1,9}D)';
const UUID = '[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}';

const FORMATS: Readonly<Record<string, string>> = {
  'date-time': `${DATE}T${TIME}`,
  date: DATE,
  time: TIME,
  duration: `P(?:\\d{1,9}W|${YMD}(?:${HMS})?|${HMS})`,
  email: `${ATOM}(?:\\.${ATOM})*@(?:${LABEL}\\.)+[A-Za-z]+`,
  hostname: `${SHORT_LABEL}(?:\\.${SHORT_LABEL}){0,4}`,
  ipv4: IPV4,
  ipv6: IPV6,
  uri: URI,
  'uri-reference': `${URI}|/?${UNRESERVED}+${PATH}${TAIL}`,
  uuid: UUID,
  'json-pointer': '(?:/(?:[^~/]|~[01])*)*',
};

/** Formats that say what a text must be, and whose texts no automaton here knows. */
const UNSUPPORTED = [
  'idn-email',
  'idn-hostname',
  'iri',
  'iri-reference',
  'regex',
  'relative-json-pointer',
  'uri-template',
];

/** `ignored`: a name that JSON Schema does not know, which asks for nothing. */
export function formatExpression(name: string): Expression | 'ignored' | 'unsupported' {
  if (Object.hasOwn(FORMATS, name)) return regexExpression(FORMATS[name]!, 'whole');
  return UNSUPPORTED.includes(name) ? 'unsupported' : 'ignored';
}

/** Formats of which much less is written than there is: what a text of them may be by RFC 3986. */
const WIDER: Readonly<Record<string, string>> = {
  uri: "[A-Za-z][A-Za-z0-9+.-]*:(?:[A-Za-z0-9._~:/?#[\\]@!$&'()*+,;=-]|%[0-9a-fA-F]{2})+",
};
const REGEXES = new Map<string, RegExp>();

/** Whether `text` is of a format, as far as that is known: what is of one that no automaton here knows is taken for it. */
export function isOfFormat(text: string, name: string): boolean {
  if (!Object.hasOwn(FORMATS, name)) return true;
  const regex = REGEXES.get(name) ?? new RegExp(`^(?:${WIDER[name] ?? FORMATS[name]})$`, 'u');
  REGEXES.set(name, regex);
  return regex.test(text);
}
