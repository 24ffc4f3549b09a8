import { defineConfig } from 'vitest/config';

/** What is long or wide, and that no change of behaviour is first seen in: bundles, examples, long loads, results scripts in small. */
const WIDE = 'test/wide/**/*.test.ts';
/** Of integration, what starts servers and engines in the test's own process, and puts away what it has started. */
const SHARED = [
  'test/unit/**/*.test.ts',
  'test/integration/{proxy,worker}/**/!(*.rows).test.ts',
  'test/integration/{transfer-*,host-transport,native-hand-over,allow-peers,direct-endpoint,direct-page,layer-by-layer}.test.ts',
];
/** Tables of systems: some rows here, the others there (test/support/rows.ts). */
const ROWS = 'test/**/*.rows.test.ts';

export default defineConfig({
  test: {
    // Once per run: thread entries are built JavaScript (a Worker cannot start from TypeScript here), and the stand-in libraries.
    globalSetup: ['test/build.ts'],
    pool: 'forks',
    maxWorkers: 2,
    // Only to end what hangs: whole systems start in some tests, several at a time, on machines of any speed.
    testTimeout: 300_000,
    hookTimeout: 300_000,
    projects: [
      // scripts/test.sh. Those of `unit` share a process, as most take less time than a process takes to start and to load what they
      // test: each leaves it as it was.
      { extends: true, test: { name: 'unit', include: SHARED, isolate: false } },
      { extends: true, test: { name: 'main', include: ['test/**/*.test.ts'], exclude: [WIDE, ...SHARED] } },
      // scripts/test-all.sh
      { extends: true, test: { name: 'wide', include: [WIDE, ROWS], env: { PD_TEST_ROWS: 'others' } } },
    ],
  },
});
