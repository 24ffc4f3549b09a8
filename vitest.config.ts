import { defineConfig } from 'vitest/config';

/** What is long or wide, and that no change of behaviour is first seen in: bundles, examples, long loads, results scripts in small. */
const WIDE = 'test/wide/**/*.test.ts';
/** Tables of systems: some rows here, the others there (test/support/rows.ts). */
const ROWS = 'test/**/*.rows.test.ts';
/** What does not leave its process as it was: it loads stand-ins for CUDA, measures memory, or asks what is left open. */
const ALONE = [
  'test/integration/cuda/**/*.test.ts',
  'test/integration/{bad-input,host-transport-exit}.test.ts',
];

export default defineConfig({
  test: {
    // Once per run: thread entries are built JavaScript (a Worker cannot start from TypeScript here), and the stand-in libraries.
    globalSetup: ['test/build.ts'],
    setupFiles: ['test/seed.ts'],
    pool: 'forks',
    maxWorkers: 2,
    // Only to end what hangs: whole systems start in some tests, several at a time, on machines of any speed.
    testTimeout: 300_000,
    hookTimeout: 300_000,
    projects: [
      // scripts/test.sh. Those of `unit` share a process, as most take less time than a process takes to start and to load what they
      // test: each puts away what it has started.
      {
        extends: true,
        test: { name: 'unit', include: ['test/**/*.test.ts'], exclude: [WIDE, ...ALONE], isolate: false },
      },
      { extends: true, test: { name: 'main', include: ALONE } },
      // scripts/test-all.sh
      { extends: true, test: { name: 'wide', include: [WIDE, ROWS], env: { PD_TEST_ROWS: 'others' } } },
    ],
  },
});
