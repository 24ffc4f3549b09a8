// The last line of scripts/test.sh and test-all.sh: from vitest's JSON report and its exit status, and how many other steps passed and failed.
import { readFileSync } from 'node:fs';

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

console.log(`${name}: ${passed} passed, ${failed} failed${skipped > 0 ? `, ${skipped} skipped` : ''}`);
process.exitCode = failed === 0 ? 0 : 1;
