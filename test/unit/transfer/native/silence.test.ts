import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { patienceOf, Silence } from '../../../../src/transfer/native/silence.ts';

const PATIENCE = 2_000;
const REPEAT_MS = 1_000;

/** A connection that says what must be answered each second, on a clock of its own; what the other end does, the test says. */
class World {
  now = 0;
  readonly silence = new Silence(PATIENCE);
  readonly asked = { here: 0, elsewhere: 0, answered: 0 };
  lostAt: number | undefined;
  /** Answers on their way: when they come, and by which connection. */
  #coming: { readonly at: number; readonly by: 'here' | 'elsewhere'; readonly answered: boolean }[] = [];
  /** In how many ms each is answered; undefined: never. */
  answers: { core: number | undefined; here: number | undefined; elsewhere: number | undefined };
  /** A connection of its own that nobody answers is given up after so long. */
  readonly #aside: number;
  #saidAt = Number.NEGATIVE_INFINITY;

  constructor(answers: World['answers'], aside = 3_000) {
    this.answers = answers;
    this.#aside = aside;
  }

  #come(by: 'here' | 'elsewhere', after: number | undefined): void {
    if (after !== undefined) this.#coming.push({ at: this.now + after, by, answered: true });
    else if (by === 'elsewhere') this.#coming.push({ at: this.now + this.#aside, by, answered: false });
  }

  /** `asleep`: this process stands still, and then everything that has come is there at once. */
  run(ms: number, { asleep = false, until = () => false }: { asleep?: boolean; until?: () => boolean } = {}) {
    const end = this.now + ms;
    while (this.now < end && this.lostAt === undefined && !until()) {
      this.now = asleep ? end : this.now + 10;
      // a timer that is due comes before what is to be read, where the process stood still
      if (asleep) this.#look();
      // on a lost connection nothing is heard
      if (this.lostAt !== undefined) return;
      for (const one of this.#coming.filter(({ at }) => at <= this.now)) this.#hear(one);
      this.#coming = this.#coming.filter(({ at }) => at > this.now);
      if (this.now - this.#saidAt >= REPEAT_MS) {
        this.#saidAt = this.now;
        this.silence.said(this.now);
        this.#come('here', this.answers.core);
      }
      if (!asleep) this.#look();
    }
  }

  #hear({ by, answered }: { readonly by: 'here' | 'elsewhere'; readonly answered: boolean }): void {
    if (by === 'elsewhere') this.silence.elsewhere(answered, this.now);
    else if (this.silence.heard()) {
      this.asked.answered++;
      // whoever hears something asks nobody else any more
      this.#coming = this.#coming.filter((one) => one.by === 'here');
    }
  }

  #look(): void {
    const step = this.silence.due(this.now);
    if (step === 'ask here') {
      this.asked.here++;
      this.#come('here', this.answers.here);
    } else if (step === 'ask elsewhere') {
      this.asked.elsewhere++;
      this.#come('elsewhere', this.answers.elsewhere);
    } else if (step === 'lost') this.lostAt = this.now;
  }
}

describe('a silent connection', () => {
  it('is asked nothing while its peer answers in time', () => {
    const world = new World({ core: 20, here: 20, elsewhere: 20 });
    world.run(60_000);
    expect([world.asked, world.lostAt]).toEqual([{ here: 0, elsewhere: 0, answered: 0 }, undefined]);
  });

  it('is kept while its peer computes, as its wire answers', () => {
    const world = new World({ core: undefined, here: 20, elsewhere: 20 });
    world.run(60_000);
    expect(world.lostAt).toBeUndefined();
    expect(world.asked.elsewhere).toBe(0);
    expect(world.asked.answered).toBe(world.asked.here);
    // each second it says something anew
    expect(world.asked.here).toBeLessThanOrEqual(60_000 / 1_500);
  });

  it('is lost once its peer answers elsewhere and not on it, within a fraction of a load’s deadline', () => {
    const world = new World({ core: undefined, here: undefined, elsewhere: 20 });
    world.run(60_000);
    expect(world.lostAt).toBeLessThan(1_500 + 2 * PATIENCE + 200);
    expect(world.silence.lasted(world.lostAt!)).toBeGreaterThan(1_500 + 2 * PATIENCE);
    // once
    expect([world.silence.at, world.silence.due(world.now)]).toEqual([undefined, undefined]);
  });

  it('is kept while its peer answers nobody, however long, which is asked ever more rarely', () => {
    const world = new World({ core: undefined, here: undefined, elsewhere: undefined });
    world.run(3_600_000);
    expect(world.lostAt).toBeUndefined();
    expect(world.asked.here).toBe(1);
    expect(world.asked.elsewhere).toBeLessThan(3_600_000 / 10_000);
    // and goes on: all that was said is answered, the last questions on both connections too
    world.answers = { core: 20, here: 20, elsewhere: 20 };
    world.run(60_000);
    expect(world.lostAt).toBeUndefined();
    expect(world.silence.at === undefined || world.silence.lasted(world.now) <= REPEAT_MS).toBe(true);
  });

  it('is kept where what it said is answered last of all, once its peer goes on', () => {
    const world = new World({ core: undefined, here: undefined, elsewhere: undefined });
    world.run(60_000, { until: () => world.asked.elsewhere === 2 });
    world.silence.elsewhere(true, world.now);
    world.run(PATIENCE - 50);
    expect(world.silence.heard()).toBe(true);
    world.answers.core = 20;
    world.run(60_000);
    expect(world.lostAt).toBeUndefined();
  });

  it('is not lost to a standstill of this end, in which its answer came', () => {
    const world = new World({ core: undefined, here: 1_500, elsewhere: 20 });
    const asked = () => world.asked.here === 1;
    world.run(60_000, { until: asked });
    world.run(30_000, { asleep: true });
    expect([world.asked.elsewhere, world.asked.answered]).toEqual([0, 1]);
    world.answers.here = 3_900;
    world.run(60_000, { until: () => world.asked.elsewhere === 1 });
    world.run(100);
    world.run(30_000, { asleep: true });
    expect(world.lostAt).toBeUndefined();
    expect(world.asked.answered).toBe(2);
  });

  it('is lost only while another is answered, in any order of things', () => {
    const delay = fc.option(fc.integer({ min: 0, max: 6_000 }), { nil: undefined });
    const phase = fc.record({
      answers: fc.record({ core: delay, here: delay, elsewhere: delay }),
      ms: fc.integer({ min: 0, max: 20_000 }),
      asleep: fc.boolean(),
    });
    fc.assert(
      fc.property(fc.array(phase, { maxLength: 12 }), (phases) => {
        const world = new World({ core: 20, here: 20, elsewhere: 20 });
        for (const { answers, ms, asleep } of phases) {
          world.answers = answers;
          world.run(ms, { asleep });
        }
        if (world.lostAt !== undefined) {
          expect(world.asked.elsewhere).toBeGreaterThan(0);
          expect(world.silence.lasted(world.lostAt)).toBeGreaterThanOrEqual(1_500 + 2 * PATIENCE);
          return;
        }
        // from any state: what is answered goes on, what another is answered for ends
        const other = new World({ core: undefined, here: undefined, elsewhere: 20 });
        Object.assign(world, { answers: other.answers });
        const since = world.now;
        world.run(120_000);
        expect(world.lostAt).toBeDefined();
        expect(world.lostAt! - since).toBeLessThan(60_000);
      }),
      {
        numRuns: 300,
        examples: [
          [
            [
              // what it said is answered while it stands still, for too short to be heard first
              { answers: { core: 1_001, here: undefined, elsewhere: undefined }, ms: 11_021, asleep: false },
              { answers: { core: undefined, here: 3_101, elsewhere: 0 }, ms: 11_571, asleep: false },
              { answers: { core: undefined, here: undefined, elsewhere: undefined }, ms: 910, asleep: true },
            ],
          ],
        ],
      },
    );
  });
});

it('leaves most of a load’s deadline', () => {
  for (const load of [5_000, 20_000, 60_000, 600_000]) {
    const whole = 1_500 + 2 * patienceOf({ answer: 5_000, load });
    expect(whole).toBeLessThan(load / 2);
  }
  expect(patienceOf({ answer: 5_000, load: 60_000 })).toBe(5_000);
  expect(patienceOf({ answer: 5_000, load: 1 })).toBe(250);
});
