// A reporter for vitest, whose JSON report leaves them out: errors outside of any test, such as a promise that rejected before a test awaited it. They fail
// the run, so scripts/test.sh and test-all.sh tell them as scripts/test-summary.mjs tells what failed.

/** Lines of each. */
const TOLD = 25;

export default class StrayErrors {
  onTestRunEnd(_modules, errors) {
    const part = process.env.PD_TEST_PART;
    for (const { name, message, stack, VITEST_TEST_NAME: during = 'no test that is known' } of errors) {
      console.log(`${part}: failed: outside of any test, during ${during}`);
      const lines = (stack ?? `${name}: ${message}`).split('\n');
      const own = lines.filter((line) => !line.includes('/node_modules/'));
      for (const line of own.slice(0, TOLD)) console.log(`${part}: | ${line.slice(0, 300)}`);
    }
  }
}
