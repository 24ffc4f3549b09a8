// The last lines of scripts/test.sh and test-all.sh: what failed, a line each and why below it, and the sum. From vitest's JSON report and its exit
// status, and how many other steps passed and failed.
import { readFileSync } from 'node:fs';
import { relative } from 'node:path';

/** Lines of a failure's message that are told again. */
const TOLD = 25;

const [name, path, status, ...others] = process.argv.slice(2);
const [morePassed, moreFailed] = others.map(Number);

let report = { numPassedTests: 0, numFailedTests: 0, numPendingTests: 0, numTodoTests: 0, testResults: [] };
try {
  report = JSON.parse(readFileSync(path, 'utf8'));
} catch {
  // vitest ended before it could write: its status says so
}
// A file that fails to load has no tests to count.
const files = report.testResults.filter(
  (file) => file.status === 'failed' && file.assertionResults.length === 0,
);
const passed = report.numPassedTests + morePassed;
const skipped = report.numPendingTests + report.numTodoTests;
const broken = report.numFailedTests + files.length;
// An unhandled error fails the run outside of any test.
const failed = (broken === 0 && status !== '0' ? 1 : broken) + moreFailed;

const tell = (what, message) => {
  console.log(`${name}: failed: ${what.replaceAll('\n', ' ').slice(0, 300)}`);
  const lines = message
    .split('\n')
    .filter((line) => !line.includes('/node_modules/') && !line.startsWith('    at new Promise'));
  for (const line of lines.slice(0, TOLD)) console.log(`${name}: | ${line.slice(0, 300)}`);
};
for (const file of report.testResults) {
  const path = relative(process.cwd(), file.name);
  if (files.includes(file)) tell(path, file.message);
  for (const test of file.assertionResults) {
    if (test.status === 'failed') tell(`${path} > ${test.fullName}`, test.failureMessages.join('\n'));
  }
}
console.log(`${name}: ${passed} passed, ${failed} failed${skipped > 0 ? `, ${skipped} skipped` : ''}`);
process.exitCode = failed === 0 ? 0 : 1;
