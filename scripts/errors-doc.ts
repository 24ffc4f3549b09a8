/** Writes docs/errors.md from the table in src/errors.ts: `npx tsx scripts/errors-doc.ts`. A test checks that it is current. */
import { writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { ERROR_TABLE, type ErrorCode } from '../src/errors.ts';
import { codeInAnswers } from '../src/openai-error.ts';

export const ERRORS_DOC = fileURLToPath(new URL('../docs/errors.md', import.meta.url));

export function renderErrors(): string {
  const rows = Object.entries(ERROR_TABLE).map(([code, { status, hint }]) => {
    const answered = codeInAnswers(code as ErrorCode);
    const codes = answered === code ? `\`${code}\`` : `\`${code}\`, in HTTP responses \`${answered}\``;
    return `| ${codes} | ${status} | ${hint.replaceAll('|', '\\|')} |`;
  });
  return `# Errors

Every failure carries one of these codes: as \`code\` in logs, \`error.code\` in HTTP responses, \`PdError.code\` in the library. The message says
what was being done, with which peer and which tensor; this table says what to do. If another failure caused it, that one comes along with its own code,
message and context, to the end of the chain: as \`error.cause\` in HTTP responses (of server errors, beside OpenAI's fields), as \`PdError.cause\` in the
library. Look at the innermost cause; pd-doctor goes by it too. Generated from \`src/errors.ts\` by \`npx tsx scripts/errors-doc.ts\`.

| code | HTTP | what to do |
|---|---|---|
${rows.join('\n')}
`;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) writeFileSync(ERRORS_DOC, renderErrors());
