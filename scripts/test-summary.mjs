// The last line of scripts/test.sh, from vitest's JSON report, vitest's exit status and the number of other steps that failed.
import { readFileSync } from 'node:fs';

const [path, status, broken] = process.argv.slice(2);

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
const passed = report.numPassedTests;
const skipped = report.numPendingTests + report.numTodoTests;
let failed = report.numFailedTests + files.length + Number(broken);
// An unhandled error fails the run outside of any test.
if (failed === 0 && status !== '0') failed = 1;

console.log(`test: ${passed} passed, ${failed} failed${skipped > 0 ? `, ${skipped} skipped` : ''}`);
process.exitCode = failed === 0 ? 0 : 1;
