import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    // Thread entries are built JavaScript (a Worker cannot start from TypeScript here), so the build comes first.
    globalSetup: ['test/build.ts'],
    pool: 'forks',
    maxWorkers: 2,
    // Only to end what hangs: whole systems start in some tests, several at a time, on machines of any speed.
    testTimeout: 120_000,
    hookTimeout: 120_000,
  },
});
