/** Writes docs/errors.md from the table in src/errors.ts: `npx tsx scripts/errors-doc.ts`. A test checks that it is current. */
import { writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { ERROR_TABLE } from '../src/errors.ts';

export const ERRORS_DOC = fileURLToPath(new URL('../docs/errors.md', import.meta.url));

export function renderErrors(): string {
  const rows = Object.entries(ERROR_TABLE).map(
    ([code, { status, hint }]) => `| \`${code}\` | ${status} | ${hint.replaceAll('|', '\\|')} |`,
  );
  return `# Errors

Every failure carries one of these codes: in logs as \`code\`, in HTTP answers as \`error.code\`, in the library as \`PdError.code\`. The message
says what was being done, with which peer and which tensor; this table says what to do. Where one failure led to another, the inner one goes along
with code, message and context of its own: as \`error.cause\` in HTTP answers (beside OpenAI's fields, of errors of the server), as \`PdError.cause\` in
the library, in either case as deep as it goes. The innermost cause is what to look at; pd-doctor goes by it. Made from \`src/errors.ts\` by
\`npx tsx scripts/errors-doc.ts\`.

| code | HTTP | what to do |
|---|---|---|
${rows.join('\n')}
`;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) writeFileSync(ERRORS_DOC, renderErrors());
